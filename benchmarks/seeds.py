"""Compares steps of several seeds at once with steps one after the other.

  python -m benchmarks.seeds --workload minilm --seeds 4

The result shows whether a study can save time if `jax.vmap` runs several seeds
at once. Each seed has its own adapters and rows, and all seeds share the frozen
weights. Steps at once save time only if the batch of one seed leaves a part of
the device idle.
"""

import argparse
from collections.abc import Callable
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rounds, variants, workloads
from train.run import step

_SINGLY, _AT_ONCE = "one after the other", "at once, by vmap"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--workload", choices=workloads.NAMES, default=workloads.NAMES[0]
  )
  parser.add_argument("--seeds", type=int, default=4)
  parser.add_argument("--batch-size", type=int)
  parser.add_argument("--rounds", type=int, default=10)
  parser.add_argument("--warmup", type=int, default=2, help="rounds not kept")
  parser.add_argument("--out", type=pathlib.Path)
  options = parser.parse_args()
  workload = workloads.build(options.workload, options.batch_size)
  times = rounds.interleaved(
    turns(workload, options.seeds), options.rounds, options.warmup
  )
  rows = rounds.compared(times, _SINGLY)
  result = rounds.circumstances(
    "benchmarks.seeds",
    device=jax.devices()[0].device_kind,
    workload=options.workload,
    batch=list(workload.batch["tokens"].shape),
    seeds=options.seeds,
    rounds=options.rounds,
    rows=rows,
  )
  print(
    rounds.table(
      [f"a step of {options.seeds} seeds", "median (s)", "ratio (quartiles)"],
      [
        [row["name"], f"{row['median_seconds']:.4f}", rounds.ratio(row)]
        for row in rows
      ],
    )
  )
  name = f"seeds_{options.workload}_{jax.default_backend()}.json"
  rounds.write(options.out or rounds.RESULTS / name, result)


def turns(
  workload: workloads.Workload, seeds: int
) -> dict[str, Callable[[], jax.Array]]:
  """Returns functions that run a Bi-LoRA step of each seed, in both ways.

  Args:
    workload: the model and the batch; seeds differ in their adapters, and in
      the order of the batch's rows.
    seeds: the number of seeds.

  Returns:
    By name, functions that run the next step and return the losses, (seeds,).
  """
  variables = workload.variables()
  method = variants.method("Bi-LoRA 8+8", workload)
  one = step.make_train_step(method, workload.objective)
  every = jax.jit(jax.vmap(one, in_axes=(None, 0, 0)), donate_argnums=1)
  own = [
    {
      name: jnp.asarray(np.roll(x, seed, axis=0))
      for name, x in workload.batch.items()
    }
    for seed in range(seeds)
  ]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *own)

  def first(seed: int) -> step.TrainState:
    return step.init(method, jax.random.key(seed), variables)

  singles = [first(seed) for seed in range(seeds)]
  state: Any = jax.tree.map(
    lambda *x: jnp.stack(x), *[first(seed) for seed in range(seeds)]
  )

  def singly() -> jax.Array:
    losses = []
    for seed in range(seeds):
      singles[seed], metrics = one(variables, singles[seed], own[seed])
      losses.append(metrics.loss)
    return jax.block_until_ready((jnp.stack(losses), singles))[0]

  def at_once() -> jax.Array:
    nonlocal state
    state, metrics = every(variables, state, stacked)
    return jax.block_until_ready((metrics.loss, state))[0]

  return {_SINGLY: singly, _AT_ONCE: at_once}


if __name__ == "__main__":
  main()
