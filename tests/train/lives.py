"""Lives of the program, each in a fork of one process that has all imported.

A life ends as it would, or by a fault at a file operation of a given number:
Python's own audit events tell of each file that is opened to be written, made,
renamed or removed below a folder, whichever library does it, and in whichever
thread. `python lives.py` reads requests, a line of JSON each, and answers each
with one.
"""

import atexit
from collections.abc import Mapping
import errno
import gc
import json
import mmap
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

_REPOSITORY = pathlib.Path(__file__).parents[2]
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
_DAY = 86_400


class Ended(NamedTuple):
  """How a life ended.

  Attributes:
    code: its exit code; negative: the signal that killed it.
    operations: on files that were counted.
    seconds: from its start.
    out, err: what it has told.
  """

  code: int
  operations: int
  seconds: float
  out: str
  err: str


class Lives:
  """Starts lives; a context.

  Args:
    environment: of all of them.
    driver: Python that runs before the program in each, and before its own.
  """

  def __init__(self, environment: Mapping[str, str], driver: str = ""):
    self._driver = driver
    self._process = subprocess.Popen(
      [sys.executable, str(pathlib.Path(__file__))],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      cwd=_REPOSITORY,
      env={**environment, "PYTHONPATH": str(_REPOSITORY)},
    )

  def __enter__(self) -> "Lives":
    return self

  def __exit__(self, *_: Any) -> None:
    assert self._process.stdin and self._process.stdout
    with self._process.stdin, self._process.stdout:
      pass
    self._process.wait()

  def start(
    self,
    root: pathlib.Path,
    *arguments: str,
    fault: str = "",
    at: int = 0,
    driver: str = "",
  ) -> int:
    """Starts the program, and tells the process.

    Args:
      root: the folder whose operations are counted.
      arguments: of the program.
      fault: "kill", "full" (the disk, from then on), "back" (the clock, by a
        day) or "interrupt" (Ctrl-C).
      at: the number of the operation before which it comes, from 1.
      driver: Python that runs before the program.
    """
    return self._asked(
      root=str(root),
      arguments=arguments,
      fault=fault,
      at=at,
      driver=f"{self._driver}\n{driver}",
    )

  def end(self, process: int) -> Ended:
    """Waits for the end of one."""
    return Ended(*self._asked(wait=process))

  def live(self, root: pathlib.Path, *arguments: str, **more: Any) -> Ended:
    """Starts one, as `start` does, and waits for its end."""
    return self.end(self.start(root, *arguments, **more))

  def _asked(self, **request: Any) -> Any:
    assert self._process.stdin and self._process.stdout
    print(json.dumps(request), file=self._process.stdin, flush=True)
    return json.loads(self._process.stdout.readline())


def _serve() -> None:
  # Most of the time of a short life goes to these.
  import matplotlib.backends.backend_agg
  import matplotlib.backends.backend_svg

  from train import __main__ as program
  from train.finished import export
  from train.run import loop
  from train.study import report, runs

  del matplotlib, export, loop, report, runs
  # To look through what is shared would be to copy it.
  gc.collect()
  gc.disable()
  gc.freeze()
  # A shell has its background jobs ignore it.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  started = {}
  for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
      _, status = os.waitpid(request["wait"], 0)
      start, count, out, err = started.pop(request["wait"])
      answer: Any = [
        *(os.waitstatus_to_exitcode(status), int(count[:])),
        *(time.monotonic() - start, out.read(), err.read()),
      ]
    else:
      # What a life tells is little enough for a pipe to hold; a full disk is
      # not felt in it, nor in memory.
      count = mmap.mmap(-1, 8)
      count[:] = b"0".ljust(8)
      out, err = os.pipe(), os.pipe()
      answer = os.fork()
      if not answer:
        _live(program, request, (out[1], err[1]), count)
      os.close(out[1])
      os.close(err[1])
      started[answer] = (
        *(time.monotonic(), count),
        *(os.fdopen(out[0]), os.fdopen(err[0])),
      )
    print(json.dumps(answer), flush=True)


def _live(
  program: Any,
  request: Mapping[str, Any],
  told: tuple[int, int],
  counter: mmap.mmap,
) -> None:
  from train.devices import launch

  launch.end_with_parent()
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for descriptor, pipe in zip((1, 2), told):
    os.dup2(pipe, descriptor)
  _install(request["root"], request["fault"], request["at"], counter)
  sys.argv = ["train", *request["arguments"]]
  try:
    exec(request["driver"], {})
    code = program.program()
  except SystemExit as end:
    code = end.code
  except BaseException:
    import traceback

    traceback.print_exc()
    code = 99
  # JAX waits there for the other processes of a run.
  atexit._run_exitfuncs()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _install(root: str, fault: str, at: int, counter: mmap.mmap) -> None:
  """Counts operations below a folder, and has the fault come before one."""
  count = 0
  fsync = os.fsync

  def operation(may_be_full: bool) -> None:
    nonlocal count
    count += 1
    counter[:] = str(count).ljust(8).encode()
    if not at or count < at:
      return
    if fault == "kill":
      os.kill(os.getpid(), signal.SIGKILL)
    if fault == "interrupt" and count == at:
      os.kill(os.getpid(), signal.SIGINT)
    if fault == "back" and count == at:
      now = time.time
      time.time = lambda: now() - _DAY
    if fault == "full":
      # What C++ and Rust write fails, too.
      resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
      if may_be_full:
        raise OSError(errno.ENOSPC, "No space left on device")

  def below(path: Any, folder: Any = -1) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
      return False
    path = os.fsdecode(path)
    if not os.path.isabs(path) and isinstance(folder, int) and folder >= 0:
      path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.abspath(path).startswith(root)

  def hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
      path, _, flags = arguments
      if isinstance(flags, int) and flags & _WRITES and below(path):
        operation(True)
    elif event in _CHANGES and below(
      arguments[0], arguments[-1] if len(arguments) > 1 else -1
    ):
      operation(event == "os.mkdir")

  def sync(descriptor: int) -> None:
    operation(True)
    fsync(descriptor)

  os.fsync = sync
  sys.addaudithook(hear)


if __name__ == "__main__":
  _serve()
