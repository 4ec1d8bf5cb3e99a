"""LoKr: the Kronecker product of a small matrix and a low-rank weight."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bilora_jax import _nodes
from bilora_jax._factors import Factors
from bilora_jax.adapters import _kind


@_nodes.register
@dataclasses.dataclass(frozen=True)
class LoKr:
  r"""The weight `scale * kron(c, a @ b)`, of rank up to p r.

  .. math:: \|C \otimes AB\|_F = \|C\|_F\, \|AB\|_F

  The weight is also a low-rank pair: :math:`C \otimes AB = (C \otimes A)(I_p
  \otimes B)`.

  Attributes:
    c: `(*batch, u, p)`, for a weight `(u v, p q)`.
    a: `(*batch, v, r)`.
    b: `(*batch, r, q)`.
    scale: static; `alpha / r`.
    degree: 3.

  References:
    Edalati et al, `KronA <https://arxiv.org/abs/2212.10650>`_, 2022; with a
    low-rank block, Yeh et al, `LyCORIS <https://arxiv.org/abs/2309.14859>`_,
    2024.
  """

  degree: ClassVar[int] = 3
  kept: ClassVar[tuple[str, ...]] = ("c", "a")

  c: Any
  a: Any
  b: Any
  scale: float = _nodes.static(1.0)

  @property
  def outer_shape(self) -> tuple[tuple[int, ...], int, int]:
    """`(*batch)`, `in` and `out` of the weight."""
    *batch, u, p = self.c.shape
    return tuple(batch), u * self.a.shape[-2], p * self.b.shape[-1]

  def factors(self) -> Factors:
    """The same weight as a pair of rank p r."""
    u, p = self.c.shape[-2:]
    (v, r), q = self.a.shape[-2:], self.b.shape[-1]
    batch = self.c.shape[:-2]
    a = jnp.einsum("...up,...vr->...uvpr", self.c, self.a)
    eye = jnp.eye(p, dtype=self.b.dtype)
    b = jnp.einsum("po,...rq->...proq", eye, self.b)
    return Factors(
      a.reshape(*batch, u * v, p * r),
      b.reshape(*batch, p * r, p * q),
      self.scale,
    )

  def squared_norm(self) -> jax.Array:
    """The square of the weight's Frobenius norm, `(*batch)`, in float32."""
    c = jnp.sum(jnp.square(self.c.astype(jnp.float32)), axis=(-2, -1))
    return c * Factors(self.a, self.b, self.scale).squared_norm()


def lokr(rank: int = 8, alpha: float = 16.0, blocks: int = 8) -> _kind.Kind:
  """LoKr, for `init`.

  `b` starts at zero, `a` like LoRA's `a`, and `c` uniform in `+-1/sqrt(u)`.

  Args:
    rank: r, the rank of one block.
    alpha: the weight has the scale `alpha / rank`.
    blocks: u and p are the largest divisors of `in` and of `out` up to this
      number. The layer multiplies by a pair of rank p r.

  Returns:
    A kind that makes `LoKr`.

  Raises:
    ValueError: if the rank or blocks is below 1.
  """
  _kind.check_rank(rank)
  if blocks < 1:
    raise ValueError(f"blocks is an integer of at least 1; got {blocks}.")

  def new(key: jax.Array, kernel: jax.Array) -> LoKr:
    *batch, size_in, size_out = kernel.shape
    u, p = (
      max(d for d in range(1, blocks + 1) if size % d == 0)
      for size in (size_in, size_out)
    )
    keys = jax.random.split(key)
    return LoKr(
      _kind.uniform(keys[0], (*batch, u, p), u),
      _kind.uniform(keys[1], (*batch, size_in // u, rank), size_in // u),
      jnp.zeros((*batch, rank, size_out // p), jnp.float32),
      alpha / rank,
    )

  return new
