"""Operations that T5s and decoders always compute in float32."""

from typing import Any

from flax import linen as nn
import jax
from jax import typing
import jax.numpy as jnp


def rms_norm(
  epsilon: float, param_dtype: typing.DTypeLike, name: str | None = None
) -> nn.RMSNorm:
  """Returns a norm without mean and bias, whose output is float32."""
  return nn.RMSNorm(
    epsilon=epsilon, dtype=jnp.float32, param_dtype=param_dtype, name=name
  )


class OffsetRMSNorm(nn.Module):
  """Gemma's norm: as `rms_norm`, but the scale is 1 + the parameter.

  The scale is float32, because bfloat16 would round it to steps of 2^-7.
  """

  epsilon: float
  param_dtype: typing.DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param(
      "scale", nn.initializers.zeros, x.shape[-1:], self.param_dtype
    )
    norm = nn.RMSNorm(self.epsilon, dtype=jnp.float32, use_scale=False)
    return norm(x) * (1.0 + scale.astype(jnp.float32))


def residual(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns `x + y`, rounded only once, to the dtype of x."""
  return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)


def product(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: Any,
  precision: Any = None,
  **kwargs: Any,
) -> jax.Array:
  """`jax.lax.dot_general` with float32 sums and result: for logits."""
  # Looked up at each call, because Qwix replaces this function.
  return jax.lax.dot_general(
    lhs,
    rhs,
    dimension_numbers,
    precision=precision,
    preferred_element_type=jnp.float32,
  )
