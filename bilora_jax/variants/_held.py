"""Pairs whose `b` alone is trained."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from bilora_jax import _nodes
from bilora_jax._factors import Factors, sharded_sides


@_nodes.register
@dataclasses.dataclass(frozen=True)
class HeldA(Factors):
  """A pair whose `a` is frozen: no step moves it, and no clip scales it.

  Attributes:
    degree: 1: the weight is linear in `b`.
  """

  degree: ClassVar[int] = 1
  held: ClassVar[tuple[str, ...]] = ("a",)


@_nodes.register
@dataclasses.dataclass(frozen=True)
class OrthonormalA(HeldA):
  r"""A pair whose `a` has orthonormal columns: its norm is the norm of `b`.

  .. math:: \|s\, a\, b\|_F = |s|\, \|b\|_F, \qquad a^\top a = 1
  """

  def squared_norm(self, specs: Factors | None = None) -> jax.Array:
    """The square of `frobenius_norm`, `(*batch)`, in float32."""
    return self.scale**2 * _square(self.b, sharded_sides(self, specs)[1])

  def scaled_square(
    self, specs: Factors | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """As `Factors.scaled_square`."""
    axes = sharded_sides(self, specs)[1]
    size = _nodes.magnitude(self.b, self.b.ndim - 2)
    size = jax.lax.pmax(size, axes) if axes else size
    return self.scale**2 * _square(_nodes.over(self.b, size), axes), size


def _square(b: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  square = jnp.sum(jnp.square(b.astype(jnp.float32)), axis=(-2, -1))
  return jax.lax.psum(square, axes) if axes else square
