"""Interleaved rounds for fair times on a noisy machine, and their results."""

from collections.abc import Callable, Mapping, Sequence
import datetime
from importlib import metadata
import json
import os
import pathlib
import platform
import random
import shlex
import statistics
import sys
import time
from typing import Any

RESULTS = pathlib.Path(__file__).with_name("results")
_PACKAGES = ("bilora_jax", "jax", "jaxlib", "flax", "optax", "qwix")


def interleaved(
  runs: Mapping[str, Callable[[], Any]],
  count: int,
  warmup: int,
  pause: float = 0.0,
) -> dict[str, list[float]]:
  """Times each run once a round; the order is random in every round.

  Args:
    runs: the functions to time, by name; each returns when its work is done.
    count: the number of rounds that are kept.
    warmup: the number of earlier rounds that are not kept.
    pause: seconds before each run, in which threads of the last run settle.

  Returns:
    The seconds of each run, (count,), in the order of the rounds.

  Raises:
    ValueError: if no round is to be kept, or warmup is negative.
  """
  if count < 1 or warmup < 0:
    raise ValueError(
      "there is at least 1 round, after 0 or more to warm up; got "
      f"{count} and {warmup}."
    )
  times: dict[str, list[float]] = {name: [] for name in runs}
  order = list(runs)
  for number in range(warmup + count):
    random.Random(number).shuffle(order)
    for name in order:
      time.sleep(pause)
      start = time.perf_counter()
      runs[name]()
      if number >= warmup:
        times[name].append(time.perf_counter() - start)
  return times


def compared(
  times: Mapping[str, Sequence[float]], base: str
) -> list[dict[str, Any]]:
  """Returns a row for each run, with its median and its ratio to `base`.

  A ratio is computed within each round, and the row has the median over the
  rounds. If other work slows the machine for a while, it slows both runs of a
  round.
  """
  rows = []
  for name, seconds in times.items():
    ratios = [x / y for x, y in zip(seconds, times[base])]
    low, middle, high = quartiles(ratios)
    rows.append(
      {
        "name": name,
        "median_seconds": statistics.median(seconds),
        "median_ratio": middle,
        "ratio_quartiles": [low, high],
      }
    )
  return rows


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
  """Returns the quartiles of one or more values; the second is the median."""
  if len(values) == 1:
    return values[0], values[0], values[0]
  low, middle, high = statistics.quantiles(values, method="inclusive")
  return low, middle, high


def circumstances(module: str, **more: Any) -> dict[str, Any]:
  """Returns the facts that a reader needs to judge or repeat a measurement.

  Args:
    module: the name after `python -m`.
    **more: further facts, such as the device.
  """
  return {
    "command": f"python -m {module} {shlex.join(sys.argv[1:])}".strip(),
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "machine": platform.machine(),
    "cores": os.cpu_count(),
    # The load at the end of the run shows whether other work slowed it.
    "load_average": round(os.getloadavg()[0], 2),
    "python": platform.python_version(),
    "versions": {name: metadata.version(name) for name in _PACKAGES},
    **more,
  }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table."""
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio(row: Mapping[str, Any]) -> str:
  """Returns the ratio and its quartiles, as a cell for a row of `compared`."""
  low, high = row["ratio_quartiles"]
  return f"{row['median_ratio']:.3f} ({low:.3f} to {high:.3f})"


def write(path: pathlib.Path, result: Mapping[str, Any]) -> None:
  """Writes a result as JSON; makes the folder if it does not exist."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=2) + "\n")
  print(f"\nwritten: {path}")
