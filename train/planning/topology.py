"""TPU topologies without a TPU, and what memory their chips have."""

import os
from typing import Any

from jax.experimental import topologies

from ..errors import UsageError

NAMES = (
  *("v4:2x2x4", "v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:2x2x4"),
  *("v5p:4x4x4", "v6e:4x4", "v6e:16x16", "tpu7x:2x2x2"),
)
"""Some of those that the compiler knows; others are made in the same way."""

GIB = 2**30

# What the compiler lets a program have of one device's memory, in GiB: it says
# so when one asks for more. Their makers name 32, 16, 95, 32 and 192 GB a chip;
# one of v4 and of tpu7x is two devices here.
_USABLE = {
  "TPU v4": 15.25,
  "TPU v5 lite": 15.75,
  "TPU v5": 95.74,
  "TPU v6 lite": 31.25,
  "TPU7x": 94.75,
}

# It asks the machine which TPU it is, and refuses a second process: neither
# matters where none is used.
_WITHOUT_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


def devices(name: str) -> list[Any]:
  """The devices of a topology, to build a mesh of and to compile for.

  Args:
    name: as `v5e:4x4`, the generation and the chips along each axis.

  Raises:
    UsageError: if the compiler is not installed or has no such topology.
  """
  for variable, value in _WITHOUT_TPU.items():
    os.environ.setdefault(variable, value)
  try:
    description = topologies.get_topology_desc(
      platform="tpu", topology_name=name
    )
  except Exception as error:  # JAX has no narrower one in common
    text = str(error)
    if "not installed" in text or "libtpu" in text:
      raise UsageError(
        f"--topology {name} needs the compiler for TPUs, which is to be had "
        "without a TPU: pip install 'jax[tpu]' installs the libtpu that goes "
        f"with this JAX. JAX says: {_sentence(text)}"
      ) from error
    raise UsageError(
      f"there is no topology {name!r}; there are {', '.join(NAMES)}, and other "
      f"sizes of these. The compiler says: {_sentence(text)}"
    ) from error
  return list(description.devices)


def memory(device: Any) -> int | None:
  """The bytes of a device that a program may use, if that is known."""
  if device.device_kind in _USABLE:
    return int(_USABLE[device.device_kind] * GIB)
  return (device.memory_stats() or {}).get("bytes_limit")


def _sentence(text: str) -> str:
  return text.strip().splitlines()[0].rstrip(".") + "."
