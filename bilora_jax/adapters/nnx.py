"""Soft prompts and bottlenecks as modules of `flax.nnx`.

Each module's node is the value of an `AdapterVariable`, which is not an
`nnx.Param`, so the model's parameters do not change::

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
  """A variable that holds an adapter's node."""


class SoftPrompt(nnx.Module):
  """Trained vectors in front of an embedded sequence.

  Args:
    length: length of the prompt.
    width: size of an embedded token.
    initializer: initializer of the tokens, `(length, width)` float32.
    rngs: random keys, with a stream `params`.
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
    """Maps `(*rows, n, width)` to `(*rows, length + n, width)`."""
    return self.prompt.get_value()(x)


class Bottleneck(nnx.Module):
  """A small network with one hidden layer, added to its input.

  Args:
    outer: size of the input.
    width: size of the hidden layer.
    activation: activation function of the hidden layer.
    initializer: initializer of the first kernel; all other parameters start at
      zero, so that the module adds zero at first.
    rngs: random keys, with a stream `params`.
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
    """Maps `(*rows, outer)` to the same shape."""
    return self.bottleneck.get_value()(x, self.activation)
