"""VeRA: a frozen random pair, scaled by two trained vectors."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from bilora_jax import _nodes
from bilora_jax._factors import Factors
from bilora_jax.adapters import _kind


@_nodes.register
@dataclasses.dataclass(frozen=True)
class VeRA:
  """The weight `(a * d) @ (b * g)`: vectors `d` and `g` scale a frozen pair.

  Attributes:
    d: `(*batch, r)`, scales the rank axis between `a` and `b`.
    g: `(*batch, out)`, scales the outputs.
    a: `(in, r)`, held: no step moves it, and no optimizer has a state of it.
      Stacked layers share `a` and `b`.
    b: `(r, out)`, held.
    degree: 2, in `d` and `g` together.

  References:
    Kopiczko et al, `VeRA <https://arxiv.org/abs/2310.11454>`_, 2024, equation
    (2).
  """

  degree: ClassVar[int] = 2
  held: ClassVar[tuple[str, ...]] = ("a", "b")
  kept: ClassVar[tuple[str, ...]] = ("d",)

  d: Any
  g: Any
  a: Any
  b: Any

  @property
  def outer_shape(self) -> tuple[tuple[int, ...], int, int]:
    """`(*batch)`, `in` and `out` of the weight."""
    return tuple(self.d.shape[:-1]), self.a.shape[0], self.b.shape[1]

  def factors(self) -> Factors:
    """The same weight as a pair of rank r."""
    return Factors(self.a * self.d[..., None, :], self.b * self.g[..., None, :])

  def squared_norm(self) -> jax.Array:
    """The square of the weight's Frobenius norm, `(*batch)`, in float32."""
    return self.factors().squared_norm()


def vera(rank: int = 256, seed: int = 0) -> _kind.Kind:
  """VeRA, for `init`.

  `g` starts at zero and `d` at 0.1, as in the paper. Layers of one shape have
  equal `a` and `b`, as in the paper, but each stores its own copy.

  Args:
    rank: r.
    seed: seed of `a`, uniform in `+-1/sqrt(in)`, and of `b`, in `+-1/sqrt(r)`.

  Returns:
    A kind that makes `VeRA`.

  Raises:
    ValueError: if the rank is below 1.
  """
  _kind.check_rank(rank)

  def new(key: jax.Array, kernel: jax.Array) -> VeRA:
    del key  # all layers draw from the seed
    *batch, size_in, size_out = kernel.shape
    keys = jax.random.split(jax.random.key(seed))
    return VeRA(
      jnp.full((*batch, rank), 0.1, jnp.float32),
      jnp.zeros((*batch, size_out), jnp.float32),
      _kind.uniform(keys[0], (size_in, rank), size_in),
      _kind.uniform(keys[1], (rank, size_out), rank),
    )

  return new
