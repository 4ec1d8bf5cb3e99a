"""Parts of what is differentiated, that estimators perturb."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import bilora_jax

WEIGHTS = {"trained": False, "weights": True}
"""The frozen weights with adapters, of `Method.differentiated`'s result."""
INPUT_AXES = (-2,)
"""Kernels here are (in, out), under scan with the layers in front."""


def primary(trained: Any) -> dict[str, bool]:
  """What LoRA-SAM and its kin perturb: adapters, and no head."""
  return {part: part == "primary" for part in trained}


def kernels(adapted: "bilora_jax.Adapted") -> Callable[[Any], Any]:
  """From the variables to the weights with adapters, nested as they are."""
  from flax import traverse_util

  paths = {tuple(path.split("/")) for path in adapted.targets}

  def select(variables):
    flat = traverse_util.flatten_dict(variables["params"])
    return traverse_util.unflatten_dict({path: flat[path] for path in paths})

  return select
