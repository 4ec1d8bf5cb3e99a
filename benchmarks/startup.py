"""Measures the time from the command to the end of the first step.

  python -m benchmarks.startup

Each command runs in a process of its own, which ends after its first step. The
command runs once with an empty compilation cache, and once with the filled
cache. `train compile` of Llama 3.1-8B has no step and reads no weights. Its
process ends when the command ends.

The seconds of tracing, lowering and compiling are those of all programs that
JAX compiles. The rest is the time of data, weights, adapters and the first step
itself. The validation before the first step is left out.
"""

import argparse
from collections.abc import Sequence
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import rounds

_COMMANDS = {
  "MiniLM": ["--task", "snippets"],
  "SmolLM2-135M": ["--preset", "snippets-smollm2"],
  "Llama 3.1-8B, compile": [
    *("compile", "--model", "llama3.1-8b", "--method", "bilora"),
    *("--batch-size", "4", "--max-length", "256"),
  ],
}
_EVENTS = {
  "tracing": "/jax/core/compile/jaxpr_trace_duration",
  "lowering": "/jax/core/compile/jaxpr_to_mlir_module_duration",
  "compiling": "/jax/core/compile/backend_compile_duration",
}
_MARK = "startup: "


def main() -> None:
  options = _options()
  if options.child:
    _child(json.loads(options.child))
    return
  commands = {x: _COMMANDS[x] for x in options.only or _COMMANDS}
  rows = []
  for name, arguments in commands.items():
    by_cache: dict[str, list[dict[str, float]]] = {"empty": [], "filled": []}
    for _ in range(options.rounds):
      with tempfile.TemporaryDirectory() as cache:
        for found in by_cache.values():
          found.append(measure(arguments, pathlib.Path(cache)))
    rows += [
      {
        "name": name,
        "cache": cache,
        **{x: statistics.median(row[x] for row in found) for x in found[0]},
      }
      for cache, found in by_cache.items()
    ]
  result = rounds.circumstances(
    "benchmarks.startup", rounds=options.rounds, rows=rows
  )
  rounds.write(options.out, result)
  head = list(rows[0])
  lines = [
    [x if isinstance(x, str) else f"{x:.1f}" for x in row.values()]
    for row in rows
  ]
  print(rounds.table(head, lines))


def measure(arguments: Sequence[str], cache: pathlib.Path) -> dict[str, float]:
  """Returns the seconds of one start, divided into parts.

  Args:
    arguments: the arguments of the program.
    cache: the folder of the compilation cache.

  Raises:
    RuntimeError: if the program ends before its first step.
  """
  with tempfile.TemporaryDirectory() as folder:
    begin = time.time()
    done = subprocess.run(
      [
        *(sys.executable, "-m", "benchmarks.startup"),
        *("--child", json.dumps([begin, folder, list(arguments)])),
      ],
      env={**os.environ, "XDG_CACHE_HOME": str(cache)},
      capture_output=True,
      text=True,
    )
  marked = [x for x in done.stdout.splitlines() if x.startswith(_MARK)]
  if not marked:
    raise RuntimeError(f"{arguments} has no first step: {done.stderr[-2000:]}")
  return json.loads(marked[0].removeprefix(_MARK))


def _child(given: Any) -> None:
  begin, folder, arguments = given
  from train import __main__ as program
  from train.planning import compile  # noqa: F401 (as the commands do)
  from train.run import loop  # noqa: F401
  from train.run.loggers import registry
  from train.run.loggers.logger import Logger

  imported = time.time()
  spans = _watch()

  class Ends(Logger):
    """A logger that ends the process after the first step."""

    def __init__(self, opened):
      del opened

    def log(self, step, values):
      del step, values
      _tell(begin, imported, spans)

  if arguments[0] != "compile":
    registry.register("startup", Ends)
    arguments = [
      *(*arguments, "--loggers", "startup", "--log-every", "1"),
      *("--no-eval-first", "--run-dir", f"{folder}/run"),
    ]
  code = program.main(arguments)
  if arguments[0] == "compile" and code == 0:
    _tell(begin, imported, spans)


def _watch() -> dict[str, list[tuple[float, float]]]:
  """Starts to record when JAX traces, lowers and compiles, as spans."""
  import jax

  spans: dict[str, list[tuple[float, float]]] = {x: [] for x in _EVENTS}

  def listen(event: str, duration_secs: float, **more: Any) -> None:
    del more
    for name, watched in _EVENTS.items():
      if event == watched:
        now = time.time()
        spans[name].append((now - duration_secs, now))

  jax.monitoring.register_event_duration_secs_listener(listen)
  return spans


def _tell(
  begin: float, imported: float, spans: dict[str, list[tuple[float, float]]]
) -> None:
  end = time.time()
  took = {"imports": imported - begin}
  took |= {name: _length(found) for name, found in spans.items()}
  took["rest"] = end - begin - sum(took.values())
  print(_MARK + json.dumps({**took, "total": end - begin}), flush=True)
  os._exit(0)


def _length(spans: Sequence[tuple[float, float]]) -> float:
  """Returns the length of the spans' union, because traces can be nested."""
  total, reached = 0.0, 0.0
  for start, end in sorted(spans):
    total += max(0.0, end - max(start, reached))
    reached = max(reached, end)
  return total


def _options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--only", nargs="+", choices=_COMMANDS)
  parser.add_argument("--child", help=argparse.SUPPRESS)
  parser.add_argument(
    "--out", type=pathlib.Path, default=rounds.RESULTS / "startup_cpu.json"
  )
  return parser.parse_args()


if __name__ == "__main__":
  main()
