"""What T5s and decoders compute in float32, whatever their matmuls are in."""

from typing import Any

from flax import linen as nn
import jax
from jax import typing
import jax.numpy as jnp


def rms_norm(
  epsilon: float, param_dtype: typing.DTypeLike, name: str | None = None
) -> nn.RMSNorm:
  """A norm without mean and bias; what it returns is float32 too."""
  return nn.RMSNorm(
    epsilon=epsilon, dtype=jnp.float32, param_dtype=param_dtype, name=name
  )


def residual(x: jax.Array, y: jax.Array) -> jax.Array:
  """`x + y`, rounded once, to the dtype of x."""
  return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)


def product(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: Any,
  precision: Any = None,
  **kwargs: Any,
) -> jax.Array:
  """`jax.lax.dot_general` with float32 sums and result: for logits."""
  # Looked up at each call, since Qwix puts its own function there.
  return jax.lax.dot_general(
    lhs,
    rhs,
    dimension_numbers,
    precision=precision,
    preferred_element_type=jnp.float32,
  )
