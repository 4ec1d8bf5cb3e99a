"""Profiles a step on a GPU: the kernels of each method, and their times.

  python -m benchmarks.step_profile --workload smollm2-135m

If a method costs too much, the profile shows which kernels it launches more
often, or which kernels are slower. The steps of each method are compiled first,
and then run under JAX's profiler.
"""

import argparse
import collections
import pathlib
import re
import tempfile
from typing import Any

import jax

from benchmarks import rounds, step_time, variants, workloads

# The number in a name such as `loop_add_fusion_12`. Fusions of the same kind
# differ only in this number.
_NUMBER = re.compile(r"(_\d+)+$")


def main() -> None:
  options = _options()
  if jax.default_backend() != "gpu":
    raise SystemExit(
      "benchmarks.step_profile reads the kernels of a GPU; JAX's backend here "
      f"is {jax.default_backend()}."
    )
  workload = workloads.from_options(options)
  variables = workload.variables()
  batch = jax.device_put(workload.batch)
  rows = []
  for name in options.methods:
    turn, _ = step_time.compiled_turn(
      name, workload, variables, batch, options.steps
    )
    turn()
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder):
        turn()
      kernels = _kernels(pathlib.Path(folder))
    rows.append({"name": name, **_summary(kernels, options.steps)})
  print(_table(rows))
  result = rounds.circumstances(
    "benchmarks.step_profile",
    device=jax.devices()[0].device_kind,
    workload=options.workload,
    unrolled=options.unrolled,
    batch=list(workload.batch["tokens"].shape),
    steps=options.steps,
    rows=rows,
  )
  name = f"step_profile_{options.workload}.json"
  rounds.write(options.out or rounds.RESULTS / name, result)


def _options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  workloads.add_options(parser)
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--out", type=pathlib.Path)
  parser.add_argument(
    "--methods", nargs="+", choices=variants.ALL, default=list(variants.NAMES)
  )
  return parser.parse_args()


def _kernels(folder: pathlib.Path) -> list[tuple[str, float]]:
  """Returns names and seconds of the kernels in the traces in a folder."""
  kernels = []
  for path in folder.rglob("*.xplane.pb"):
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
      if not plane.name.startswith("/device:GPU"):
        continue
      for line in plane.lines:
        # The kernels are on these lines. Other lines name XLA's operations.
        if line.name.startswith("Stream"):
          kernels += [(e.name, e.duration_ns * 1e-9) for e in line.events]
  return kernels


def _summary(kernels: list[tuple[str, float]], steps: int) -> dict[str, Any]:
  """Returns kernels and seconds per step, in total and for each kind."""
  kinds = collections.defaultdict(list)
  for name, seconds in kernels:
    kinds[_NUMBER.sub("", name)].append(seconds)
  by_time = sorted(kinds.items(), key=lambda kind: -sum(kind[1]))
  return {
    "kernels": len(kernels) / steps,
    "seconds": sum(seconds for _, seconds in kernels) / steps,
    "kinds": [
      {
        "name": name,
        "kernels": len(seconds) / steps,
        "seconds": sum(seconds) / steps,
      }
      for name, seconds in by_time
    ],
  }


def _table(rows: list[dict[str, Any]]) -> str:
  """Returns tables of methods, and of largest differences from the first."""
  head = ["method", "kernels a step", "their time (ms)"]
  lines = [
    [row["name"], f"{row['kernels']:,.0f}", f"{1e3 * row['seconds']:.2f}"]
    for row in rows
  ]
  parts = [rounds.table(head, lines)]
  first = {kind["name"]: kind["seconds"] for kind in rows[0]["kinds"]}
  for row in rows[1:]:
    own = {kind["name"]: kind["seconds"] for kind in row["kinds"]}
    more = {
      name: own.get(name, 0.0) - first.get(name, 0.0)
      for name in first.keys() | own.keys()
    }
    most = sorted(more, key=lambda name: -abs(more[name]))[:12]
    kinds = [[name[:70], f"{1e3 * more[name]:+.3f}"] for name in most]
    title = f"{row['name']} less {rows[0]['name']}"
    parts.append(rounds.table([title, "ms a step"], kinds))
  return "\n\n".join(parts)


if __name__ == "__main__":
  main()
