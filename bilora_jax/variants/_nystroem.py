"""The auxiliary as the adversary of the batch that it meets, which is shown."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilora_jax import _norms
from bilora_jax.variants import _sketches

# The norm that comes out, which the ball then brings down to rho. Far outside
# of any ball, and its square far from float32's ends.
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
  r"""Climbs to a batch's own adversary, if each batch comes twice in a row.

  At the first visit of a batch the auxiliary perturbs next to nothing: its
  factors are orthonormal, times a small number, and their gradients are two
  thin sketches of :math:`G`, the gradient in the weight. The update makes of
  it the generalised Nystroem approximation of :math:`G` from those sketches,

  .. math::

    W' \propto \hat G = (G b^\top)\, (a^\top G b^\top)_k^+\, (a^\top G),

  with one constant over all pairs. In the ball that is SAM's perturbation of
  the whole weights, but for its rank, k, and for one step of the primary. At
  the second visit the batch meets it, and the update makes the next sketches,
  along its k directions and random ones. The primary descends at both visits.

  Args:
    core_rank: k; by default half of the auxiliary's rank. The core has as many
      columns as rows, and its smaller singular values are noise: without the
      cut, the approximation is worthless.

  Returns:
    An optimizer of trees of `Factors` without a learning rate, for `bilora` as
    `auxiliary_optimizer`. What comes out of a first visit has a norm of 1e4, so
    that the clip always acts; without a clip it is of no use. An extra argument
    `step` to its update, an int32 scalar, counts in place of its own count:
    first visits are at even ones. The two differ where steps are skipped.

  Raises:
    ValueError: on init, if core_rank is not from 1 to each pair's rank, or the
      tree holds an array outside of a pair; on update, if params are missing.

  References:
    Nakatsukasa, `Fast and stable randomized low-rank matrix approximation
    <https://arxiv.org/abs/2009.11392>`_, 2020, and Tropp et al, `Practical
    sketching algorithms for low-rank matrix approximation
    <https://arxiv.org/abs/1609.00048>`_, 2017, for the approximation; Foret et
    al, `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_,
    2021, for what it stands in for.

  .. note::
    From LoRA's start, b = 0, the first batch meets no adversary. Beside the
    gradient, a step costs a pair three decompositions of (r, r) matrices and
    four thin products. Not for factors that `jax.shard_map` shards.
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
    # What comes in is to be descended.
    gradient = jax.tree.map(jnp.negative, updates)
    # No `lax.cond`: on a GPU the host would wait to know which branch it is.
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
