"""Bottleneck adapters: a small network, added to its input."""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bilora_jax import _nodes


@_nodes.register
@dataclasses.dataclass(frozen=True)
class Bottleneck:
  r"""The function :math:`x + \sigma(x D + d) U + u`.

  A bottleneck perturbs no weight, and the norm of its output depends on the
  inputs. Its norm in a ball is the norm of its parameters, all four fields
  together: the radius bounds the distance of the parameters from zero, which
  is not in the units of the weights of other nodes.

  Attributes:
    down: D, `(*batch, width, r)`; batch axes are stacked layers.
    down_bias: d, `(*batch, r)`.
    up: U, `(*batch, r, width)`.
    up_bias: u, `(*batch, width)`.
    degree: 1: the norm is linear in the parameters.

  References:
    Houlsby et al, `Parameter-Efficient Transfer Learning for NLP
    <https://arxiv.org/abs/1902.00751>`_, 2019, section 2.1.
  """

  degree: ClassVar[int] = 1

  down: Any
  down_bias: Any
  up: Any
  up_bias: Any

  def __call__(
    self,
    x: jax.Array,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu,
  ) -> jax.Array:
    """Adds the network's output to its input.

    Args:
      x: `(*rows, width)`.
      activation: activation function of the hidden layer.

    Returns:
      An array like `x`, in its dtype.
    """
    down, down_bias, up, up_bias = (
      p.astype(x.dtype)
      for p in (self.down, self.down_bias, self.up, self.up_bias)
    )
    return x + activation(x @ down + down_bias) @ up + up_bias

  def squared_norm(self) -> jax.Array:
    """The sum of all parameters' squares, `(*batch)`, in float32."""
    batch = self.down_bias.ndim - 1
    return sum(
      jnp.sum(jnp.square(p.astype(jnp.float32)), axis=range(batch, p.ndim))
      for p in (self.down, self.down_bias, self.up, self.up_bias)
    )  # pyright: ignore[reportReturnType]
