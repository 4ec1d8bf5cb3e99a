"""What a layer's backward pass computes again, to save memory."""

from collections.abc import Callable
import math
from typing import Any

from flax import linen as nn
import jax

CHOICES = ("none", "full", "dots", "base", "offload")

# A product is an adapter's if its output is more than this many times wider
# than the sum inside it, which has the rank. The layers of models are narrower.
_WIDER = 16


def layer(
  module: type[nn.Module], what: str, in_scan: bool = False
) -> type[nn.Module]:
  """Returns a layer that keeps less of its forward pass for the backward pass.

  Args:
    module: the class of a layer.
    what: what the backward pass computes again.
      'none': nothing.
      'full': the whole layer.
      'dots': everything except products with weights, which are kept.
      'base': everything except products with the base's weights. For an
      adapted weight, 'dots' keeps both x W and x A B; 'base' keeps only x W,
      because x A B is cheap.
      'offload': as 'base', but the kept products are in the host's memory.
    in_scan: whether the layer runs in a scan.

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
  # Outside of a scan, XLA would find the repeated computations and share them.
  return nn.remat(module, prevent_cse=not in_scan, policy=policy)


def _of_base(policy: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the policy, changed so that adapters' products are not kept."""

  def of_base(primitive, *avals, **params):
    if primitive.name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      lhs, rhs = avals
      summed = math.prod(lhs.shape[i] for i in contracted)
      if rhs.size // summed > _WIDER * summed:
        return False
    return policy(primitive, *avals, **params)

  return of_base
