"""Step time of LoRA and Bi-LoRA, interleaved: `python benchmarks/step_time.py`.

Each round runs one step of every method in a new random order, on the same
batch; the median over rounds of each method's time over LoRA's in that round is
what is reported, since machines are noisy.
"""

import argparse
import json
import pathlib
import platform
import random
import statistics
import time

import jax
import numpy as np

from train import config as config_lib
from train import methods, step
from train.models import load
from train.objectives import CLASSIFICATION

_VARIANTS = {
  "LoRA r=8": {"method": "lora"},
  "LoRA r=16": {"method": "lora", "rank": 16},
  "Bi-LoRA 8+8": {"method": "bilora"},
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=30)
  parser.add_argument("--warmup", type=int, default=3)
  parser.add_argument("--batch-size", type=int, default=32)
  parser.add_argument("--length", type=int, default=32)
  parser.add_argument("--model", default="minilm")
  parser.add_argument("--out", type=pathlib.Path)
  options = parser.parse_args()

  model, variables, _ = load.load_bert(options.model, 2, 0)
  variables = jax.device_put(variables)
  rng = np.random.default_rng(0)
  shape = (options.batch_size, options.length)
  batch = {
    "tokens": rng.integers(1000, 20000, shape).astype(np.int32),
    "mask": np.ones(shape, np.int32),
    "token_types": np.zeros(shape, np.int32),
    "labels": rng.integers(0, 2, options.batch_size).astype(np.int32),
  }
  steps, states = {}, {}
  for name, changes in _VARIANTS.items():
    config = config_lib.Config(**changes)
    method = methods.build(
      config, model, CLASSIFICATION.inputs(batch), steps=1000
    )
    states[name] = step.init(method, jax.random.key(0), variables)
    train_step = step.make_train_step(method, CLASSIFICATION, jax.random.key(1))
    steps[name] = train_step.lower(variables, states[name], batch).compile()

  times: dict[str, list[float]] = {name: [] for name in steps}
  order = list(steps)
  for number in range(options.warmup + options.rounds):
    random.Random(number).shuffle(order)
    for name in order:
      start = time.perf_counter()
      states[name], metrics = steps[name](variables, states[name], batch)
      jax.block_until_ready((states[name], metrics))
      if number >= options.warmup:
        times[name].append(time.perf_counter() - start)

  base = times["LoRA r=8"]
  rows = []
  for name, seconds in times.items():
    ratios = sorted(x / y for x, y in zip(seconds, base))
    memory = steps[name].memory_analysis()
    rows.append(
      {
        "method": name,
        "median_seconds": statistics.median(seconds),
        "median_ratio": statistics.median(ratios),
        "ratio_quartiles": [
          float(q) for q in np.quantile(ratios, [0.25, 0.75])
        ],
        "temporary_bytes": getattr(memory, "temp_size_in_bytes", None),
      }
    )
  result = {
    "command": f"python benchmarks/step_time.py --rounds {options.rounds}",
    "model": options.model,
    "batch": list(shape),
    "rounds": options.rounds,
    "device": jax.devices()[0].device_kind,
    "machine": platform.machine(),
    "jax": jax.__version__,
    "date": time.strftime("%Y-%m-%d"),
    "rows": rows,
  }
  print("| method | median step (s) | over LoRA r=8 (quartiles) |")
  print("|---|---|---|")
  for row in rows:
    low, high = row["ratio_quartiles"]
    print(
      f"| {row['method']} | {row['median_seconds']:.4f} | "
      f"{row['median_ratio']:.3f} ({low:.3f} to {high:.3f}) |"
    )
  if options.out:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  main()
