"""Kill -9 at any moment: the same command comes to the same bits.

`KILLS=10 pytest tests/train/run/test_kill.py` kills ten times, at random.
"""

import os
import random
import signal
import threading
import time

from outcomes import (
  assert_no_step_twice,
  assert_same_outcome,
  checkpoint,
  files,
)
import pytest

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "2"))
OPTIONS = ("--checkpoint-every", "3", "--eval-every", "4")
_TIMEOUT_SECONDS = 120


@pytest.fixture(scope="module")
def reference(tmp_path_factory, spawn):
  """A run that nobody killed, and its seconds from its first line to its end.

  The first of two fills the compilation cache, so that the second takes as
  long as those that are killed.
  """
  for name in ("cold", "warm"):
    folder = tmp_path_factory.mktemp(name) / "run"
    process = spawn(folder, *OPTIONS)
    assert process.stdout.readline().startswith("bilora on snippets")
    start = time.monotonic()
    _, err = process.communicate(timeout=_TIMEOUT_SECONDS)
    assert process.returncode == 0, err
  return folder, time.monotonic() - start


def _end(process) -> int:
  """Waits for the end, at which it was killed or has succeeded."""
  _, err = process.communicate(timeout=_TIMEOUT_SECONDS)
  assert process.returncode in (0, -signal.SIGKILL), err
  return process.returncode


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(
  spawn, reference, tmp_path
):
  expected, seconds = reference
  moments = random.Random(0)
  killed, finished = [], 0
  # A kill that would come too late finds its run finished; then another run.
  while len(killed) < KILLS or not finished:
    folder = tmp_path / f"run{finished}"
    process = spawn(folder, *OPTIONS)
    # From the first line on: before it nothing of the run is written.
    process.stdout.readline()
    delay = moments.uniform(0, seconds)
    timer = threading.Timer(delay, process.kill)
    if len(killed) < KILLS:
      timer.start()
    if _end(process):
      saving = any("orbax-checkpoint-tmp" in name for name in files(folder))
      killed.append(f"{delay:.2f} s{' (in a save)' if saving else ''}")
      continue
    timer.cancel()
    finished += 1
    assert_same_outcome(folder, expected)
    assert_no_step_twice(folder)
  print(f"runs finished: {finished}; killed after", ", ".join(killed))


# Orbax commits a checkpoint by renaming, an item of it first; the program
# replaces its own files likewise. Each of these is killed just before.
KILL_AT = """
import os, signal
left = {count}
def dying(name):
  real = getattr(os, name)
  def call(*arguments, **keywords):
    global left
    if {where!r} in os.fspath(arguments[0]):
      left -= 1
      if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **keywords)
  setattr(os, name, call)
for name in ("rename", "replace"):
  dying(name)
"""


@pytest.mark.parametrize(
  ("where", "count"),
  [
    ("checkpoints/last/", 4),
    ("checkpoints/best/", 0),
    (".results.json", 0),
  ],
)
def test_a_run_killed_as_it_renames_ends_in_the_same_bits(
  spawn, reference, tmp_path, where, count
):
  folder = tmp_path / "run"
  process = spawn(
    folder, *OPTIONS, driver=KILL_AT.format(where=where, count=count)
  )
  assert _end(process) == -signal.SIGKILL
  assert _end(spawn(folder, *OPTIONS)) == 0
  assert_same_outcome(folder, reference[0])
  assert_no_step_twice(folder)
  assert (folder / "report.md").is_file()
  assert checkpoint(folder)
