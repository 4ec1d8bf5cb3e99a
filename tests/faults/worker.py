"""Tries many mutants in a process of its own, which one of them may end.

`python worker.py FOLDER FORMAT FIRST END ...` prints, as JSON, what became of
each mutant.
"""

from collections.abc import Iterator, Mapping
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
from typing import Any

_REPOSITORY = pathlib.Path(__file__).parents[2]
# `trial` ends what is slow in Python; this is for what is slow elsewhere. The
# first answer comes after all of the program is imported.
_SILENT_SECONDS, _STARTING_SECONDS = 120, 600


def tried(
  counts: Mapping[str, int], folder: pathlib.Path
) -> Iterator[dict[str, Any]]:
  """Tries the first mutants of formats; the process may end at each.

  Args:
    counts: how many, by the format.
    folder: to work in.

  Yields:
    `format`, `mutant` (its number), `accepted`, and `fault`, which is empty if
    all is well.
  """
  left = {name: 0 for name, count in counts.items() if count}
  while left:
    for line in _lines(left, counts, folder):
      _done(left, line["format"], line["mutant"], counts)
      yield line
    if left:
      # It was at the first that is left.
      name, number = next(iter(left.items()))
      fault = "it ended the process, or gave no answer"
      place = {"format": name, "mutant": number}
      yield place | {"accepted": False, "fault": fault}
      _done(left, name, number, counts)


def _done(
  left: dict[str, int], name: str, number: int, counts: Mapping[str, int]
) -> None:
  left[name] = number + 1
  if left[name] == counts[name]:
    del left[name]


def _lines(
  left: Mapping[str, int], counts: Mapping[str, int], folder: pathlib.Path
) -> Iterator[dict[str, Any]]:
  """What a worker prints until it ends, or is silent for too long."""
  plan = [str(x) for name, at in left.items() for x in (name, at, counts[name])]
  process = subprocess.Popen(
    [sys.executable, __file__, str(folder), *plan],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    env=_environment(),
  )
  lines: queue.Queue[str] = queue.Queue()

  def read() -> None:
    assert process.stdout is not None
    for line in process.stdout:
      lines.put(line)
    lines.put("")

  reader = threading.Thread(target=read, daemon=True)
  reader.start()
  seconds = _STARTING_SECONDS
  try:
    while line := lines.get(timeout=seconds):
      yield json.loads(line)
      seconds = _SILENT_SECONDS
  except queue.Empty:
    pass
  finally:
    process.kill()
    process.wait()


def _environment() -> dict[str, str]:
  found = os.environ | {"JAX_PLATFORMS": "cpu"}
  path = (str(_REPOSITORY), found.get("PYTHONPATH"))
  return found | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def main(folder: str, *plan: str) -> None:
  """Tries mutants, and prints a line of each."""
  import trial  # which imports all of the program

  for name, first, end in zip(plan[::3], plan[1::3], plan[2::3]):
    with tempfile.TemporaryDirectory(dir=folder) as own:
      seed = trial.Seed(name, pathlib.Path(own) / "whole")
      for number in range(int(first), int(end)):
        outcome = seed.tried(*seed.mutant(number))
        found = {"accepted": outcome.accepted, "fault": outcome.fault}
        line = {"format": name, "mutant": number, **found}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
