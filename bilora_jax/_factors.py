"""`Factors`: one low-rank pair, its norm, and joining along the rank."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bilora_jax import _explicit, _nodes


@_nodes.register
@dataclasses.dataclass(frozen=True)
class Factors:
  r"""A low-rank pair, which represents the weight `scale * a @ b`.

  The Bi-LoRA paper has weights (out, in), and JAX has kernels (in, out): `a` is
  the paper's :math:`A^\top` and `b` is :math:`B^\top`. The pair is one pytree
  node for JAX, `jax.export` and `flax.serialization`, so that no code matches
  leaves by their names.

  Attributes:
    a: `(*batch, in, r)`. Leading batch axes are scanned layers or experts.
    b: `(*batch, r, out)`, with the same batch axes as `a`.
    scale: static; `alpha / r` in LoRA's notation.
    degree: 2: a pair times t represents the weight times t squared.
  """

  degree: ClassVar[int] = 2
  kept: ClassVar[tuple[str, ...]] = ("a",)

  a: Any
  b: Any
  scale: float = _nodes.static(1.0)

  @property
  def rank(self) -> int:
    """The size of the axis that `a` and `b` share."""
    return self.a.shape[-1]

  def weight(self) -> jax.Array:
    """The dense weight, `(*batch, in, out)`: for merging, not for training."""
    return self.scale * jnp.matmul(
      self.a, self.b, precision=jax.lax.Precision.HIGHEST
    )

  def frobenius_norm(self, specs: "Factors | None" = None) -> jax.Array:
    r"""The Frobenius norm of the weight, `(*batch)`, in float32.

    .. math:: \|ab\|_F^2 = \sum_{ij} (a^\top a)_{ij} (b b^\top)_{ij}

    costs two `r x r` Gram matrices and never forms the `(in, out)` product.
    Each factor is divided by its magnitude first, so that the result is right
    for factors of any sizes, if float32 can represent it. The derivative at the
    weight 0 is 0.

    Args:
      specs: see `squared_norm`.

    .. note::
      If terms of the product cancel, the error is the rounding error of the
      terms: the square of the norm has an error of up to about 1e-7 times
      :math:`\||a||b|\|_F^2`. For 2,000 random pairs whose weight was 4e-4 of
      its terms, the largest relative error was 29%; at 1.3e-4, it was 129%, and
      a fifth of the norms were 0.
    """
    square, scale = self.scaled_square(specs)
    return scale * _nodes.safe_sqrt(square)

  def scaled_square(
    self, specs: "Factors | None" = None
  ) -> tuple[jax.Array, jax.Array]:
    """The square of `norm / p` for a power of two p, and p.

    Args:
      specs: see `squared_norm`.

    Returns:
      Two arrays `(*batch)` in float32. Division by powers of two is exact: if
      `squared_norm` is in float32's range, it equals the first array times p
      squared, to the bit.
    """
    sizes, sides = [], sharded_sides(self, specs)
    for x, axes in zip((self.a, self.b), sides):
      size = _nodes.magnitude(x, x.ndim - 2)
      sizes.append(jax.lax.pmax(size, axes) if axes else size)
    size_a, size_b = sizes
    a, b = _nodes.over(self.a, size_a), _nodes.over(self.b, size_b)
    # The powers are multiplied together, as one may be large and one small.
    return self.scale**2 * _unscaled_square(a, b, sides), size_a * size_b

  def squared_norm(self, specs: "Factors | None" = None) -> jax.Array:
    """The square of `frobenius_norm`, `(*batch)`, in float32.

    It costs less than `frobenius_norm`, but squares entries without scaling
    them: above about 1e19 it is infinite or NaN, and a factor with all entries
    below 1e-19 counts as zero.

    Args:
      specs: only under `jax.shard_map` and `jax.pmap`, where the code sees
        shards: the `PartitionSpec` of `a` and of `b`. With them, the norm is
        that of the whole weight; each shard has its part of the batch axes. The
        communication is two sums of r x r matrices.

    Raises:
      ValueError: if the specs shard the rank.
    """
    sides = sharded_sides(self, specs)
    return self.scale**2 * _unscaled_square(self.a, self.b, sides)

  def join(self, other: "Factors") -> "Factors":
    """Concatenates two pairs along the rank: their weights add up.

    Args:
      other: a pair with the same batch axes, `in`, `out` and scale.

    Returns:
      A pair of rank `self.rank + other.rank`.

    Raises:
      ValueError: if the scales, or the shapes except for the rank, differ.
    """
    if self.scale != other.scale:
      raise ValueError(
        "only pairs of equal scale can be joined along the rank; got "
        f"{self.scale} and {other.scale}."
      )
    ours, theirs = _outer_shapes(self), _outer_shapes(other)
    if ours != theirs:
      raise ValueError(
        "pairs can be joined along the rank if (*batch, in) and (*batch, out) "
        f"agree; got {ours} and {theirs}."
      )
    return Factors(
      jnp.concatenate([self.a, other.a], axis=-1),
      jnp.concatenate([self.b, other.b], axis=-2),
      self.scale,
    )

  def split(self, rank: int) -> tuple["Factors", "Factors"]:
    """Undoes `join`: returns the first `rank` columns, and the rest, as pairs.

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
  """Whether a node is a pair; use as `is_leaf` in maps over pairs."""
  return isinstance(node, Factors)


def sharded_sides(
  factors: Factors, specs: Factors | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The mesh axes that shard the input of `a` and the output of `b`.

  Raises:
    ValueError: if the specs shard the rank.
  """
  if specs is None:
    return (), ()
  *_, size_in, rank_a = _mesh_axes(factors.a, specs.a)
  *_, rank_b, size_out = _mesh_axes(factors.b, specs.b)
  if rank_a or rank_b:
    raise ValueError(
      f"the rank of a pair is never sharded; got the specs {specs.a} and "
      f"{specs.b}."
    )
  return size_in, size_out


def batch_axes(factors: Factors, specs: Factors) -> tuple[str, ...]:
  """The mesh axes that shard the batch axes of a pair."""
  return tuple(
    name for axis in _mesh_axes(factors.a, specs.a)[:-2] for name in axis
  )


def _unscaled_square(
  a: jax.Array, b: jax.Array, sides: tuple[Any, Any]
) -> jax.Array:
  gram_a = _gram(a, "...ir,...is->...rs")
  gram_b = _gram(b, "...ro,...so->...rs")
  size_in, size_out = sides
  gram_a = jax.lax.psum(gram_a, size_in) if size_in else gram_a
  gram_b = jax.lax.psum(gram_b, size_out) if size_out else gram_b
  # Cancellation may leave a rounding error below zero.
  return jnp.maximum(jnp.sum(gram_a * gram_b, axis=(-2, -1)), 0.0)


def _gram(x: jax.Array, equation: str) -> jax.Array:
  # Norms in half precision have errors of percents, and so have float32 matmuls
  # of a TPU, which by default run in bfloat16.
  x = x.astype(jnp.float32)
  return jnp.einsum(
    equation,
    x,
    x,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
    out_sharding=_explicit.out_sharding(x, *range(x.ndim - 2), None, None),
  )


def _mesh_axes(x: jax.Array, spec: Any) -> list[tuple[str, ...]]:
  """The mesh axes that shard each axis of an array."""
  names = [*spec, *[None] * (x.ndim - len(spec))]
  return [(n,) if isinstance(n, str) else tuple(n or ()) for n in names]


def _outer_shapes(factors: Factors) -> tuple[tuple[int, ...], ...]:
  return factors.a.shape[:-1], (*factors.b.shape[:-2], factors.b.shape[-1])
