"""A lock is one process's, and goes with it; nothing of it is left."""

import subprocess
import sys
import threading

import pytest

from train import files, locks
from train.errors import UsageError

_HOLDER = """
import pathlib, sys, time
from train import {module}
with {context}(pathlib.Path(sys.argv[1]){more}):
  print("held", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder():
  """Has another process be in a context of a path; `holder(path, ...)`."""
  started = []

  def start(path, module, context, more=""):
    code = _HOLDER.format(module=module, context=context, more=more)
    process = subprocess.Popen(
      [sys.executable, "-c", code, str(path), "--seed", "3"],
      stdout=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process

  yield start
  for process in started:
    process.kill()
    process.communicate()


def test_who_holds_a_lock_is_said_and_a_kill_frees_it(tmp_path, holder):
  path = tmp_path / "run" / locks.FILE
  process = holder(path, "locks", "locks.held", ', "the folder"')
  with (
    pytest.raises(UsageError, match="the folder is in use by") as refused,
    locks.held(path, "the folder"),
  ):
    pass
  for part in (f"process {process.pid} on ", "since 20", "train", "--seed 3"):
    assert part in str(refused.value)
  process.kill()
  process.wait()
  assert path.exists()
  with locks.held(path, "the folder"):
    pass
  # The folder was the other's.
  assert list(tmp_path.rglob("*")) == [path.parent]


def test_a_failure_leaves_no_folder_that_was_made_for_the_lock(tmp_path):
  path = tmp_path / "a" / "b" / locks.FILE
  with pytest.raises(KeyError), locks.held(path, "it"):
    raise KeyError
  assert not list(tmp_path.iterdir())
  with pytest.raises(KeyError), locks.held(path, "it"):
    (tmp_path / "a" / "kept").touch()
    raise KeyError
  assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "kept"]
  with (
    pytest.raises(UsageError, match="it cannot be written: Not a directory"),
    locks.held(tmp_path / "a" / "kept" / "x" / locks.FILE, "it"),
  ):
    pass


def test_a_lock_that_comes_and_goes_is_one_holder_s_at_a_time(tmp_path):
  """Where each holder removes the file, and most of them the folder too."""
  path, inside, seen = tmp_path / "run" / locks.FILE, [], []

  def hold(number):
    for _ in range(100):
      try:
        with locks.held(path, "it"):
          inside.append(number)
          seen.append(len(inside))
          inside.remove(number)
          if number:
            raise KeyError
      except (KeyError, UsageError):
        pass

  threads = [threading.Thread(target=hold, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert set(seen) == {1}
  with locks.held(path, "it"):
    pass


def test_a_file_system_without_locks_is_warned_of(
  tmp_path, monkeypatch, capsys
):
  def flock(descriptor, how):
    raise OSError(locks.errno.ENOSYS, "Function not implemented")

  monkeypatch.setattr(locks.fcntl, "flock", flock)
  with locks.held(tmp_path / locks.FILE, "it"):
    pass
  shown = capsys.readouterr().err
  assert f"warning: {tmp_path} is on a file system without locks" in shown


def test_parts_of_killed_writers_are_removed_and_those_of_others_not(
  tmp_path, holder
):
  path = tmp_path / "results.json"
  killed, alive = (holder(path, "files", "files.replacing") for _ in range(2))
  killed.kill()
  killed.wait()
  assert len(list(tmp_path.iterdir())) == 2
  files.write_json(path, {"accuracy": 0.5})
  parts = [x.name for x in tmp_path.iterdir() if x != path]
  assert parts == [f".results.json.{alive.pid}.part"]
