"""`Factors`: one low-rank pair, its norm, and joining along the rank."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["a", "b"],
  meta_fields=["scale"],
)
@dataclasses.dataclass(frozen=True)
class Factors:
  r"""A low-rank pair that stands for the weight `scale * a @ b`.

  In the letters of the Bi-LoRA paper, whose weights are (out, in), `a` is
  :math:`A^\top` and `b` is :math:`B^\top`: JAX kernels are (in, out). The pair
  is one pytree node, so that nothing ever pairs leaves by their names.

  Attributes:
    a: `(*batch, in, r)`. Leading batch axes are scanned layers or experts.
    b: `(*batch, r, out)`, with the same batch axes as `a`.
    scale: static; `alpha / r` in LoRA's notation.
  """

  a: Any
  b: Any
  scale: float = 1.0

  @property
  def rank(self) -> int:
    """The size of the axis that `a` and `b` share."""
    return self.a.shape[-1]

  def weight(self) -> jax.Array:
    """The dense weight, `(*batch, in, out)`: for merging, not for training."""
    return self.scale * jnp.matmul(
      self.a, self.b, precision=jax.lax.Precision.HIGHEST
    )

  def frobenius_norm(self) -> jax.Array:
    r"""The Frobenius norm of the weight, `(*batch)`, in float32.

    .. math:: \|ab\|_F^2 = \sum_{ij} (a^\top a)_{ij} (b b^\top)_{ij}

    costs two `r x r` Gram matrices and never forms the `(in, out)` product.
    """
    return abs(self.scale) * jnp.sqrt(_unscaled_square(self.a, self.b))

  def squared_norm(self) -> jax.Array:
    """The square of `frobenius_norm`, `(*batch)`, in float32."""
    return self.scale**2 * _unscaled_square(self.a, self.b)

  def join(self, other: "Factors") -> "Factors":
    """Puts two pairs side by side along the rank: their weights add up.

    Args:
      other: a pair of the same batch axes, `in`, `out` and scale.

    Returns:
      A pair of rank `self.rank + other.rank`.

    Raises:
      ValueError: if the scales differ, or the shapes do outside the rank.
    """
    if self.scale != other.scale:
      raise ValueError(
        "only pairs of equal scale can be joined along the rank; got "
        f"{self.scale} and {other.scale}."
      )
    own, others = _outer_shapes(self), _outer_shapes(other)
    if own != others:
      raise ValueError(
        "pairs can be joined along the rank if (*batch, in) and (*batch, out) "
        f"agree; got {own} and {others}."
      )
    return Factors(
      jnp.concatenate([self.a, other.a], axis=-1),
      jnp.concatenate([self.b, other.b], axis=-2),
      self.scale,
    )

  def split(self, rank: int) -> tuple["Factors", "Factors"]:
    """Undoes `join`: the first `rank` columns, and the rest.

    Raises:
      ValueError: if `rank` is negative or above this pair's rank.
    """
    if not 0 <= rank <= self.rank:
      raise ValueError(
        f"a pair of rank {self.rank} can be split at 0 to {self.rank}; "
        f"got {rank}."
      )
    return (
      Factors(self.a[..., :rank], self.b[..., :rank, :], self.scale),
      Factors(self.a[..., rank:], self.b[..., rank:, :], self.scale),
    )


def is_factors(node: Any) -> bool:
  """Whether a node is a pair; the `is_leaf` of maps over pairs."""
  return isinstance(node, Factors)


def _unscaled_square(a: jax.Array, b: jax.Array) -> jax.Array:
  # Half-precision norms are off by percents, and so are the bfloat16 passes
  # that a TPU makes of float32 matmuls unless asked not to.
  gram = functools.partial(
    jnp.einsum,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  square = jnp.sum(
    gram("...ir,...is->...rs", a, a) * gram("...ro,...so->...rs", b, b),
    axis=(-2, -1),
  )
  # Cancellation may leave a rounding error below zero.
  return jnp.maximum(square, 0.0)


def _outer_shapes(factors: Factors) -> tuple[tuple[int, ...], ...]:
  return factors.a.shape[:-1], (*factors.b.shape[:-2], factors.b.shape[-1])
