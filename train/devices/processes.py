"""Several processes that run the same program, on as many machines."""

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import os
import re
import signal
import sys
from typing import NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np

from .. import command
from ..errors import LostError, RunError, UsageError

# Whoever starts the processes of a run says in these how many there are: srun,
# mpirun, and what starts TPU pods on Kubernetes.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# Digits of other scripts, and a NUL, end the process in JAX's own C++.
_ADDRESS = re.compile(r"[!-~]+:[0-9]{1,5}")
_MOST = 2**20
_TPU_HOSTS = "TPU_WORKER_HOSTNAMES"


def in_cluster() -> bool:
  """Whether this process was started as one of several."""
  counts = [os.environ.get(name, "") for name in _COUNTS]
  hosts = os.environ.get(_TPU_HOSTS, "").count(",") + 1
  return hosts > 1 or any(x.isdigit() and int(x) > 1 for x in counts)


def join(
  coordinator: str | None, processes: int | None, index: int | None
) -> None:
  """Joins the other processes; before anything touches a device.

  Args:
    coordinator: HOST:PORT of process 0; "auto" where JAX can find the cluster
      by itself (Slurm, Open MPI, TPU, Kubernetes); None for that if
      `in_cluster`, and else for one process.
    processes: how many there are; None for "auto".
    index: which one this is; None for "auto".

  Raises:
    UsageError: if the three do not fit each other, or there is no cluster.
    RunError: if the others cannot be reached.
  """
  if coordinator is None and processes is None and index is None:
    if not in_cluster():
      return
    coordinator = "auto"
  if coordinator == "auto" and processes is None and index is None:
    try:
      jax.distributed.initialize()
    except ValueError as error:
      raise UsageError(
        "--coordinator auto is for clusters that JAX knows, and JAX finds "
        "none; give --coordinator HOST:PORT, --num-processes and "
        f"--process-id. JAX says: {error}"
      ) from error
    return
  if coordinator is None or processes is None or index is None:
    raise UsageError(
      "--coordinator HOST:PORT, --num-processes and --process-id must be "
      "given together, or none of them, or --coordinator auto alone; got "
      f"{coordinator}, {processes} and {index}."
    )
  if not _ADDRESS.fullmatch(coordinator) or not (
    0 < int(coordinator.rpartition(":")[2]) < 2**16
  ):
    raise UsageError(
      "--coordinator must be HOST:PORT, the address of process 0, or auto; "
      f"got {coordinator!r}."
    )
  if not 0 <= index < processes <= _MOST:
    raise UsageError(
      "--process-id must be from 0 to --num-processes - 1, and "
      f"--num-processes at most {_MOST:,}; got {index} of {processes}."
    )
  try:
    jax.distributed.initialize(coordinator, processes, index)
  except RuntimeError as error:
    raise RunError(
      f"process {index} of {processes} could not join at {coordinator}: "
      f"{str(error).splitlines()[0]}"
    ) from error


def is_first() -> bool:
  """Whether this is the process that writes and prints."""
  return jax.process_index() == 0


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
  """Lets process 0 through, and then the others: they find what it made."""
  if not is_first():
    multihost_utils.sync_global_devices("first_before_others")
  try:
    yield
  finally:
    if is_first():
      multihost_utils.sync_global_devices("first_before_others")


def any_of(flag: bool) -> bool:
  """Whether it is set in any process; all have to ask."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def summed(values: np.ndarray) -> np.ndarray:
  """The sum of all processes' arrays; all have to give one, of one shape."""
  if jax.process_count() == 1:
    return values
  return np.sum(multihost_utils.process_allgather(values), axis=0)


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


@contextlib.contextmanager
def lost_ones_reported() -> Iterator[None]:
  """Has the loss of another process told in a sentence.

  Raises:
    LostError: if the others cannot be reached any more.
  """
  try:
    yield
  except (jax.errors.JaxRuntimeError, RunError) as error:
    # What is written of a checkpoint is agreed on by all, too.
    found = error.__cause__ if isinstance(error, RunError) else error
    lost = isinstance(found, jax.errors.JaxRuntimeError)
    if (
      not lost or jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(found)
    ):
      raise
    raise LostError(
      "another process is gone, or cannot be reached; start all of them "
      f"again: {command.RESUMES} JAX says: {str(found).splitlines()[0][:300]}"
    ) from error


def leave(code: int) -> NoReturn:
  """Ends this process at once, where others are lost.

  At an ordinary exit JAX waits for all of them, and then aborts.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
