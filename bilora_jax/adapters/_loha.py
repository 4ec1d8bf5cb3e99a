"""LoHa: the elementwise product of two low-rank weights."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bilora_jax import _nodes
from bilora_jax._factors import Factors
from bilora_jax.adapters import _kind


@_nodes.register
@dataclasses.dataclass(frozen=True)
class LoHa:
  r"""The weight `scale * (a1 @ b1) * (a2 @ b2)`, of rank up to r squared.

  .. math::
    \left(A_1 B_1 \odot A_2 B_2\right)_{ij}
    = \sum_{rs} (a_{1,ir}\, a_{2,is}) (b_{1,rj}\, b_{2,sj})

  so the weight is also a low-rank pair. The pair's factors are the Khatri-Rao
  products of these fields, and the norm comes from their Gram matrices.

  Attributes:
    a1: `(*batch, in, r)`.
    b1: `(*batch, r, out)`.
    a2: `(*batch, in, r)`.
    b2: `(*batch, r, out)`.
    scale: static; `alpha / r`.
    degree: 4.

  References:
    Hyeon-Woo et al, `FedPara <https://arxiv.org/abs/2108.06098>`_, 2022,
    proposition 1; as an adapter, Yeh et al, `LyCORIS
    <https://arxiv.org/abs/2309.14859>`_, 2024.
  """

  degree: ClassVar[int] = 4
  kept: ClassVar[tuple[str, ...]] = ("a1", "a2", "b2")

  a1: Any
  b1: Any
  a2: Any
  b2: Any
  scale: float = _nodes.static(1.0)

  @property
  def outer_shape(self) -> tuple[tuple[int, ...], int, int]:
    """`(*batch)`, `in` and `out` of the weight."""
    *batch, size_in, _ = self.a1.shape
    return tuple(batch), size_in, self.b1.shape[-1]

  def factors(self) -> Factors:
    """The same weight as a pair of rank r squared."""
    a = self.a1[..., :, None] * self.a2[..., None, :]
    b = self.b1[..., :, None, :] * self.b2[..., None, :, :]
    rank = self.a1.shape[-1] * self.a2.shape[-1]
    return Factors(
      a.reshape(*a.shape[:-2], rank),
      b.reshape(*b.shape[:-3], rank, b.shape[-1]),
      self.scale,
    )

  def squared_norm(self) -> jax.Array:
    """The square of the weight's Frobenius norm, `(*batch)`, in float32."""
    return self.factors().squared_norm()


def loha(rank: int = 4, alpha: float = 8.0) -> _kind.Kind:
  """LoHa, for `init`.

  `b1` starts at zero, and `a1` like LoRA's `a`; the entries of `a2 @ b2` have
  variance 1.

  Args:
    rank: r, the rank of both products. The layer multiplies by a pair of rank
      r * r.
    alpha: the weight has the scale `alpha / rank`.

  Returns:
    A kind that makes `LoHa`.

  Raises:
    ValueError: if the rank is below 1.
  """
  _kind.check_rank(rank)

  def new(key: jax.Array, kernel: jax.Array) -> LoHa:
    *batch, size_in, size_out = kernel.shape
    keys = jax.random.split(key, 3)
    a, b = (*batch, size_in, rank), (*batch, rank, size_out)
    return LoHa(
      _kind.uniform(keys[0], a, size_in),
      jnp.zeros(b, jnp.float32),
      jax.random.normal(keys[1], a),
      rank**-0.5 * jax.random.normal(keys[2], b),
      alpha / rank,
    )

  return new
