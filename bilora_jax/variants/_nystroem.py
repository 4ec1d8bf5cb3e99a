"""The auxiliary as SAM's perturbation of the current batch, shown twice."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilora_jax import _norms
from bilora_jax.variants import _sketches

# Norm of the result, which the ball then brings down to rho. It is far outside
# of any ball, and its square is far from the limits of float32.
_OUTSIDE = 1e4


class NystroemAscentState(NamedTuple):
  """State of `nystroem_ascent`.

  Attributes:
    count: number of updates so far, int32 scalar.
  """

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def nystroem_ascent(
  core_rank: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Climbs to SAM's perturbation of a batch; each must come twice in a row.

  At the first visit of a batch, the auxiliary perturbs next to nothing: its
  factors are orthonormal, times a small number, and their gradients are two
  thin sketches of :math:`G`, the gradient in the weight. From these sketches,
  the update moves the auxiliary to the generalised Nystroem approximation of
  :math:`G`,

  .. math::

    W' \propto \hat G = (G b^\top)\, (a^\top G b^\top)_k^+\, (a^\top G),

  with one constant over all pairs. In the ball, this is SAM's perturbation of
  the whole weights, except that its rank is k and that the primary has moved by
  one step. At the second visit, the gradient is taken at this perturbation, and
  the update makes the next sketches, along its k directions and along random
  directions. The primary descends at both visits.

  Args:
    core_rank: k; by default half of the auxiliary's rank. The core has as many
      columns as rows, and its smaller singular values are noise: without the
      cut, the approximation is worthless.

  Returns:
    An optimizer of trees of `Factors` without a learning rate, for `bilora` as
    `auxiliary_optimizer`. After a first visit the auxiliary has a norm of 1e4
    before the clip, so that the clip always acts; use it with a clip only. An
    extra argument `step` of its update, an int32 scalar, overrides its own
    count, which differs if steps are skipped; first visits are at even counts.

  Raises:
    ValueError: on init, if core_rank is not from 1 to each pair's rank, or the
      tree holds an array outside of a pair; on update, if params are missing.

  References:
    Nakatsukasa, `Fast and stable randomized low-rank matrix approximation
    <https://arxiv.org/abs/2009.11392>`_, 2020, and Tropp et al, `Practical
    sketching algorithms for low-rank matrix approximation
    <https://arxiv.org/abs/1609.00048>`_, 2017, for the approximation; Foret et
    al, `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_,
    2021, for the perturbation that it approximates.

  .. note::
    With LoRA's initialisation, b = 0, the first batch meets no perturbation.
    Besides the gradient, a step costs three decompositions of (r, r) matrices
    and four thin products for each pair. Not for factors that `jax.shard_map`
    shards.
  """

  def init_fn(params):
    for pair in _norms.pairs(params, user="nystroem_ascent"):
      _sketches.core_rank_of(pair.rank, core_rank)
    return NystroemAscentState(count=jnp.zeros([], jnp.int32))

  def update_fn(updates, state, params=None, *, step=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
        "nystroem_ascent needs params, the third argument of update; got None."
      )
    step = state.count if step is None else step
    key = jax.random.fold_in(jax.random.key(0), step)
    # Where the auxiliary ascends, the updates are negated gradients.
    gradient = jax.tree.map(jnp.negative, updates)
    # No `lax.cond`: on a GPU the host would wait to know which branch to take.
    new = jax.tree.map(
      functools.partial(jnp.where, step % 2 == 0),
      _sketches.ascent(params, gradient, core_rank, _OUTSIDE),
      _sketches.redrawn(key, params, core_rank),
    )
    updates = jax.tree.map(
      lambda x, p: (x - p.astype(jnp.float32)).astype(p.dtype), new, params
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    return updates, NystroemAscentState(count)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
