"""What a layer's backward pass computes again, to save memory."""

from typing import Any

from flax import linen as nn
import jax

CHOICES = ("none", "full", "dots", "offload")


def layer(
  module: type[nn.Module], what: str, in_scan: bool = False
) -> type[nn.Module]:
  """The layer, with less of its forward pass kept for the backward pass.

  Args:
    module: the class of a layer.
    what: to compute again: 'none'; 'full', all of the layer; 'dots', all but
      the products with weights, which are kept; 'offload', as 'dots', but they
      wait in the host's memory.
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
  policy: Any = None
  if what == "dots":
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  elif what == "offload":
    policy = jax.checkpoint_policies.offload_dot_with_no_batch_dims(
      "device", "pinned_host"
    )
  # In a scan, XLA cannot undo it by sharing what is computed twice.
  return nn.remat(module, prevent_cse=not in_scan, policy=policy)
