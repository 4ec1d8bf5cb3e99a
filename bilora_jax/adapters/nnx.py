"""Soft prompts and bottlenecks as modules of `flax.nnx`.

Their node is the value of an `AdapterVariable`, which is no `nnx.Param`, so the
model's parameters stay as they are::

  graphdef, primary, rest = nnx.split(model, adapters.nnx.AdapterVariable, ...)
  auxiliary = optax.tree.zeros_like(primary)
  model = nnx.merge(graphdef, optax.tree.add(primary, auxiliary), rest)

`bilora` trains `{'primary': primary, 'auxiliary': auxiliary}`.
"""

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp

from bilora_jax.adapters import _bottleneck, _prompt

_TOKENS = jax.nn.initializers.normal(0.02)
_KERNEL = jax.nn.initializers.lecun_normal()


class AdapterVariable(nnx.Variable):
  """What holds an adapter's node."""


class SoftPrompt(nnx.Module):
  """Trained vectors in front of an embedded sequence.

  Args:
    length: of the prompt.
    width: of an embedded token.
    initializer: of the tokens, `(length, width)` float32.
    rngs: with a stream `params`.
  """

  def __init__(
    self,
    length: int,
    width: int,
    *,
    initializer: Callable[..., jax.Array] = _TOKENS,
    rngs: nnx.Rngs,
  ):
    tokens = initializer(rngs.params(), (length, width))
    self.prompt = AdapterVariable(_prompt.SoftPrompt(tokens))

  def __call__(self, x: jax.Array) -> jax.Array:
    """`(*rows, n, width)` to `(*rows, length + n, width)`."""
    return self.prompt.get_value()(x)


class Bottleneck(nnx.Module):
  """A small network with one hidden layer, added to its input.

  Args:
    outer: the size of the input.
    width: of the hidden layer.
    activation: of the hidden layer.
    initializer: of the kernel before it; all else starts at zero, and nothing
      is added at first.
    rngs: with a stream `params`.
  """

  def __init__(
    self,
    outer: int,
    width: int,
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu,
    initializer: Callable[..., jax.Array] = _KERNEL,
    rngs: nnx.Rngs,
  ):
    self.activation = activation
    self.bottleneck = AdapterVariable(
      _bottleneck.Bottleneck(
        initializer(rngs.params(), (outer, width)),
        jnp.zeros(width),
        jnp.zeros((width, outer)),
        jnp.zeros(outer),
      )
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """`(*rows, outer)` to the same."""
    return self.bottleneck.get_value()(x, self.activation)
