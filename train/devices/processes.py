"""Several processes that run the same program, usually on several machines."""

from collections.abc import Iterator
import contextlib
import re

import jax
from jax.experimental import multihost_utils
import numpy as np

from .. import command
from ..errors import LostError, RunError, UsageError
from . import launch

# JAX's C++ code aborts the process for non-ASCII digits and for a NUL.
_ADDRESS = re.compile(r"[!-~]+:[0-9]{1,5}")
_MOST = 2**20


def join(
  coordinator: str | None, processes: int | None, index: int | None
) -> None:
  """Joins the other processes. Call it before anything uses a device.

  Args:
    coordinator: HOST:PORT of process 0; or "auto", if JAX can find the cluster
      by itself (Slurm, Open MPI, TPU, Kubernetes). None means "auto" if
      `launch.in_cluster`, and else a single process.
    processes: the number of processes; None for "auto".
    index: the number of this process, from 0; None for "auto".

  Raises:
    UsageError: if the three do not fit each other, or there is no cluster.
    RunError: if the other processes cannot be reached.
  """
  if coordinator is None and processes is None and index is None:
    if not launch.in_cluster():
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
  """Whether this is process 0, which writes and prints."""
  return jax.process_index() == 0


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
  """Runs the context in process 0 first, so that the others find its files."""
  if not is_first():
    multihost_utils.sync_global_devices("first_before_others")
  try:
    yield
  finally:
    if is_first():
      multihost_utils.sync_global_devices("first_before_others")


def any_of(flag: bool) -> bool:
  """Whether the flag is set in any process; all processes must call this."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def summed(values: np.ndarray) -> np.ndarray:
  """Returns the sum of all processes' arrays.

  All processes must call this, with arrays of the same shape.
  """
  if jax.process_count() == 1:
    return values
  return np.sum(multihost_utils.process_allgather(values), axis=0)


@contextlib.contextmanager
def lost_ones_reported() -> Iterator[None]:
  """Turns JAX's error for a lost process into a LostError.

  Raises:
    LostError: if another process cannot be reached any more.
  """
  try:
    yield
  except (jax.errors.JaxRuntimeError, RunError) as error:
    # All processes write a checkpoint together, so a save can fail in the same
    # way; its RunError has JAX's error as its cause.
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
