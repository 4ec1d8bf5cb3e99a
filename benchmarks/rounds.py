"""Interleaved rounds: fair times on a noisy machine, and what came of them."""

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
  """Times each run once a round, in an order that is new in every round.

  Args:
    runs: what to time, by name; each returns when its work is done.
    count: rounds that are kept.
    warmup: rounds before them that are not.
    pause: seconds before each run, for threads of the last one to settle.

  Returns:
    Seconds of each run, (count,), in the order of the rounds.

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
  """A row for each run: its median, and its ratio to `base` round by round.

  The ratio is the median over rounds of quotients within a round: what slows
  the machine for a while slows both.
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
  """The quartiles of one value or more; the second is the median."""
  if len(values) == 1:
    return values[0], values[0], values[0]
  low, middle, high = statistics.quantiles(values, method="inclusive")
  return low, middle, high


def circumstances(module: str, **more: Any) -> dict[str, Any]:
  """What a reader needs to judge a figure, or to get it again.

  Args:
    module: the name after `python -m`.
    **more: what else there is to know, as the device.
  """
  return {
    "command": f"python -m {module} {shlex.join(sys.argv[1:])}".strip(),
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "machine": platform.machine(),
    "cores": os.cpu_count(),
    # Others' work at the end of the run: on a quiet machine, our own alone.
    "load_average": round(os.getloadavg()[0], 2),
    "python": platform.python_version(),
    "versions": {name: metadata.version(name) for name in _PACKAGES},
    **more,
  }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table."""
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio(row: Mapping[str, Any]) -> str:
  """The cell of a row of `compared`: the ratio and its quartiles."""
  low, high = row["ratio_quartiles"]
  return f"{row['median_ratio']:.3f} ({low:.3f} to {high:.3f})"


def write(path: pathlib.Path, result: Mapping[str, Any]) -> None:
  """Writes a result as JSON, its folder made if there is none."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=2) + "\n")
  print(f"\nwritten: {path}")
