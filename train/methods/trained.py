"""Selects the arrays that estimators of the gradient perturb."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import bilora_jax

WEIGHTS = {"trained": False, "weights": True}
"""The mask of the adapted frozen weights in `Method.differentiated`."""
INPUT_AXES = (-2,)
"""The input axis of kernels (in, out), or (layers, in, out) under `nn.scan`."""


def primary(trained: Any) -> dict[str, bool]:
  """Returns the mask of LoRA-SAM and others: the primary, without a head."""
  return {part: part == "primary" for part in trained}


def kernels(adapted: "bilora_jax.Adapted") -> Callable[[Any], Any]:
  """Returns a function that selects the adapted weights from the variables.

  The weights are nested as in the parameters.
  """
  from flax import traverse_util

  paths = {tuple(path.split("/")) for path in adapted.targets}

  def select(variables):
    flat = traverse_util.flatten_dict(variables["params"])
    return traverse_util.unflatten_dict({path: flat[path] for path in paths})

  return select
