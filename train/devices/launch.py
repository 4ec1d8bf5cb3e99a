"""The start and the end of a process; this module does not import JAX."""

from collections.abc import Callable
import ctypes
import os
import signal
import sys
from typing import NoReturn

from .. import command

# srun, mpirun and the launchers of TPU pods set these variables to the number
# or the names of the processes of a run.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_TPU_HOSTS = "TPU_WORKER_HOSTNAMES"


def in_cluster() -> bool:
  """Whether this process was started as one of several."""
  counts = [os.environ.get(name, "") for name in _COUNTS]
  hosts = os.environ.get(_TPU_HOSTS, "").count(",") + 1
  return hosts > 1 or any(x.isdigit() and int(x) > 1 for x in counts)


def watched(run: Callable[[], int]) -> int:
  """Runs a function in a child process, and explains an end by a signal.

  If a process loses another one for 100 seconds, JAX aborts it from one of
  JAX's own threads. Python gets no exception that could explain the end.

  Args:
    run: a function that returns an exit status.

  Returns:
    In the child, the status of the function. In the parent, the child's status;
    1 if JAX aborted it; 128 + the signal if another signal ended it.
  """
  child = os.fork()
  if not child:
    end_with_parent()
    return run()
  # The terminal sends Ctrl-C to both processes. A scheduler sends SIGTERM only
  # to the parent.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  if status == -signal.SIGABRT:
    print(
      "error: JAX aborted this process, most likely because another one is "
      f"gone (see above); start all of them again: {command.RESUMES}",
      file=sys.stderr,
    )
    return 1
  if status < 0:
    print(
      f"error: this process was ended by {signal.Signals(-status).name}, "
      "which happens when memory is short; start all processes again: "
      f"{command.RESUMES}",
      file=sys.stderr,
    )
    return 128 - status
  return status


def end_with_parent() -> None:
  """Makes Linux end this process when its parent ends."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def leave(code: int) -> NoReturn:
  """Ends this process at once, when other processes are lost.

  At an ordinary exit, JAX would wait for the other processes and then abort.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
