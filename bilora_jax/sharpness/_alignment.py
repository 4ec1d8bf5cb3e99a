"""What the auxiliary does during training: where it points, how fast it turns.

Trees of `Factors` are compared with each other, or with a tree that mirrors
theirs of dense gradients, `(*batch, in, out)` for a pair with these axes. No
product of a pair's factors is formed. A pair that is zero, as every auxiliary
is at the start, overlaps with nothing and points nowhere: each function is 0.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilora_jax import _linalg
from bilora_jax._factors import is_factors

# A TPU's matmuls are of bfloat16, a recent GPU's of 10 bits, unless asked.
_HIGHEST = jax.lax.Precision.HIGHEST


class Overlap(NamedTuple):
  """How far pairs of subspaces coincide, from 0, orthogonal, to 1.

  Attributes:
    inputs: between column spaces, in R^in: a tree with an array `(*batch)` for
      each weight, float32.
    outputs: between row spaces, in R^out: likewise.
    mean: over all of both, float32 scalar.
  """

  inputs: Any
  outputs: Any
  mean: jax.Array


class _Spaces(NamedTuple):
  """Orthonormal bases of a weight's spaces, zero beyond its rank."""

  inputs: jax.Array  # (*batch, in, r)
  outputs: jax.Array  # (*batch, out, r)
  rank: jax.Array  # (*batch)


def subspace_overlap(left: Any, right: Any) -> Overlap:
  r"""The mean squared cosine of the principal angles between weights' spaces.

  .. math:: \frac{\|Q_1^\top Q_2\|_F^2}{\min(r_1, r_2)}

  with orthonormal bases :math:`Q` of the two column spaces, or row spaces, and
  the ranks as they are numerically: 1 where one space holds the other. Between
  random subspaces of n dimensions it is :math:`\max(r_1, r_2) / n` in the mean.
  The cost is a QR decomposition of each factor, of a dense weight a singular
  value decomposition.

  Args:
    left: a tree of `Factors`, or of arrays `(*batch, in, out)`.
    right: the same tree of either; the ranks may differ.

  Returns:
    The overlap of each weight, and the mean.

  Raises:
    ValueError: if the trees or the weights' shapes differ.

  References:
    Liu et al, `Bi-LoRA <https://arxiv.org/abs/2508.19564>`_, 2025: whether the
    auxiliary leaves the primary's subspace, its argument against LoRA-SAM.
  """
  return _overlap(left, right, _spaces)


def gradient_overlap(
  auxiliary: Any, dense_gradients: Any, rank: int
) -> Overlap:
  """How far the auxiliary lies in the gradient's largest singular directions.

  `subspace_overlap` with the spaces of the gradient's best approximation of a
  rank. The cost is an eigendecomposition of the smaller Gram matrix of each
  gradient, a tenth of a singular value decomposition on a CPU.

  Args:
    auxiliary: a tree of `Factors`.
    dense_gradients: of the weights that the pairs stand for, the same tree of
      arrays `(*batch, in, out)`.
    rank: how many singular directions count.

  Returns:
    The overlap of each weight, and the mean.

  Raises:
    ValueError: if the trees or shapes differ, or the rank is below 1.

  References:
    Liu et al, `Bi-LoRA <https://arxiv.org/abs/2508.19564>`_, 2025, proposition
    3, whose maximiser has an overlap of 1.
  """
  if rank < 1:
    raise ValueError(f"rank is an integer of at least 1; got {rank}.")
  return _overlap(auxiliary, dense_gradients, lambda g: _top_spaces(g, rank))


def cosine(auxiliary: Any, dense_gradients: Any) -> jax.Array:
  r"""The cosine between the perturbation and the gradient, over all weights.

  .. math::

    \frac{\sum_l \langle G_l, s_l a_l b_l \rangle}
    {\sqrt{\sum_l \|G_l\|_F^2} \sqrt{\sum_l \|s_l a_l b_l\|_F^2}}, \qquad
    \langle G, ab \rangle = \sum_{ij} (a^\top G)_{ij}\, b_{ij}

  The perturbation of a step comes from the gradients of earlier ones; SAM's,
  from the present one, has a cosine of 1.

  Args:
    auxiliary: a tree of `Factors`.
    dense_gradients: of the weights that the pairs stand for, the same tree of
      arrays `(*batch, in, out)`.

  Returns:
    The cosine, float32 scalar; 0 if either is zero.

  Raises:
    ValueError: if the trees or shapes differ.
  """
  pairs, grads = _matched(auxiliary, dense_gradients)

  def inner(pair, g):
    along = jnp.matmul(_transposed(pair.a), g, precision=_HIGHEST)
    return pair.scale * jnp.sum(along * pair.b)

  return _cosine(
    _total(inner(pair, g) for pair, g in zip(pairs, grads)),
    _total(jnp.sum(pair.squared_norm()) for pair in pairs),
    _total(jnp.sum(g * g) for g in grads),
  )


def turnover(before: Any, after: Any) -> jax.Array:
  r"""How far the auxiliary's weights turned between two times.

  One minus the cosine between them, over all weights, from

  .. math:: \langle ab, a'b' \rangle = \sum_{ij} (a^\top a')_{ij}
    (b b'^\top)_{ij}

  Args:
    before: a tree of `Factors`.
    after: the same tree at another time; the ranks may differ.

  Returns:
    0 for the same direction, 1 for a right angle, 2 for the opposite; 0 if
    either is zero. Float32 scalar, with errors of some 1e-7.

  Raises:
    ValueError: if the trees or shapes differ.
  """
  left, right = _matched(before, after)

  def inner(x, y):
    inputs = jnp.matmul(_transposed(x.a), y.a, precision=_HIGHEST)
    outputs = jnp.matmul(x.b, _transposed(y.b), precision=_HIGHEST)
    return x.scale * y.scale * jnp.sum(inputs * outputs)

  start, end = (
    _total(jnp.sum(pair.squared_norm()) for pair in pairs)
    for pairs in (left, right)
  )
  same = _cosine(_total(map(inner, left, right)), start, end)
  return jnp.where((start > 0) & (end > 0), 1 - same, 0)


