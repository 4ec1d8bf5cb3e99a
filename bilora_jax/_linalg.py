"""Decompositions of batches of matrices, as in `jnp.linalg`, without deadlocks.

In jaxlib 0.10 and 0.11, decompositions of batches can deadlock on the CPU. Each
decomposition splits its batch over the program's own thread pool, and holds one
thread until its parts are done. If as many decompositions run at once as there
are threads, as for the layers of a model or under vmap, no thread is left for
the parts. A single matrix is not split, and from 0.12 on no batch is (jax
commit 859992407d): when 0.12 is the oldest supported version, remove
`_in_turn`.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp


def _in_turn(decompose: Callable[[jax.Array], Any]) -> Callable[..., Any]:
  """Decomposes a batch's matrices in turn on the CPU, and at once elsewhere."""
  # A vmap around a map alone would batch it.
  single = jax.custom_batching.sequential_vmap(decompose)

  def on_cpu(x):
    matrices = x.reshape(-1, *x.shape[-2:])
    return jax.tree.map(
      lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]),
      jax.lax.map(single, matrices),
    )

  @jax.custom_jvp
  def decomposed(x):
    return jax.lax.platform_dependent(x, cpu=on_cpu, default=decompose)

  # The map has no reverse mode, but the decomposition's derivative has one.
  @decomposed.defjvp
  def _(primals, tangents):
    return jax.jvp(decompose, primals, tangents)

  return functools.wraps(decompose)(decomposed)


# Shift of a Gram matrix's eigenvalues, as a share of the largest: above their
# rounding errors, so that no direction is divided by a rounding error.
_SHIFT = 1e-6
# Three passes take singular values from 1e-6 of the largest to 1.
_PASSES = 3


@_in_turn
def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The thin singular value decomposition, `(u, sigma, vt)`."""
  u, sigma, vt = jnp.linalg.svd(x, full_matrices=False)
  return u, sigma, vt


@_in_turn
def qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The thin QR decomposition, `(q, r)`."""
  q, r = jnp.linalg.qr(x)
  return q, r


@_in_turn
def eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues of symmetric matrices, in ascending order, and eigenvectors."""
  values, vectors = jnp.linalg.eigh(x)
  return values, vectors


def orthonormal(
  matrices: Sequence[jax.Array], rows: Sequence[jax.Array] | None = None
) -> list[jax.Array]:
  r"""Orthonormal bases of the column spaces of many matrices at once.

  Each pass divides a matrix by the root of its shifted Gram matrix,

  .. math::

    X \leftarrow X\, V (\Lambda + \epsilon \lambda_1)^{-1/2}, \qquad
    X^\top X = V \Lambda V^\top,

  as in shifted Cholesky QR, but with an eigendecomposition in place of
  Cholesky's, which fails if rounding makes a Gram matrix indefinite. Only (r,
  r) matrices are decomposed, also if X is sharded, and all of one rank in one
  batch: a GPU takes a tenth of the time of a QR decomposition.

  Args:
    matrices: `(*batch, n, r)`, float32.
    rows: for each matrix, the rows that a basis may use, bool `(n,)`; the other
      rows are zero. By default all rows.

  Returns:
    Matrices of the same shapes, :math:`Q`, with :math:`Q Q^\top X = X` and
    :math:`Q^\top Q = I`, both up to about 1e-5 of X or I. If X has a lower rank
    than r, a fixed random matrix adds directions; if r is above n,
    :math:`Q Q^\top = I` instead.

  References:
    Fukaya et al, `Shifted Cholesky QR for computing the QR factorization of
    ill-conditioned matrices <https://arxiv.org/abs/1809.11085>`_, 2020.
  """
  if rows is None:
    rows = [jnp.ones(x.shape[-2], bool) for x in matrices]
  bases = [_filled(x, mask) for x, mask in zip(matrices, rows)]
  for _ in range(_PASSES):
    grams = [_matmul(x.mT, x) for x in bases]
    bases = [_matmul(x, root) for x, root in zip(bases, _inverse_roots(grams))]
  return bases


def _filled(x: jax.Array, rows: jax.Array) -> jax.Array:
  """A matrix scaled to size 1, plus a small random matrix of full rank."""
  largest = jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
  fill = jax.random.normal(jax.random.key(0), x.shape[-2:], x.dtype)
  fill = jnp.where(rows[:, None], _SHIFT * fill, 0)
  return x / jnp.where(largest > 0, largest, 1) + fill


def _inverse_roots(grams: Sequence[jax.Array]) -> list[jax.Array]:
  """For each X^T X, the factor of X, `V (Lambda + shift)^(-1/2)`."""
  alike: dict[int, list[int]] = {}
  for i, gram in enumerate(grams):
    alike.setdefault(gram.shape[-1], []).append(i)
  roots: dict[int, jax.Array] = {}
  for rank, places in alike.items():
    flat = [grams[i].reshape(-1, rank, rank) for i in places]
    values, vectors = eigh(jnp.concatenate(flat))
    values = jnp.maximum(values, 0)
    shifted = values + _SHIFT * values[..., -1:]
    scaled = vectors * jax.lax.rsqrt(shifted)[..., None, :]
    ends = itertools.accumulate(len(x) for x in flat)
    for i, x in zip(places, jnp.split(scaled, list(ends)[:-1])):
      roots[i] = x.reshape(grams[i].shape)
  return [roots[i] for i in range(len(grams))]


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def pinv(x: jax.Array) -> jax.Array:
  """The Moore-Penrose pseudo-inverse, `(*batch, n, m)` of `(*batch, m, n)`.

  A singular value counts as zero if it is at most `max(m, n)` times the machine
  epsilon times the largest; the pseudo-inverse of zeros is zero.
  """
  u, sigma, vt = svd(x)
  rounding = max(x.shape[-2:]) * jnp.finfo(x.dtype).eps
  kept = sigma > rounding * sigma[..., :1]
  inverse = jnp.where(kept, 1 / jnp.where(kept, sigma, 1), 0)
  scaled = jnp.swapaxes(vt, -1, -2) * inverse[..., None, :]
  return jnp.matmul(
    scaled, jnp.swapaxes(u, -1, -2), precision=jax.lax.Precision.HIGHEST
  )
