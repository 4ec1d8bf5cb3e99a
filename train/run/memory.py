"""Checks that a run fits into memory, before memory is allocated."""

import os
from typing import Any

import jax
import numpy as np

from ..errors import UsageError


def check(variables: Any, trained: Any) -> None:
  """Refuses a run whose arrays do not fit into a device's memory.

  Activations are not counted; the command `compile` reports their size.

  Args:
    variables: the shapes of the frozen model, with shardings if there is a
      mesh.
    trained: the shapes of the training state, with shardings if there is a
      mesh.

  Raises:
    UsageError: if the arrays do not fit. The message has their sizes and the
      size of the memory.
  """
  base, state = bytes_on_device(variables), bytes_on_device(trained)
  room = _room()
  if room is None or base + state <= room:
    return
  raise UsageError(
    f"the model does not fit: its weights take {_gib(base)} of a device, the "
    f"trained parameters and their optimizer {_gib(state)}, and the device "
    f"({jax.local_devices()[0].device_kind}) has {_gib(room)}. A smaller "
    "--base-dtype, or more devices along fsdp in --mesh, may help."
  )


def bytes_on_device(tree: Any) -> int:
  """Returns the bytes of a tree's arrays on the device that holds the most.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`. An array without a sharding is whole
      on the device.
  """

  def of(x):
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return int(np.prod(shape, dtype=object)) * x.dtype.itemsize

  return sum(map(of, jax.tree.leaves(tree)))


def _room() -> int | None:
  """Returns the memory of a device in bytes; None if it is unknown."""
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    # All CPU devices of the process share the host's memory.
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // jax.local_device_count()
  return (device.memory_stats() or {}).get("bytes_limit")


def _gib(count: int) -> str:
  return f"{count / 2**30:,.2f} GiB"
