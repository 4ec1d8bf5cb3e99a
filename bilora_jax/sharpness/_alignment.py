"""The auxiliary during training: where it points, and how fast it turns.

Trees of `Factors` are compared with each other, or with a tree of dense
gradients of the same structure, `(*batch, in, out)` for a pair with these axes.
No product of a pair's factors is formed. For a pair that is zero, as every
auxiliary is at the start, each function returns 0.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilora_jax import _linalg
from bilora_jax._factors import is_factors

# By default, TPUs multiply in bfloat16, and recent GPUs with 10 mantissa bits.
_HIGHEST = jax.lax.Precision.HIGHEST


class Overlap(NamedTuple):
  """How far subspaces coincide, from 0 (orthogonal) to 1 (one holds the other).

  Attributes:
    inputs: overlap of the column spaces, in R^in: a tree with an array
      `(*batch)` for each weight, float32.
    outputs: overlap of the row spaces, in R^out: likewise.
    mean: mean of all inputs and outputs, float32 scalar.
  """

  inputs: Any
  outputs: Any
  mean: jax.Array


class _Spaces(NamedTuple):
  """Orthonormal bases of a weight's spaces, zero in columns beyond its rank."""

  inputs: jax.Array  # (*batch, in, r)
  outputs: jax.Array  # (*batch, out, r)
  rank: jax.Array  # (*batch)


def subspace_overlap(left: Any, right: Any) -> Overlap:
  r"""The mean squared cosine of the principal angles between weights' spaces.

  .. math:: \frac{\|Q_1^\top Q_2\|_F^2}{\min(r_1, r_2)}

  with orthonormal bases :math:`Q` of the two column spaces, or row spaces, and
  their numerical ranks. The overlap is 1 if one space contains the other. Its
  mean for random subspaces in n dimensions is :math:`\max(r_1, r_2) / n`. The
  cost is a QR decomposition of each factor, or a singular value decomposition
  of each dense weight.

  Args:
    left: a tree of `Factors`, or of arrays `(*batch, in, out)`.
    right: a tree of the same structure, of either kind; the ranks may differ.

  Returns:
    The overlap of each weight, and the mean.

  Raises:
    ValueError: if the trees or the weights' shapes differ.

  References:
    Liu et al, `Bi-LoRA <https://arxiv.org/abs/2508.19564>`_, 2025, which argues
    that LoRA-SAM, unlike the auxiliary, stays in the primary's subspace.
  """
  return _overlap(left, right, _spaces)


def gradient_overlap(
  auxiliary: Any, dense_gradients: Any, rank: int
) -> Overlap:
  """How far the auxiliary lies in the gradient's largest singular directions.

  This is `subspace_overlap` with the gradient's best approximation of a given
  rank. The cost is an eigendecomposition of the smaller Gram matrix of each
  gradient, a tenth of a singular value decomposition on a CPU.

  Args:
    auxiliary: a tree of `Factors`.
    dense_gradients: gradients in the pairs' weights, a tree of the same
      structure, of arrays `(*batch, in, out)`.
    rank: number of singular directions to compare with.

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

  The auxiliary of a step comes from the gradients of earlier steps. SAM's
  perturbation comes from the gradient of the same step and has a cosine of 1.

  Args:
    auxiliary: a tree of `Factors`.
    dense_gradients: gradients in the pairs' weights, a tree of the same
      structure, of arrays `(*batch, in, out)`.

  Returns:
    The cosine, float32 scalar; 0 if the auxiliary or the gradient is zero.

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
  r"""How far the auxiliary's weights turned between two steps.

  One minus the cosine between them, over all weights, from

  .. math:: \langle ab, a'b' \rangle = \sum_{ij} (a^\top a')_{ij}
    (b b'^\top)_{ij}

  Args:
    before: a tree of `Factors`.
    after: the same tree at a later step; the ranks may differ.

  Returns:
    0 for the same direction, 1 for a right angle, 2 for the opposite direction;
    0 if either tree is zero. Float32 scalar, with errors of about 1e-7.

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
  # The square roots of a Gram matrix's small eigenvalues are inaccurate
  # singular values; those of the projection are accurate.
  return _thin_spaces(
    top, jnp.matmul(_transposed(top), weight, precision=_HIGHEST)
  )


def _thin_spaces(a: jax.Array, b: jax.Array) -> _Spaces:
  """The spaces of a product, from the decomposition of an r x r matrix."""
  left, right = _linalg.qr(a), _linalg.qr(_transposed(b))
  core = jnp.matmul(left[1], _transposed(right[1]), precision=_HIGHEST)
  u, sigma, vt = _linalg.svd(core)
  return _cut(
    jnp.matmul(left[0], u, precision=_HIGHEST),
    sigma,
    jnp.matmul(right[0], _transposed(vt), precision=_HIGHEST),
  )


def _cut(u: jax.Array, sigma: jax.Array, v: jax.Array) -> _Spaces:
  # The tolerance of numpy.linalg.matrix_rank and scipy.linalg.orth.
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
  # Roots first, as the product of the squares could underflow.
  norms = jnp.sqrt(left_square) * jnp.sqrt(right_square)
  return jnp.where(
    norms > 0, jnp.clip(inner / jnp.where(norms > 0, norms, 1), -1, 1), 0
  )


def _matched(left: Any, right: Any) -> tuple[list[Any], list[Any]]:
  """The weights of two trees, in float32 and in the same order."""
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
