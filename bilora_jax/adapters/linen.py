"""Soft prompts and bottlenecks as modules of `flax.linen`.

Each module's node is a variable of the collection `adapters`, so the model's
parameters do not change::

  variables = model.init(key, x)
  primary = variables['adapters']
  auxiliary = optax.tree.zeros_like(primary)
  both = {**variables, 'adapters': optax.tree.add(primary, auxiliary)}
  y = model.apply(both, x)

`bilora` trains `{'primary': primary, 'auxiliary': auxiliary}`.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from bilora_jax.adapters import _bottleneck, _prompt

COLLECTION = "adapters"
"""The collection of the variables that holds the nodes."""


class SoftPrompt(nn.Module):
  """Trained vectors in front of an embedded sequence.

  Attributes:
    length: length of the prompt.
    initializer: initializer of its tokens, `(length, width)` float32.
  """

  length: int
  initializer: Callable[..., jax.Array] = jax.nn.initializers.normal(0.02)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `(*rows, n, width)` to `(*rows, length + n, width)`."""

    def new():
      shape = (self.length, x.shape[-1])
      return _prompt.SoftPrompt(
        self.initializer(self.make_rng("params"), shape)
      )

    return self.variable(COLLECTION, "prompt", new).value(x)


class Bottleneck(nn.Module):
  """A small network with one hidden layer, added to its input.

  Attributes:
    width: size of the hidden layer.
    activation: activation function of the hidden layer.
    initializer: initializer of the first kernel; all other parameters start at
      zero, so that the module adds zero at first.
  """

  width: int
  activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu
  initializer: Callable[..., jax.Array] = jax.nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps `(*rows, n)` to the same shape."""

    def new() -> Any:
      outer, inner = x.shape[-1], self.width
      key = self.make_rng("params")
      return _bottleneck.Bottleneck(
        self.initializer(key, (outer, inner)),
        jnp.zeros(inner),
        jnp.zeros((inner, outer)),
        jnp.zeros(outer),
      )

    node = self.variable(COLLECTION, "bottleneck", new).value
    return node(x, self.activation)
