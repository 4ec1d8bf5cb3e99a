"""Tries many mutants in a process of its own, which one of them may end.

`python worker.py FORMAT FOLDER FIRST END` prints, as JSON, what became of each
mutant.
"""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

_REPOSITORY = pathlib.Path(__file__).parents[2]
# An alarm ends what is slow in Python; this what is slow elsewhere.
_SILENT_SECONDS = 60


class Found(NamedTuple):
  """What became of many mutants.

  Attributes:
    accepted: how many were read.
    faults: what is wrong, by the numbers of mutants.
  """

  accepted: int
  faults: dict[int, str]


def tried(name: str, folder: pathlib.Path, count: int) -> Found:
  """Tries the first mutants of a format; the process may end at each.

  Args:
    name: of the format.
    folder: to work in, which is new.
    count: how many.
  """
  accepted, faults, first = 0, {}, 0
  while first < count:
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / str(first)
    process = subprocess.Popen(
      [sys.executable, __file__, name, str(own), str(first), str(count)],
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      env=os.environ | {"PYTHONPATH": str(_REPOSITORY), "JAX_PLATFORMS": "cpu"},
    )
    lines = _lines(process, own)
    faults |= {line["mutant"]: line["fault"] for line in lines if line["fault"]}
    accepted += sum(line["accepted"] for line in lines)
    done = lines[-1]["mutant"] + 1 if lines else first
    if process.returncode or done < count:
      faults[done] = f"the process ended with {process.returncode}"
      done += 1
    first = done
  return Found(accepted, faults)


def _lines(
  process: subprocess.Popen, folder: pathlib.Path
) -> list[dict[str, Any]]:
  """What a worker printed until it ended, or was silent for too long."""
  assert process.stdout is not None
  lines: list[dict[str, Any]] = []
  heard = [time.monotonic()]

  def read():
    for line in process.stdout:
      lines.append(json.loads(line))
      heard[0] = time.monotonic()

  reader = threading.Thread(target=read)
  reader.start()
  while process.poll() is None:
    if time.monotonic() - heard[0] > _SILENT_SECONDS:
      process.kill()
    time.sleep(0.2)
  reader.join()
  return lines


def main(name: str, folder: str, first: str, end: str) -> None:
  """Tries mutants, and prints a line of each."""
  import trial

  seed = trial.Seed(name, pathlib.Path(folder))
  for number in range(int(first), int(end)):
    outcome = seed.tried(*seed.mutant(number))
    line = {
      "mutant": number,
      "accepted": outcome.accepted,
      "fault": outcome.fault,
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
