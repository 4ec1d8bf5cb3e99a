"""Low-rank approximation of a gradient from two thin sketches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilora_jax import _linalg, _norms, _stacks
from bilora_jax._factors import Factors

# Norm of a sketch's columns and rows: their product is negligible beside a
# weight, and their gradients are far from the limits of float32.
_LENGTH = 1e-4
# A singular value or eigenvalue below this share of the largest is rounding.
_CUT = 1e-5


def core_rank_of(rank: int, core_rank: int | None) -> int:
  """The rank k to which a core is cut: by default half of the sketches' rank.

  Raises:
    ValueError: if core_rank is not from 1 to the sketches' rank.
  """
  if core_rank is None:
    return max(1, rank // 2)
  if not 1 <= core_rank <= rank:
    raise ValueError(
      "core_rank, the rank of the adversary, is from 1 to the rank of the "
      f"sketches, {rank}; got {core_rank}."
    )
  return core_rank


def drawn(key: jax.Array, tree: Any, rank: int) -> Any:
  """Draws orthonormal pairs for sketches, which perturb next to nothing.

  Args:
    key: random key of the draws.
    tree: a tree of `Factors`, of which only shapes and scales matter.
    rank: rank of the new pairs, `a` (*batch, in, rank) and `b` (*batch, rank,
      out); columns beyond the shorter side of a factor are zero.
  """
  return _stacked(
    lambda i, pair: _sketch(jax.random.fold_in(key, i), pair, rank, 0), tree
  )


def redrawn(key: jax.Array, tree: Any, core_rank: int | None) -> Any:
  """As `drawn`, of the same rank, keeping the span of the first k columns."""

  def one(i, pair):
    kept = core_rank_of(pair.rank, core_rank)
    return _sketch(jax.random.fold_in(key, i), pair, pair.rank, kept)

  return _stacked(one, tree)


def ascent(pairs: Any, grads: Any, core_rank: int | None, radius: Any) -> Any:
  r"""The perturbation by which the loss rises most, from sketches alone.

  The factors of a pair :math:`W = s\,a\,b` have the gradients
  :math:`s\,G b^\top` and :math:`s\,a^\top G`. So with :math:`Y = G b^\top`,
  :math:`Z = a^\top G` and the core :math:`C = a^\top G b^\top = a^\top Y`,

  .. math::

    \hat G = Y\, C_k^+ Z, \qquad W' = \rho\, \frac{\hat G}{\|\hat G\|_F},

  with one norm over all pairs; :math:`C_k^+` is the pseudo-inverse of the core
  cut to rank k. If G has rank k or less, :math:`\hat G` equals G.

  Args:
    pairs: the sketches, a tree of `Factors`.
    grads: gradients in `pairs`, a tree like it.
    core_rank: k.
    radius: rho, in units of the weights.

  Returns:
    Pairs of the same shapes, in float32, zero beyond k columns; all are zero if
    all gradients are zero.
  """
  size = optax.tree.norm(grads, ord=jnp.inf)
  # Scaled to size 1, as products of small numbers underflow.
  unit = optax.tree.scale(1 / jnp.where(size == 0, 1, size), grads)
  approximations = _stacked(
    lambda _, pair, grad: _approximation(
      pair, grad, core_rank_of(pair.rank, core_rank)
    ),
    pairs,
    unit,
  )
  norm, *_ = _norms.norms(approximations)
  factor = jnp.where(norm == 0, 0, radius / jnp.where(norm == 0, 1, norm))
  return optax.tree.scale(jnp.sqrt(factor), approximations)


def _approximation(pair: Factors, grad: Factors, rank: int) -> Factors:
  """The approximation of G, as a pair."""
  u, sigma, vt = _linalg.svd(_matmul(pair.a.mT, grad.a) / pair.scale)
  kept = jnp.arange(pair.rank) < rank
  root = _inverse_root(sigma, kept & (sigma > _CUT * sigma[..., :1]))
  # The gradients have the factor s, and so has the weight of the pair.
  return Factors(
    _matmul(grad.a, vt.mT * root[..., None, :]) / pair.scale,
    _matmul(root[..., None] * u.mT, grad.b) / pair.scale**2,
    pair.scale,
  )


def _sketch(key: jax.Array, pair: Factors, rank: int, kept: int) -> Factors:
  """A pair along the first columns of an old pair, and random otherwise."""

  def basis(key, x):
    shape = (*x.shape[:-1], rank - kept)
    new = jax.random.normal(key, shape, jnp.float32)
    return _LENGTH * _orthonormal(jnp.concatenate([x[..., :kept], new], -1))

  of_a, of_b = jax.random.split(key)
  return Factors(basis(of_a, pair.a), basis(of_b, pair.b.mT).mT, pair.scale)


def _orthonormal(x: jax.Array) -> jax.Array:
  """An orthonormal basis of the columns, (*batch, n, r), by their Gram matrix.

  This is less exact than QR, but exact enough here, and it decomposes only
  r x r matrices, also if x is sharded.
  """
  x = x.astype(jnp.float32)
  length = jnp.linalg.norm(x, axis=-2, keepdims=True)
  x = x / jnp.where(length == 0, 1, length)
  values, vectors = _linalg.eigh(_matmul(x.mT, x))
  root = _inverse_root(values, values > _CUT * values[..., -1:])
  return _matmul(x, vectors * root[..., None, :])


def _inverse_root(values: jax.Array, kept: jax.Array) -> jax.Array:
  return jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1)), 0)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  """A product in float32."""
  return jnp.matmul(
    x.astype(jnp.float32),
    y.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )


def _stacked(f: Callable[..., Factors], *trees: Any) -> Any:
  """Applies f to all pairs, to each group of alike pairs at once.

  Args:
    f: function of an integer, different in each call, and of pairs, which are
      stacked along a leading axis if several pairs are alike.
    *trees: trees of pairs with the same structure; masked nodes do not change.
  """
  columns = [_norms.pairs(tree, "the sketches") for tree in trees]
  stacks = _stacks.alike(trees[0])
  results = [
    f(number, *pairs)
    for number, pairs in enumerate(zip(*map(stacks.stack, columns)))
  ]
  in_order = iter(stacks.unstack(results))
  return _norms.map_pairs(lambda _: next(in_order), trees[0])
