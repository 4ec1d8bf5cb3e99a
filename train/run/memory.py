"""Whether a run can fit the memory there is, before any of it is taken."""

import os
from typing import Any

import jax
import numpy as np

from ..errors import UsageError


def check(variables: Any, trained: Any) -> None:
  """Refuses a run whose arrays alone are more than a device holds.

  Activations come on top, and are not counted: `compile` tells what they take.

  Args:
    variables: shapes of the frozen model, with shardings if there is a mesh.
    trained: shapes of the training state, likewise.

  Raises:
    UsageError: with both sizes, and what there is.
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
  """Bytes of a tree's arrays on the device that holds the most of them.

  Args:
    tree: of arrays or `jax.ShapeDtypeStruct`; whole without a sharding.
  """

  def of(x):
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return int(np.prod(shape, dtype=object)) * x.dtype.itemsize

  return sum(map(of, jax.tree.leaves(tree)))


def _room() -> int | None:
  """Bytes that one device has; None if it does not say."""
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    # All of the process's share the host's.
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // jax.local_device_count()
  return (device.memory_stats() or {}).get("bytes_limit")


def _gib(count: int) -> str:
  return f"{count / 2**30:,.2f} GiB"
