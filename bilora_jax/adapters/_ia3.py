"""(IA)^3: each output of a layer is multiplied by a trained number."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bilora_jax import _dora, _nodes
from bilora_jax.adapters import _kind


@_nodes.register
@dataclasses.dataclass(frozen=True)
class IA3:
  r"""The weight :math:`W_0 \operatorname{diag}(g)`: outputs times `1 + g`.

  The paper's vector is `1 + g`, so that the perturbation is linear in `g`; its
  norm is :math:`\sqrt{\sum_j g_j^2 \|w_j\|^2}` with :math:`w_j` the columns of
  the kernel. A bias is not multiplied. The vectors of two nodes add up.

  Attributes:
    gain: g, `(*batch, out)`.
    norms: norms of the kernel's columns, `(*batch, out)`; held: no step moves
      them.
    size_in: static; `in` of the kernel.
    degree: 1: the weight is linear in g.

  References:
    Liu et al, `T-Few <https://arxiv.org/abs/2205.05638>`_, 2022, section 3.3.
    The paper's vectors for the inputs of layers are not implemented.
  """

  degree: ClassVar[int] = 1
  held: ClassVar[tuple[str, ...]] = ("norms",)

  gain: Any
  norms: Any
  size_in: int = _nodes.static()

  @property
  def outer_shape(self) -> tuple[tuple[int, ...], int, int]:
    """`(*batch)`, `in` and `out` of the kernel."""
    *batch, size_out = self.gain.shape
    return tuple(batch), self.size_in, size_out

  def squared_norm(self) -> jax.Array:
    """The square of the weight's Frobenius norm, `(*batch)`, in float32."""
    sizes = self.gain.astype(jnp.float32) * self.norms
    return jnp.sum(jnp.square(sizes), axis=-1)


def ia3() -> _kind.Kind:
  """(IA)^3, for `init`: all gains start at 0, which multiplies outputs by 1.

  Returns:
    A kind that makes `IA3`.
  """

  def new(key: jax.Array, kernel: jax.Array) -> IA3:
    del key
    norms = _dora.column_norms(kernel)
    return IA3(jnp.zeros_like(norms), norms, kernel.shape[-2])

  return new