def _overlap(
  left: Any, right: Any, right_spaces: Callable[[Any], _Spaces]
) -> Overlap:
  inputs, outputs = [], []
  for x, y in zip(*_matched(left, right)):
    x, y = _spaces(x), right_spaces(y)
    smaller = jnp.minimum(x.rank, y.rank)
    for shares, p, q in (
      (inputs, x.inputs, y.inputs),
      (outputs, x.outputs, y.outputs),
    ):
      cosines = jnp.matmul(_transposed(p), q, precision=_HIGHEST)
      square = jnp.sum(cosines * cosines, axis=(-2, -1))
      shares.append(jnp.where(smaller > 0, square / jnp.maximum(smaller, 1), 0))
  treedef = jax.tree.structure(left, is_leaf=is_factors)
  return Overlap(
    jax.tree.unflatten(treedef, inputs),
    jax.tree.unflatten(treedef, outputs),
    jnp.mean(jnp.concatenate([jnp.ravel(x) for x in inputs + outputs])),
  )


def _spaces(weight: Any) -> _Spaces:
  if not is_factors(weight):
    return _dense_spaces(weight)
  return _thin_spaces(weight.a, weight.b)


def _dense_spaces(weight: jax.Array) -> _Spaces:
  u, sigma, vt = _linalg.svd(weight)
  return _cut(u, sigma, _transposed(vt))


def _top_spaces(weight: jax.Array, rank: int) -> _Spaces:
  if weight.shape[-2] > weight.shape[-1]:
    inputs, outputs, count = _top_spaces(_transposed(weight), rank)
    return _Spaces(outputs, inputs, count)
  # Squares of small gradients would underflow.
  largest = jnp.max(jnp.abs(weight), axis=(-2, -1), keepdims=True)
  scaled = weight / jnp.where(largest > 0, largest, 1)
  gram = jnp.matmul(scaled, _transposed(scaled), precision=_HIGHEST)
  # In ascending order of the eigenvalues.
  _, vectors = _linalg.eigh(gram)
  top = vectors[..., -rank:]
  # The roots of a Gram matrix's eigenvalues are no singular values where these
  # are small; the projection's own are.
  return _thin_spaces(
    top, jnp.matmul(_transposed(top), weight, precision=_HIGHEST)
  )


def _thin_spaces(a: jax.Array, b: jax.Array) -> _Spaces:
  """The spaces of a product, from a decomposition of one of r x r."""
  left, right = _linalg.qr(a), _linalg.qr(_transposed(b))
  core = jnp.matmul(left[1], _transposed(right[1]), precision=_HIGHEST)
  u, sigma, vt = _linalg.svd(core)
  return _cut(
    jnp.matmul(left[0], u, precision=_HIGHEST),
    sigma,
    jnp.matmul(right[0], _transposed(vt), precision=_HIGHEST),
  )


def _cut(u: jax.Array, sigma: jax.Array, v: jax.Array) -> _Spaces:
  # Where numpy.linalg.matrix_rank and scipy.linalg.orth end the rank.
  size = max(u.shape[-2], v.shape[-2])
  least = sigma[..., :1] * size * jnp.finfo(jnp.float32).eps
  kept = sigma > least
  return _Spaces(
    u * kept[..., None, :], v * kept[..., None, :], jnp.sum(kept, axis=-1)
  )


def _total(scalars: Iterable[jax.Array]) -> jax.Array:
  return sum(scalars, start=jnp.float32(0))


def _cosine(
  inner: jax.Array, left_square: jax.Array, right_square: jax.Array
) -> jax.Array:
  # Roots before the product, which could underflow.
  norms = jnp.sqrt(left_square) * jnp.sqrt(right_square)
  return jnp.where(
    norms > 0, jnp.clip(inner / jnp.where(norms > 0, norms, 1), -1, 1), 0
  )


def _matched(left: Any, right: Any) -> tuple[list[Any], list[Any]]:
  """The weights of two trees, in float32, one beside the other."""
  nodes = jax.tree_util.tree_leaves_with_path(left, is_leaf=is_factors)
  structures = [
    jax.tree.structure(tree, is_leaf=is_factors) for tree in (left, right)
  ]
  if structures[0] != structures[1] or not nodes:
    raise ValueError(
      "the two trees have the same weights, at least one; got "
      f"{structures[0]} and {structures[1]}."
    )
  others = jax.tree.leaves(right, is_leaf=is_factors)
  for (path, x), y in zip(nodes, others):
    if _shape(x) != _shape(y):
      raise ValueError(
        f"the weights at {jax.tree_util.keystr(path) or 'the root'} have the "
        f"same axes (*batch, in, out); got {_shape(x)} and {_shape(y)}."
      )
  return [_as_float32(x) for _, x in nodes], [_as_float32(y) for y in others]


def _shape(weight: Any) -> tuple[int, ...]:
  if is_factors(weight):
    return (*weight.a.shape[:-1], weight.b.shape[-1])
  return jnp.shape(weight)


def _as_float32(weight: Any) -> Any:
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weight)


def _transposed(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -2, -1)
