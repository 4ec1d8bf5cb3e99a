"""The auxiliary as the best ascent direction of the last gradient."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilora_jax import _linalg, _norms, _stacks
from bilora_jax._factors import Factors

# Norm of the result, which the ball then brings down to rho. It is far outside
# of any ball, and its square is far from the limits of float32.
_OUTSIDE = 1e4
_USER = "power_ascent"


class PowerAscentState(NamedTuple):
  """State of `power_ascent`.

  Attributes:
    count: number of updates with a nonzero gradient so far, int32 scalar: `b`
      is renewed at even counts, `a` at odd counts.
  """

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def power_ascent(
  decay: float | jax.Array = 0.0,
) -> optax.GradientTransformation:
  r"""Climbs at an infinite rate: subspace iteration towards the gradient.

  In each pair :math:`W = s\,a\,b`, one factor is orthonormal. Let :math:`G` be
  the gradient in the weight. The gradient of the other factor is :math:`G` on
  the span of the orthonormal factor, and the next weight is the projection of
  :math:`G` onto that span,

  .. math::

    W' \propto a a^\top G \;\; (t \text{ even}), \qquad
    W' \propto G\, b^\top b \;\; (t \text{ odd}),

  with one constant over all pairs, so that :math:`W'` is the direction in the
  spans in which the linearised loss rises most. Then the new factor is made
  orthonormal instead. If the gradient is constant, this is block power
  iteration: from almost any start, :math:`W'` tends to :math:`G_r`, the
  gradient's best rank-r approximation, with the error
  :math:`(\sigma_{r+1} / \sigma_r)^t` in each layer. In the ball, it tends to
  :math:`\rho\, G_r / \|G_r\|_F` with one norm over all layers, the maximiser of
  proposition 3. An update of both factors at once, as in gradient ascent, would
  square the singular values in each step, until the largest alone was left.

  Args:
    decay: weight, from 0 to below 1, of the old :math:`W / \|W\|` in an average
      with the new direction, on its span. With 0, the first-order gain
      :math:`\langle G, W' \rangle` is never negative.

  Returns:
    An optimizer of trees of `Factors` without a learning rate, for `bilora` as
    `auxiliary_optimizer`. The auxiliary has a norm of about 1e4 before the
    clip, so that the clip always acts; use it with a clip only. If all
    gradients are zero, nothing moves.

  Raises:
    ValueError: if decay is negative, or 1 or more; on init, if the tree holds
      an array outside of a pair; on update, if params are missing.

  References:
    Golub and Van Loan, Matrix Computations, 4th edition, section 8.2.4, for
    the iteration; Liu et al, `Bi-LoRA <https://arxiv.org/abs/2508.19564>`_,
    2025, proposition 3, corrected: as printed the maximiser leaves the ball.

  .. note::
    From any initialisation, the first step climbs, and one factor is
    orthonormal from the second step on. While b = 0, as LoRA starts, b is
    renewed. Besides the gradient, each step costs an orthonormal basis of one
    (in, r) or (out, r) matrix for each pair, about 14 r^2 operations a row:
    matrix products, and decompositions of (r, r) matrices only. Not for factors
    that `jax.shard_map` shards.
  """
  # Under optax.inject_hyperparams decay is an array of unknown value.
  if not isinstance(decay, jax.Array) and not (
    math.isfinite(decay) and 0 <= decay < 1
  ):
    raise ValueError(
      f"decay, of the old direction, is at least 0 and below 1; got {decay}."
    )

  def init_fn(params):
    _norms.pairs(params, user=_USER)
    return PowerAscentState(count=jnp.zeros([], jnp.int32))

  def update_fn(updates, state, params=None):
    if params is None:
      raise ValueError(
        "power_ascent needs params, the third argument of update; got None."
      )
    stacks = _stacks.alike(params)
    old, ascent = (
      optax.tree.cast(stacks.stack(_norms.pairs(tree, _USER)), jnp.float32)
      for tree in (params, updates)
    )
    size = optax.tree.norm(ascent)
    moves = size != 0
    # Where the auxiliary ascends, the updates are negated gradients. At norm 1
    # no square underflows.
    ascent = optax.tree.scale(-1 / jnp.where(moves, size, 1), ascent)
    # No `lax.cond`: on a GPU the host would wait to know which branch to take.
    new = _renewed(old, ascent, decay=decay, of_b=state.count % 2 == 0)
    moved = jax.tree.map(lambda x, y: jnp.where(moves, y - x, 0), old, new)
    in_order = iter(stacks.unstack(moved))
    updates = _norms.map_pairs(
      lambda pair: jax.tree.map(
        lambda p, x: x.astype(p.dtype), pair, next(in_order)
      ),
      params,
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    return updates, PowerAscentState(jnp.where(moves, count, state.count))

  return optax.GradientTransformation(init_fn, update_fn)


def _renewed(old: Any, ascent: Any, *, decay: Any, of_b: jax.Array) -> Any:
  """The pairs with one factor renewed and then made orthonormal."""
  scales = _norms.map_pairs(lambda p: _scale(p, of_b), old)
  old = _norms.map_pairs(_rescaled, old, scales)
  # The gradients are now those in the rescaled factors.
  ascent = _norms.map_pairs(
    lambda g, scale: _rescaled(g, 1 / scale), ascent, scales
  )
  mean = _normalised(
    old, _norms.map_pairs(_projected, old, ascent), of_b, 1 - decay
  )
  if isinstance(decay, jax.Array) or decay:
    mean = _norms.map_pairs(_sum, mean, _normalised(old, old, of_b, decay))

  def joined(pair, new):
    renews_b = _renews_b(pair, of_b)
    a = jnp.where(renews_b, pair.a, new.a)
    b = jnp.where(renews_b, new.b, pair.b)
    return Factors(a, b, pair.scale)

  return _orthonormal(_norms.map_pairs(joined, old, mean), of_b)


def _renews_b(pair: Factors, of_b: jax.Array) -> jax.Array:
  """Whether it is b's turn, or a has no gradient, `(*batch, 1, 1)`."""
  return of_b | jnp.all(pair.b == 0, (-2, -1), keepdims=True)


