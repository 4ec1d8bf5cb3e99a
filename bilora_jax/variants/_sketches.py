"""A gradient's low-rank approximation from its two thin sketches."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilora_jax import _linalg, _transform
from bilora_jax._factors import Factors, is_factors

# Of a sketch's columns and rows: their product is nothing beside a weight, and
# their gradients are far from float32's ends.
_LENGTH = 1e-4
# A smaller singular value of a core, over its largest, is rounding.
_CUT = 1e-5


def core_rank_of(rank: int, core_rank: int | None) -> int:
  """The rank that a core is cut to, k: by default half of the sketches'.

  Raises:
    ValueError: if it is not from 1 to the sketches' rank.
  """
  if core_rank is None:
    return max(1, rank // 2)
  if not 1 <= core_rank <= rank:
    raise ValueError(
      "core_rank, the rank of the adversary, is from 1 to that of the "
      f"sketches, {rank}; got {core_rank}."
    )
  return core_rank


def drawn(key: jax.Array, tree: Any, rank: int) -> Any:
  """Pairs to take sketches with: orthonormal, and next to no perturbation.

  Args:
    key: of the draws.
    tree: of `Factors`, of which only shapes and scales matter.
    rank: of the new pairs, `a` (*batch, in, rank) and `b` (*batch, rank, out);
      beyond the shorter of its sides a factor is zero.
  """
  return _with_keys(lambda k, pair: _orthonormal(k, pair, rank, 0), key, tree)


def redrawn(key: jax.Array, tree: Any, core_rank: int | None) -> Any:
  """As `drawn`, of the same rank and with the span of the first k columns."""

  def one(key, pair):
    kept = core_rank_of(pair.rank, core_rank)
    return _orthonormal(key, pair, pair.rank, kept)

  return _with_keys(one, key, tree)


def ascent(pairs: Any, grads: Any, core_rank: int | None, radius: Any) -> Any:
  r"""The perturbation by which the loss rises most, from sketches alone.

  A pair :math:`W = s\,a\,b` has the gradients :math:`s\,G b^\top` and
  :math:`s\,a^\top G`. So with :math:`Y = G b^\top`, :math:`Z = a^\top G` and
  the core :math:`C = a^\top G b^\top = a^\top Y`,

  .. math::

    \hat G = Y\, C_k^+ Z, \qquad W' = \rho\, \frac{\hat G}{\|\hat G\|_F},

  with one norm over all pairs; :math:`C_k^+` is the pseudo-inverse of the core
  cut to rank k. Where G has rank k or less, it is what comes out.

  Args:
    pairs: that the gradients are of, a tree of `Factors`.
    grads: a tree like it.
    core_rank: k.
    radius: rho, in units of the weights.

  Returns:
    Pairs of the old ones' shapes, in float32, zero beyond k columns; all are
    zero if there is no gradient.
  """
  size = optax.tree.norm(grads, ord=jnp.inf)
  # Of size 1: products of small numbers underflow.
  unit = optax.tree.scale(1 / jnp.where(size == 0, 1, size), grads)
  found = _transform.map_pairs(
    lambda pair, grad: _approximation(
      pair, grad, core_rank_of(pair.rank, core_rank)
    ),
    pairs,
    unit,
  )
  norm, *_ = _transform.norms(found)
  factor = jnp.where(norm == 0, 0, radius / jnp.where(norm == 0, 1, norm))
  return optax.tree.scale(jnp.sqrt(factor), found)


def _approximation(pair: Factors, grad: Factors, rank: int) -> Factors:
  """G's approximation of that rank, as the pair that stands for it."""
  matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  a, y, z = (x.astype(jnp.float32) for x in (pair.a, grad.a, grad.b))
  y, z = y / pair.scale, z / pair.scale
  u, sigma, vt = _linalg.svd(matmul(a.mT, y))
  kept = (jnp.arange(pair.rank) < rank) & (sigma > _CUT * sigma[..., :1])
  root = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, sigma, 1)), 0)
  return Factors(
    matmul(y, vt.mT * root[..., None, :]),
    matmul(root[..., None] * u.mT, z) / pair.scale,
    pair.scale,
  )


def _orthonormal(key: jax.Array, pair: Factors, rank: int, kept: int) -> Any:
  """A pair along the first columns of an old one, and at random else."""

  def basis(key, x):
    x = x[..., :kept].astype(jnp.float32)
    new = jax.random.normal(key, (*x.shape[:-1], rank - kept), jnp.float32)
    q, _ = _linalg.padded_qr(jnp.concatenate([x, new], -1))
    return _LENGTH * q

  of_a, of_b = jax.random.split(key)
  return Factors(basis(of_a, pair.a), basis(of_b, pair.b.mT).mT, pair.scale)


def _with_keys(f: Any, key: jax.Array, tree: Any) -> Any:
  """Applies f to keys and pairs; what a mask hides stays as it is."""
  nodes, structure = jax.tree.flatten(tree, is_leaf=is_factors)
  keys = structure.unflatten(list(jax.random.split(key, len(nodes))))
  return _transform.map_pairs(lambda pair, key: f(key, pair), tree, keys)
