"""How many kernels a step launches on a GPU, without a GPU.

  pip install "jax[cuda12]"
  python -m benchmarks.launches --workload minilm

XLA compiles the step for an H200 that is not there, and what it would launch is
counted. Small models are bound by launches: one takes some microseconds,
whatever the kernel does. Nothing is tuned, so that the count differs from a
real card's by some per cent. Both sides of a branch count.
"""

import argparse
from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks import rounds, variants, workloads
from train.planning import hlo, topology, traffic
from train.run import step


def main() -> None:
  options = _options()
  (device,) = topology.devices("h200:1")
  workload = workloads.from_options(options)
  rows = [
    {"name": name, **counted(_compiled(name, workload, device))}
    for name in options.methods
  ]
  print(_table(rows))
  result = rounds.circumstances(
    "benchmarks.launches",
    device=f"{device.device_kind}, by its compiler",
    workload=options.workload,
    unrolled=options.unrolled,
    batch=list(workload.batch["tokens"].shape),
    rows=rows,
  )
  name = f"launches_{options.workload}.json"
  rounds.write(options.out or rounds.RESULTS / name, result)


def counted(text: str) -> dict[str, int]:
  """How many kernels a program launches, and how often its host has to wait.

  Args:
    text: of the program, as `compiled.as_text()` gives it.
  """
  found = {"kernels": 0, "branches": 0}
  for x, _, times in hlo.executed(hlo.parse(text)):
    if x.opcode == "conditional":
      found["branches"] += times or 1
    elif x.opcode not in traffic.FREE:
      found["kernels"] += times or 1
  return found


def _compiled(name: str, workload: workloads.Workload, device: Any) -> str:
  method = variants.method(name, workload)
  variables = jax.eval_shape(workload.variables)
  state = jax.eval_shape(
    lambda x: step.init(method, jax.random.key(0), x), variables
  )
  batch = jax.tree.map(np.asarray, workload.batch)
  sharding = jax.sharding.SingleDeviceSharding(device)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    (variables, state, batch),
  )
  train_step: Any = step.make_train_step(method, workload.objective)
  return train_step.lower(*shapes).compile(topology.WITHOUT_GPU).as_text()


def _options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  workloads.add_options(parser)
  parser.add_argument("--out", type=pathlib.Path)
  parser.add_argument(
    "--methods", nargs="+", choices=variants.ALL, default=list(variants.NAMES)
  )
  return parser.parse_args()


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
  return rounds.table(
    ["method", "kernels", "branches"],
    [
      [row["name"], f"{row['kernels']:,}", f"{row['branches']:,}"]
      for row in rows
    ],
  )


if __name__ == "__main__":
  main()
