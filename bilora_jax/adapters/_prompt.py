"""Soft prompts: trained vectors in front of a sequence."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bilora_jax import _nodes


@_nodes.register
@dataclasses.dataclass(frozen=True)
class SoftPrompt:
  """Trained vectors in front of an embedded sequence, in place of tokens.

  A prompt perturbs the embedded input, and its norm is the norm of `tokens`.

  Attributes:
    tokens: `(*batch, length, width)`; batch axes are stacked layers.
    degree: 1.

  References:
    Lester et al, `The Power of Scale for Parameter-Efficient Prompt Tuning
    <https://arxiv.org/abs/2104.08691>`_, 2021.
  """

  degree: ClassVar[int] = 1

  tokens: Any

  def __call__(self, x: jax.Array) -> jax.Array:
    """Puts the prompt in front of a sequence.

    Args:
      x: the embedded sequence, `(*rows, length, width)`.

    Returns:
      `(*rows, prompt's length + length, width)`, in the dtype of `x`.
    """
    tokens = self.tokens.astype(x.dtype)
    tokens = jnp.broadcast_to(tokens, (*x.shape[:-2], *tokens.shape[-2:]))
    return jnp.concatenate([tokens, x], axis=-2)

  def squared_norm(self) -> jax.Array:
    """The square of the norm of `tokens`, `(*batch)`, in float32."""
    tokens = self.tokens.astype(jnp.float32)
    return jnp.sum(jnp.square(tokens), axis=(-2, -1))
