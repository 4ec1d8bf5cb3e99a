"""Compares a LoRA step of this program with a step of PyTorch and PEFT.

  python -m benchmarks.against_peft --torch-python TORCH/bin/python

TORCH is an environment with torch, peft and transformers. Both programs train
LoRA (r = 8, alpha = 16) on every linear layer, with AdamW, on the same weights
and batch. Each program is a process that runs a step on request. The two never
run at once, and their order is random in every round. Both must have the same
number of trained parameters, and their losses of the first step must agree.
Both use the same CPU cores, which works only on Linux.
"""

import argparse
import json
import math
import os
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks import rounds, worker, workloads
from train.models.decoder import config as decoder_config
from train.models.io import weights

_OURS, _THEIRS = "JAX, this program", "PyTorch, PEFT"
# The largest allowed difference between the losses of the first step, in nats.
# MiniLM is float32. The others are bfloat16, which the two frameworks round at
# different places.
_TOLERANCE = {"minilm": 1e-4, "smollm2-135m": 2e-2, "1b": 2e-2}


def main() -> None:
  options = _options()
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
  with tempfile.TemporaryDirectory() as scratch:
    result = measure(options, pathlib.Path(scratch))
  print(_table(result))
  device = "cpu" if result["devices"][_OURS] == "cpu" else "gpu"
  compiled = "_compiled" if options.compile else ""
  name = f"against_peft_{options.workload}{compiled}_{device}.json"
  rounds.write(options.out or rounds.RESULTS / name, result)


def measure(
  options: argparse.Namespace, scratch: pathlib.Path
) -> dict[str, Any]:
  """Times both programs.

  Args:
    options: the options of the command line.
    scratch: a folder for the batch, and for random weights.

  Raises:
    RuntimeError: if the programs do not train the same model: their numbers of
      trained parameters differ, or the losses of their first steps differ.
  """
  folder, batch = _prepare(options, scratch)
  arguments = [str(folder), str(scratch / "batch.npz")]
  extra = ["--threads", str(options.threads)]
  extra += ["--compile"] if options.compile else []
  # PyTorch comes first, because it draws the weights that JAX then reads.
  workers = {
    _THEIRS: worker.Worker(
      options.torch_python,
      "benchmarks.peft_theirs",
      [*arguments, *extra],
      {"OMP_NUM_THREADS": str(options.threads)},
    ),
    _OURS: worker.Worker(
      sys.executable,
      "benchmarks.peft_ours",
      arguments,
      # Without this, JAX takes most of the device's memory, and PyTorch has
      # too little.
      {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    ),
  }
  about = {name: each.about for name, each in workers.items()}
  first = {name: each.step() for name, each in workers.items()}
  _check_same(options.workload, about, first)
  times = rounds.interleaved(
    {name: each.step for name, each in workers.items()},
    options.rounds,
    options.warmup,
    # OpenMP's threads keep the cores busy for a while after their work.
    pause=0.02,
  )
  last = {name: each.step() for name, each in workers.items()}
  for each in workers.values():
    each.close()
  return rounds.circumstances(
    "benchmarks.against_peft",
    devices={name: x["device"] for name, x in about.items()},
    their_versions=about[_THEIRS]["versions"],
    threads=options.threads,
    workload=options.workload,
    batch=list(batch["tokens"].shape),
    rounds=options.rounds,
    trained_parameters=about[_OURS]["trained_parameters"],
    first_loss=first,
    last_loss=last,
    rows=rounds.compared(times, _THEIRS),
  )


def _options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--torch-python", required=True, help="with torch, peft and transformers"
  )
  parser.add_argument(
    "--workload",
    choices=_TOLERANCE,
    default="minilm",
    help="minilm, float32, is for CPUs: on GPUs the two round it differently",
  )
  parser.add_argument("--rounds", type=int, default=30)
  parser.add_argument("--warmup", type=int, default=5, help="rounds not kept")
  parser.add_argument(
    "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each"
  )
  parser.add_argument(
    "--compile", action="store_true", help="theirs, with torch.compile"
  )
  parser.add_argument("--batch-size", type=int)
  parser.add_argument("--length", type=int)
  parser.add_argument("--out", type=pathlib.Path)
  return parser.parse_args()


def _prepare(
  options: argparse.Namespace, scratch: pathlib.Path
) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
  """Returns the model's folder and the batch, and writes it to `batch.npz`.

  This function must not use the device, because the workers share it.
  """
  if options.workload == "minilm":
    folder = weights.locate("minilm")
    batch = workloads.labelled(options.batch_size or 32, options.length or 32)
    width = weights.read_config(folder)["hidden_size"]
    head = np.random.default_rng(1).normal(size=(width, 2)) / math.sqrt(width)
    batch["head"] = head.astype(np.float32)
  else:
    folder, sizes = scratch, workloads.DECODERS[options.workload]
    batch = workloads.next_tokens(
      sizes.vocab_size, options.batch_size or 8, options.length or 1024
    )
    (folder / "config.json").write_text(json.dumps(_to_hf(sizes)))
  np.savez(scratch / "batch.npz", allow_pickle=False, **batch)
  return folder, batch


def _to_hf(sizes: decoder_config.DecoderConfig) -> dict[str, Any]:
  """Returns the config.json of a Llama of these sizes, without RoPE scaling."""
  return {
    "model_type": "llama",
    "vocab_size": sizes.vocab_size,
    "hidden_size": sizes.hidden_size,
    "num_hidden_layers": sizes.num_layers,
    "num_attention_heads": sizes.num_heads,
    "num_key_value_heads": sizes.num_kv_heads,
    "head_dim": sizes.head_dim,
    "intermediate_size": sizes.intermediate_size,
    "max_position_embeddings": sizes.max_positions,
    "rms_norm_eps": sizes.rms_norm_eps,
    "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_theta},
    "tie_word_embeddings": sizes.tied,
  }


def _check_same(
  workload: str, about: dict[str, Any], first: dict[str, float]
) -> None:
  ours, theirs = (about[x]["trained_parameters"] for x in (_OURS, _THEIRS))
  if ours != theirs:
    raise RuntimeError(
      f"the two train different parameters: ours {ours}, theirs {theirs}."
    )
  # `not ... <=` also refuses NaN.
  if not abs(first[_OURS] - first[_THEIRS]) <= _TOLERANCE[workload]:
    raise RuntimeError(
      "the losses of the first step differ by more than "
      f"{_TOLERANCE[workload]}: {first}."
    )


def _table(result: dict[str, Any]) -> str:
  batch = " x ".join(map(str, result["batch"]))
  return rounds.table(
    [
      f"LoRA r=8, {result['workload']}, {batch} tokens",
      "median step (s)",
      "over PEFT (quartiles)",
    ],
    [
      [row["name"], f"{row['median_seconds']:.4f}", rounds.ratio(row)]
      for row in result["rows"]
    ],
  )


if __name__ == "__main__":
  main()