def _scale(pair: Factors, of_b: jax.Array) -> jax.Array:
  """The number to divide `a` by and to multiply `b` by, `(*batch, 1, 1)`.

  It gives the factor that stays the norm of an orthonormal factor: the clip
  has scaled it, and gradients of pairs could not be compared otherwise.
  """

  def size(x):
    square = jnp.sum(x**2, (-2, -1), keepdims=True) / min(x.shape[-2:])
    return jnp.sqrt(jnp.where(square > 0, square, 1))

  return jnp.where(_renews_b(pair, of_b), size(pair.a), 1 / size(pair.b))


def _rescaled(pair: Factors, scale: jax.Array) -> Factors:
  return Factors(pair.a / scale, pair.b * scale, pair.scale)


def _projected(pair: Factors, ascent: Factors) -> Factors:
  """G on the span of the other factor, for each factor as if it were renewed.

  The gradient has the scale s as a factor, and so has the weight.
  """
  c = 1 / pair.scale**2
  return Factors(c * ascent.a, c * ascent.b, pair.scale)


def _normalised(old: Any, new: Any, of_b: jax.Array, share: Any) -> Any:
  """The renewed factors, scaled to weights of the norm `share * _OUTSIDE`."""

  def square(pair, x):
    a, b = (jnp.sum(f**2, (-2, -1), keepdims=True) for f in (x.a, x.b))
    return x.scale**2 * jnp.sum(jnp.where(_renews_b(pair, of_b), b, a))

  norm = jnp.sqrt(optax.tree.sum(_norms.map_pairs(square, old, new)))
  factor = share * _OUTSIDE / jnp.where(norm > 0, norm, 1)
  return jax.tree.map(lambda x: factor * x, new)


def _sum(x: Factors, y: Factors) -> Factors:
  return Factors(x.a + y.a, x.b + y.b, x.scale)


def _orthonormal(tree: Any, of_b: jax.Array) -> Any:
  """The same weights with an orthonormal `b`, or else `a`, up to one scale.

  The scale is the same for all pairs and gives both factors about the same
  size: they change roles at each step, and a difference of unequal sizes would
  lose the smaller to rounding.
  """
  matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  size = math.sqrt(_OUTSIDE)
  pairs = _norms.pairs(tree, user=_USER)
  # All at once: hundreds of pairs would each launch kernels of their own.
  factors = [_factor(pair, of_b) for pair in pairs]
  bases = iter(
    _linalg.orthonormal([x for x, _ in factors], [r for _, r in factors])
  )

  def one(pair):
    q = next(bases)
    of_a, of_bt = (q[..., :n, :] for n in (pair.a.shape[-2], pair.b.shape[-1]))
    return Factors(
      jnp.where(
        of_b, matmul(pair.a, matmul(pair.b, of_bt)) / size, size * of_a
      ),
      jnp.where(
        of_b, size * of_bt.mT, matmul(matmul(of_a.mT, pair.a), pair.b) / size
      ),
      pair.scale,
    )

  return _norms.map_pairs(one, tree)


def _factor(pair: Factors, of_b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The transpose of `b`, or else `a`, padded to one length; its true rows."""
  both = pair.a, pair.b.mT
  longest = max(x.shape[-2] for x in both)
  a, b = (
    jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, longest - x.shape[-2]), (0, 0)])
    for x in both
  )
  size_in, size_out = (x.shape[-2] for x in both)
  rows = jnp.arange(longest) < jnp.where(of_b, size_out, size_in)
  return jnp.where(of_b, b, a), rows
