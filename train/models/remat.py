"""What a layer's backward pass computes again, to save memory."""

from collections.abc import Callable
import math
from typing import Any

from flax import linen as nn
import jax

CHOICES = ("none", "full", "dots", "base", "offload")

# Products of adapters are wider than the rank that they sum over by more than
# this; layers of models are not.
_WIDER = 16


def layer(
  module: type[nn.Module], what: str, in_scan: bool = False
) -> type[nn.Module]:
  """The layer, with less of its forward pass kept for the backward pass.

  Args:
    module: the class of a layer.
    what: to compute again: 'none'; 'full', all of the layer; 'dots', all but
      the products with weights, which are kept; 'base', all but those with the
      base's weights: 'dots' keeps x W and x A B of an adapted weight, though
      their sum would do, and x A B is cheap; 'offload', as 'base', but what is
      kept waits in the host's memory.
    in_scan: whether the layer is run in a scan.

  Raises:
    ValueError: if `what` is none of these.
  """
  if what not in CHOICES:
    raise ValueError(
      f"remat must be one of {', '.join(CHOICES)}, got {what!r}."
    )
  if what == "none":
    return module
  policies = jax.checkpoint_policies
  policy: Any = {
    "full": None,
    "dots": policies.dots_with_no_batch_dims_saveable,
    "base": _of_base(policies.dots_with_no_batch_dims_saveable),
    "offload": _of_base(
      policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    ),
  }[what]
  # In a scan, XLA cannot undo it by sharing what is computed twice.
  return nn.remat(module, prevent_cse=not in_scan, policy=policy)


def _of_base(policy: Callable[..., Any]) -> Callable[..., Any]:
  """The policy, but for products over an adapter's rank: they are not kept."""

  def of_base(primitive, *avals, **params):
    if primitive.name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      lhs, rhs = avals
      summed = math.prod(lhs.shape[i] for i in contracted)
      if rhs.size // summed > _WIDER * summed:
        return False
    return policy(primitive, *avals, **params)

  return of_base
