"""Decompositions of batches of matrices, as `jnp.linalg` has them.

In jaxlib 0.10 and 0.11 those of a batch can wait for each other forever on the
CPU: each is spread over the pool of threads that the program itself runs on,
and holds one of them until its parts are done. As many at once as there are
threads, as of a model's layers or under vmap, and none is left for the parts.
One matrix is not spread. From 0.12 on no batch is (jax commit 859992407d), and
when that is the oldest supported, this file can go.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp


def _in_turn(decompose: Callable[[jax.Array], Any]) -> Callable[..., Any]:
  """Takes a batch's matrices in turn on the CPU, and at once elsewhere."""
  # A map alone would be batched by a vmap around it.
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

  # Such a map has no reverse mode; the decomposition's own derivative has.
  @decomposed.defjvp
  def _(primals, tangents):
    return jax.jvp(decompose, primals, tangents)

  return functools.wraps(decompose)(decomposed)


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
  """Eigenvalues of symmetric matrices, in ascending order, and vectors."""
  values, vectors = jnp.linalg.eigh(x)
  return values, vectors


def pinv(x: jax.Array) -> jax.Array:
  """The Moore-Penrose pseudo-inverse, `(*batch, n, m)` of `(*batch, m, n)`.

  A singular value counts as zero where it is at most `max(m, n)` roundings of
  the largest; the pseudo-inverse of zeros is zero.
  """
  u, sigma, vt = svd(x)
  rounding = max(x.shape[-2:]) * jnp.finfo(x.dtype).eps
  kept = sigma > rounding * sigma[..., :1]
  inverse = jnp.where(kept, 1 / jnp.where(kept, sigma, 1), 0)
  scaled = jnp.swapaxes(vt, -1, -2) * inverse[..., None, :]
  return jnp.matmul(
    scaled, jnp.swapaxes(u, -1, -2), precision=jax.lax.Precision.HIGHEST
  )
