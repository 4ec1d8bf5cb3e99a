"""Counts the kernels that a step launches on a GPU, without a GPU.

  pip install "jax[cuda12]"
  python -m benchmarks.launches --workload minilm

XLA compiles the step for an H200, and the benchmark counts the kernels in the
compiled program. Launches limit the speed of small models: a launch takes some
microseconds, even for a small kernel. Nothing is autotuned, so the count
differs from that of a real card by some per cent. The kernels of both sides of
a branch are counted.
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
  """Counts the kernels of a program, and its branches, where the host waits.

  Args:
    text: the text of the program, from `compiled.as_text()`.
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
