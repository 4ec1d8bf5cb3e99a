"""TPUs and GPUs that this machine need not have, and their memory."""

import os
import pathlib
import re
from typing import Any

from jax.experimental import topologies

from ..errors import UsageError

NAMES = (
  *("v4:2x2x4", "v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:2x2x4"),
  *("v5p:4x4x4", "v6e:4x4", "v6e:16x16", "tpu7x:2x2x2"),
  *("a100:8", "h100:8", "h100:4x8", "h200:8"),
)
"""Examples of topologies; the compilers know more of the same form."""

GIB = 2**30

# The part of a TPU's memory that the compiler allows a program, in GiB. Its
# error message has this number when a program needs more. The makers name 32,
# 16, 95, 32 and 192 GB for a chip; a chip of v4 or tpu7x is two devices here.
_USABLE = {
  "TPU v4": 15.25,
  "TPU v5 lite": 15.75,
  "TPU v5": 95.74,
  "TPU v6 lite": 31.25,
  "TPU7x": 94.75,
}
# The memory of GPUs in GiB. JAX takes three quarters of it by default.
_GPU_MEMORY = {
  "NVIDIA A100-SXM4-80GB": 79.25,
  "NVIDIA H100 80GB HBM3": 79.65,
  "NVIDIA H200": 140.40,
}
_GPU_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"

_GPUS = pathlib.Path(__file__).with_name("gpus")
_GPU_NAME = re.compile(r"(a100|h100|h200):(?:([1-9]\d{0,3})x)?([1-9]\d?)")
# Without a GPU, XLA cannot measure which kernel is fastest.
WITHOUT_GPU: dict[str, Any] = {"xla_gpu_autotune_level": 0}
"""Options of XLA for a GPU that is not there."""

# libtpu asks the machine which TPU it has, and refuses a second process.
# Neither matters here, because no TPU is used.
_WITHOUT_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


def devices(name: str) -> list[Any]:
  """Returns the devices of a topology, for a mesh and for the compiler.

  Args:
    name: for TPUs, the generation and the chips along each axis, such as
      `v5e:4x4`. For GPUs, the GPUs of one machine, such as `h100:8`, or the
      machines and the GPUs of each, such as `h100:4x8`.

  Raises:
    UsageError: if the compiler is not installed or has no such topology.
  """
  if gpus := _GPU_NAME.fullmatch(name):
    return _gpus(name, *gpus.groups())
  if name[:1] in ("a", "h"):
    raise UsageError(
      "--topology with GPUs must be a100, h100 or h200 and how many of them, "
      "such as h100:8, or the machines and the GPUs of each, such as "
      f"h100:4x8; got --topology {name}."
    )
  for variable, value in _WITHOUT_TPU.items():
    os.environ.setdefault(variable, value)
  try:
    description = topologies.get_topology_desc(
      platform="tpu", topology_name=name
    )
  except Exception as error:  # JAX raises types with no common base
    text = str(error)
    if "not installed" in text or "libtpu" in text:
      raise UsageError(
        f"--topology {name} needs the compiler for TPUs, which works without "
        "a TPU: pip install 'jax[tpu]' installs the libtpu that goes with "
        f"this JAX. JAX says: {_sentence(text)}"
      ) from error
    raise UsageError(
      f"there is no topology {name!r}; there are {', '.join(NAMES)}, and other "
      f"sizes of these. The compiler says: {_sentence(text)}"
    ) from error
  return list(description.devices)


def is_gpu(name: str) -> bool:
  """Whether a topology has GPUs."""
  return _GPU_NAME.fullmatch(name) is not None


def _gpus(name: str, kind: str, machines: str | None, each: str) -> list[Any]:
  # Without this variable, the plugin requires a driver.
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  try:
    description = topologies.get_topology_desc(
      name,
      platform="cuda",
      topology=f"1x{machines or 1}x{each}",
      target_config=(_GPUS / f"{kind}.textproto").read_text(),
    )
  except Exception as error:  # JAX raises types with no common base
    raise UsageError(
      f"--topology {name} needs JAX's plugin for CUDA, which works without a "
      f"GPU: pip install 'jax[cuda12]'. JAX says: {_sentence(str(error))}"
    ) from error
  return list(description.devices)


def memory(device: Any) -> int | None:
  """Returns the bytes of a device that a program may use; None if unknown."""
  if device.device_kind in _USABLE:
    return int(_USABLE[device.device_kind] * GIB)
  if device.device_kind in _GPU_MEMORY:
    text = os.environ.get(_GPU_SHARE) or "0.75"
    try:
      share = float(text)
    except ValueError:
      share = 0.0
    if not 0 < share <= 1:
      raise UsageError(
        f"{_GPU_SHARE} is a share of a GPU's memory, above 0 and at most 1; "
        f"got {text!r}."
      )
    return int(share * _GPU_MEMORY[device.device_kind] * GIB)
  return (device.memory_stats() or {}).get("bytes_limit")


def _sentence(text: str) -> str:
  return text.strip().splitlines()[0].rstrip(".") + "."
