"""A gradient's low-rank approximation from its two thin sketches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilora_jax import _linalg, _transform
from bilora_jax._factors import Factors

# Of a sketch's columns and rows: their product is nothing beside a weight, and
# their gradients are far from float32's ends.
_LENGTH = 1e-4
# A smaller singular value or eigenvalue, over the largest, is rounding.
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
      columns beyond the shorter side of a factor are zero.
  """
  return _redrawn(key, tree, lambda pair: (rank, 0))


def redrawn(key: jax.Array, tree: Any, core_rank: int | None) -> Any:
  """As `drawn`, of the same rank and with the span of the first k columns."""
  return _redrawn(
    key,
    tree,
    lambda pair: (pair.rank, core_rank_of(pair.rank, core_rank)),
  )


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
  found = _approximations(pairs, unit, core_rank)
  norm, *_ = _transform.norms(found)
  factor = jnp.where(norm == 0, 0, radius / jnp.where(norm == 0, 1, norm))
  return optax.tree.scale(jnp.sqrt(factor), found)


def _approximations(pairs: Any, grads: Any, core_rank: int | None) -> Any:
  """Those of G, of rank k, as the pairs that stand for them."""
  cores = _transform.map_pairs(
    lambda pair, grad: _matmul(pair.a.mT, grad.a) / pair.scale, pairs, grads
  )
  decomposed = iter(_at_once(_linalg.svd, jax.tree.leaves(cores)))

  def one(pair, grad):
    u, sigma, vt = next(decomposed)
    k = core_rank_of(pair.rank, core_rank)
    kept = (jnp.arange(pair.rank) < k) & (sigma > _CUT * sigma[..., :1])
    root = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, sigma, 1)), 0)
    # The gradients are s times the sketches, and so is the weight.
    return Factors(
      _matmul(grad.a, vt.mT * root[..., None, :]) / pair.scale,
      _matmul(root[..., None] * u.mT, grad.b) / pair.scale**2,
      pair.scale,
    )

  return _transform.map_pairs(one, pairs, grads)


def _redrawn(
  key: jax.Array, tree: Any, sizes: Callable[[Factors], tuple[int, int]]
) -> Any:
  """Pairs along the first columns of old ones, and at random else.

  Args:
    key: of the draws.
    tree: of the old pairs.
    sizes: from an old pair to the new one's rank, and how many columns stay.
  """
  old, shapes = [], []
  for pair in _transform.pairs(tree):
    rank, kept = sizes(pair)
    for x in (pair.a, pair.b.mT):
      old.append(x[..., :kept].astype(jnp.float32))
      shapes.append((*x.shape[:-1], rank - kept))
  new = _normal(key, shapes)
  columns = [jnp.concatenate(both, -1) for both in zip(old, new)]
  bases = iter(_orthonormal(columns))
  return _transform.map_pairs(
    lambda pair: Factors(
      _LENGTH * next(bases), _LENGTH * next(bases).mT, pair.scale
    ),
    tree,
  )


def _normal(key: jax.Array, shapes: list[tuple[int, ...]]) -> list[jax.Array]:
  """Draws from N(0, 1): those of one shape together, compiled but once."""
  drawn = {}
  for i, shape in enumerate(dict.fromkeys(shapes)):
    all_of_it = (shapes.count(shape), *shape)
    own = jax.random.fold_in(key, i)
    drawn[shape] = iter(jax.random.normal(own, all_of_it, jnp.float32))
  return [next(drawn[shape]) for shape in shapes]


def _orthonormal(matrices: list[jax.Array]) -> list[jax.Array]:
  """Bases of the spans of columns, (*batch, n, r), by their Gram matrices.

  That is less exact than QR, which nothing here depends on; but only r x r
  matrices are decomposed, whatever is sharded, and all of them at once.
  """
  lengths = [jnp.linalg.norm(x, axis=-2, keepdims=True) for x in matrices]
  units = [x / jnp.where(n == 0, 1, n) for x, n in zip(matrices, lengths)]
  bases = []
  grams = _at_once(_linalg.eigh, [_matmul(x.mT, x) for x in units])
  for x, (values, vectors) in zip(units, grams):
    kept = values > _CUT * values[..., -1:]
    root = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1)), 0)
    bases.append(_matmul(x, vectors * root[..., None, :]))
  return bases


def _at_once(
  decompose: Callable[[jax.Array], tuple[jax.Array, ...]],
  matrices: list[jax.Array],
) -> list[tuple[jax.Array, ...]]:
  """Decomposes square matrices, (*batch, r, r), those of one size together.

  A model has hundreds, and each decomposition takes long to compile.
  """
  found: dict[int, tuple[jax.Array, ...]] = {}
  for i, matrix in enumerate(matrices):
    if i in found:
      continue
    same = [
      j for j, x in enumerate(matrices) if x.shape[-1] == matrix.shape[-1]
    ]
    batches = [matrices[j].shape[:-2] for j in same]
    flat = [matrices[j].reshape(-1, *matrix.shape[-2:]) for j in same]
    ends = np.cumsum([len(x) for x in flat])[:-1]
    parts = [jnp.split(x, ends) for x in decompose(jnp.concatenate(flat))]
    for j, batch, own in zip(same, batches, zip(*parts)):
      found[j] = tuple(x.reshape(*batch, *x.shape[1:]) for x in own)
  return [found[i] for i in range(len(matrices))]


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  """A product in float32."""
  return jnp.matmul(
    x.astype(jnp.float32),
    y.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
