"""How a process was started, and how it ends: what needs no JAX."""

from collections.abc import Callable
import ctypes
import os
import signal
import sys
from typing import NoReturn

from .. import command

# Whoever starts the processes of a run says in these how many there are: srun,
# mpirun, and what starts TPU pods on Kubernetes.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_TPU_HOSTS = "TPU_WORKER_HOSTNAMES"


def in_cluster() -> bool:
  """Whether this process was started as one of several."""
  counts = [os.environ.get(name, "") for name in _COUNTS]
  hosts = os.environ.get(_TPU_HOSTS, "").count(",") + 1
  return hosts > 1 or any(x.isdigit() and int(x) > 1 for x in counts)


def watched(run: Callable[[], int]) -> int:
  """Runs a function in a child process, whose end by a signal is explained.

  JAX aborts a process that misses another for 100 seconds, from a thread of its
  own, where no exception of Python's could tell what was the matter.

  Args:
    run: returns an exit status.

  Returns:
    In the child, what the function does. In the parent the child's status, or
    128 and the signal that ended it; 1 if JAX aborted it.
  """
  child = os.fork()
  if not child:
    end_with_parent()
    return run()
  # The terminal sends Ctrl-C to both; a scheduler its signal to one of them.
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
  """Has Linux end this process when its parent is killed."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def leave(code: int) -> NoReturn:
  """Ends this process at once, where others are lost.

  At an ordinary exit JAX waits for all of them, and then aborts.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
