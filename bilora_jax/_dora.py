"""DoRA: the adapted weight with its columns scaled to trained magnitudes."""

from typing import Any

import jax
import jax.numpy as jnp

from bilora_jax import _explicit
from bilora_jax._factors import Factors

SUFFIX = "_magnitude"
"""Suffix of a kernel's name in `extra`, where its magnitude is."""


def column_norms(kernel: jax.Array, pair: Factors | None = None) -> jax.Array:
  r"""Norms of the columns of a kernel, with or without a pair's weight added.

  .. math::
    \|w_j + s A b_j\|^2 = \|w_j\|^2 + 2 s\, b_j^\top (A^\top w_j) +
    s^2\, b_j^\top (A^\top A) b_j

  never forms the (in, out) product: it reads the kernel, and costs as much as r
  rows of a batch cost the layer.

  Args:
    kernel: `(*batch, in, out)`.
    pair: a pair with the same batch axes, `in` and `out`.

  Returns:
    `(*batch, out)`, float32.
  """
  squares = jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=-2)
  if pair is None:
    return jnp.sqrt(squares)
  a, b = pair.a.astype(jnp.float32), pair.b.astype(jnp.float32)

  def product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(
      "...ir,...io->...ro",
      left,
      right,
      precision=jax.lax.Precision.HIGHEST,
      preferred_element_type=jnp.float32,
      out_sharding=_explicit.out_sharding(
        right, *range(right.ndim - 2), None, right.ndim - 1
      ),
    )

  # In the kernel's dtype, to avoid a float32 copy of the kernel.
  cross = product(a.astype(kernel.dtype), kernel)
  within = jnp.einsum(
    "...rs,...so->...ro",
    product(a, a),
    b,
    precision=jax.lax.Precision.HIGHEST,
  )
  scale = pair.scale
  squares += jnp.sum(b * (2 * scale * cross + scale**2 * within), axis=-2)
  # Cancellation may leave a rounding error below zero.
  return jnp.sqrt(jnp.maximum(squares, 0.0))


def gain(
  kernel: jax.Array, pair: Factors | None, magnitude: jax.Array
) -> jax.Array:
  """The factor of each output of the adapted layer, `(*batch, out)`.

  No gradient flows through the norms, as in the paper's section 4.3. A column
  of zeros has no direction and does not change.
  """
  return _over(magnitude, jax.lax.stop_gradient(column_norms(kernel, pair)))


def scaled(weight: jax.Array, magnitude: jax.Array) -> jax.Array:
  """Scales the columns of a weight `(*batch, in, out)` to these magnitudes."""
  return weight * _over(magnitude, column_norms(weight))[..., None, :]


def _over(magnitude: jax.Array, norms: jax.Array) -> jax.Array:
  some = norms > 0
  return jnp.where(some, magnitude / jnp.where(some, norms, 1.0), 1.0)


def path_of(path: tuple[str, ...]) -> tuple[str, ...]:
  """The path of the magnitude of the kernel at a path."""
  return (*path[:-1], path[-1] + SUFFIX)


def split(
  extra: dict[tuple[str, ...], Any], kernels: Any
) -> tuple[dict[tuple[str, ...], Any], dict[tuple[str, ...], Any]]:
  """The magnitudes by their kernels' paths, and the rest of `extra`."""
  magnitudes = {
    path: extra[path_of(path)] for path in kernels if path_of(path) in extra
  }
  names = set(map(path_of, magnitudes))
  return magnitudes, {k: x for k, x in extra.items() if k not in names}
