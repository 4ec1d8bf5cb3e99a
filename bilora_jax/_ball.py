"""The ball: scales adapters of any kind until their norm is its radius."""

from collections.abc import Mapping
import math
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax

from bilora_jax import _nodes, _norms

Clip: TypeAlias = Literal["global", "layer"] | None
ScalarOrSchedule: TypeAlias = float | jax.Array | optax.Schedule

# How far outside of a ball, relative to its radius, rounding may leave a norm.
_SLACK = 1e-6


class FrobeniusBallState(NamedTuple):
  """State of `keep_in_ball`.

  Attributes:
    count: number of updates so far, int32 scalar; the argument of a schedule.
    auxiliary_norm: c of equation (10): the norm over all nodes before the last
      clip, float32 scalar, in units of the weights.
    clip_factor: the factor by which the last clip multiplied each parameter,
      float32 scalar; 1 if nothing was clipped, and the smallest factor if nodes
      have different ones.
    radius: rho of the last clip, float32 scalar; before any clip, rho of the
      first.
  """

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
  auxiliary_norm: jax.Array
  clip_factor: jax.Array
  radius: jax.Array


def keep_in_ball(
  rho: ScalarOrSchedule, *, clip: Clip = "global", specs: Any = None
) -> optax.GradientTransformationExtraArgs:
  r"""Modifies the updates to keep adapters of any kind inside one ball.

  Let node j have the perturbation :math:`W_j` after the update, and the degree
  :math:`k_j`: its parameters times t give :math:`t^{k_j} W_j`. Then

  .. math::

    c = \sqrt{\sum_j \|W_j\|_F^2}, \qquad
    \theta_j \leftarrow (\rho / c)^{1 / k_j}\, \theta_j \text{ if } c > \rho

  multiplies each perturbation by :math:`\rho / c`, so that their joint norm is
  rho. For `Factors`, k is 2, and this is equation (10) of the paper.

  In a chain of transformations this must be the last: a later transformation
  can move adapters out of the ball, without an error. Then use `hold_ball`.

  Args:
    rho: radius of the ball, in units of the weights, or a schedule of the
      radius. A value of a schedule or an array that is below 0 or NaN counts
      as 0. Norms include the scale of each pair: rho bounds the change of the
      weights themselves.
    clip: `'global'`, one ball over all nodes; `'layer'`, a ball of radius rho
      for each node, and for each index of its batch axes; `None`, no clip, the
      norm is only recorded. The last two are the paper's ablations.
    specs: only under `jax.shard_map` and `jax.pmap`, where the code sees
      shards: a tree like params, of pairs of `PartitionSpec`. With it, norms
      are those of the whole pairs. `jax.jit` needs no specs for this.

  Returns:
    A transformation of trees of nodes with a `degree` and a `squared_norm`,
    such as `Factors` and the nodes of `bilora_jax.adapters`. Its state records
    the norm before the clip, the clip's factor and the radius, as
    `optax.tree.get(state, 'auxiliary_norm')`, `'clip_factor'` and `'radius'`.
    Its update takes an extra argument `radius` (or `rho`, the old name), which
    overrides `rho` above.

  Raises:
    ValueError: if the number rho is negative or not finite, or clip is unknown;
      on update, if params are missing or hold an array outside of a node, or
      specs do not fit params, shard a rank, or shard nodes that are not pairs.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from bilora_jax import Factors, adapters, keep_in_ball
    >>> params = {
    ...   'w': Factors(jnp.ones((4, 2)), jnp.ones((2, 3))),
    ...   'prompt': adapters.SoftPrompt(jnp.ones((5, 4))),
    ... }
    >>> tx = keep_in_ball(0.05)
    >>> still = optax.tree.zeros_like(params)
    >>> updates, state = tx.update(still, tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> norms = [node.squared_norm() for node in params.values()]
    >>> print(f"{sum(norms) ** 0.5:.4f}")
    0.0500

  References:
    Liu et al, `Bi-LoRA <https://arxiv.org/abs/2508.19564>`_, 2025, equation
    (10). The paper's norm leaves the scale out.

  .. note::
    At rho = 0, the fields that a node lists in `kept`, such as `a` of a pair,
    do not change: if all fields were zero, all gradients would be zero too, and
    a schedule could not start at 0. The same holds if c is infinite.

  .. note::
    Norms are accurate for entries from 1e-30 to 1e30, even if the two factors
    of a pair differ in size. After an update, c is at most `rho * (1 + 1e-6)`,
    unless the parameters before the update were far outside of the ball: Optax
    adds the update to them, and the sum has their rounding error.
  """
  _check_rho(rho)
  if clip not in ("global", "layer", None):
    raise ValueError(f"clip is 'global', 'layer' or None; got {clip!r}.")

  def init_fn(params):
    _norms.nodes(params)
    first = rho(jnp.zeros([], jnp.int32)) if callable(rho) else rho
    return FrobeniusBallState(
      count=jnp.zeros([], jnp.int32),
      auxiliary_norm=jnp.zeros([], jnp.float32),
      clip_factor=jnp.ones([], jnp.float32),
      radius=_radius(first),
    )

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
        "keep_in_ball needs params, the third argument of update; got None."
      )
    given = given_radius(extra_args)
    if given is None:
      given = rho(state.count) if callable(rho) else rho
    radius = _radius(given)
    updates, norm, clip_factor = _clipped(params, updates, radius, clip, specs)
    return updates, FrobeniusBallState(
      count=jnp.asarray(optax.safe_increment(state.count)),
      auxiliary_norm=norm,
      clip_factor=clip_factor,
      radius=radius,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


keep_in_frobenius_ball = keep_in_ball
"""Another name of `keep_in_ball`, for trees of pairs."""


def hold_ball(
  tx: optax.GradientTransformation, *, clip: Clip = "global", specs: Any = None
) -> optax.GradientTransformationExtraArgs:
  """Keeps the auxiliary in its ball if other transformations surround `bilora`.

  A transformation after `bilora` in a chain, such as an average or a scheduled
  scale, moves the auxiliary out of its ball. So does `optax.masked`, which
  passes masked gradients on unchanged. Wrap the whole chain: `hold_ball` brings
  the auxiliary back into the ball, whose radius it reads from the state.

  Args:
    tx: a transformation that contains `bilora`.
    clip: as in `bilora`.
    specs: as in `bilora`.

  Returns:
    A transformation of the partition, with the state of `tx`. Updates of `tx`
    that stay in the ball are returned unchanged, to the bit.

  Raises:
    ValueError: if clip is unknown; on init, if tx contains no ball or several
      balls; on update, if params are missing.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from bilora_jax import Factors, bilora, hold_ball
    >>> pair = Factors(jnp.ones((4, 2)), jnp.zeros((2, 3)))
    >>> adapters = {'primary': {'w': pair}, 'auxiliary': {'w': pair}}
    >>> def norm(tx):
    ...   grads = optax.tree.ones_like(adapters)
    ...   updates, _ = tx.update(grads, tx.init(adapters), adapters)
    ...   moved = optax.apply_updates(adapters, updates)
    ...   return f"{moved['auxiliary']['w'].frobenius_norm():.3f}"
    >>> tx = optax.chain(bilora(optax.sgd(0.1), rho=0.05), optax.scale(2.0))
    >>> norm(tx), norm(hold_ball(tx))
    ('0.155', '0.050')
  """
  if clip not in ("global", "layer"):
    raise ValueError(f"clip of hold_ball is 'global' or 'layer'; got {clip!r}.")
  inner = optax.with_extra_args_support(tx)

  def init_fn(params):
    state = inner.init(params)
    balls = len(_states(state))
    if balls != 1:
      raise ValueError(
        "hold_ball needs a transformation that contains one bilora; got a "
        f"transformation that contains {balls}."
      )
    return state

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
        "hold_ball needs params, the third argument of update; got None."
      )
    updates, state = inner.update(updates, state, params, **extra_args)
    parts, trained = cast(dict[str, Any], updates), cast(Any, params)
    (ball,) = _states(state)
    auxiliary, *_ = _clipped(
      trained["auxiliary"],
      parts["auxiliary"],
      ball.radius,
      clip,
      specs,
      slack=_SLACK,
    )
    return {**parts, "auxiliary": auxiliary}, state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _states(state: Any) -> list[FrobeniusBallState]:
  """The states of all balls in the state of a transformation."""
  balls = optax.tree.get_all_with_path(state, "FrobeniusBallState")
  return [cast(FrobeniusBallState, ball) for _, ball in balls]


def given_radius(extra_args: Mapping[str, Any]) -> Any:
  """The radius among the extra arguments of an update, or None."""
  radius = extra_args.get("radius")
  # Its name until 0.1.
  return extra_args.get("rho") if radius is None else radius


def _clipped(
  params: Any,
  updates: Any,
  radius: jax.Array,
  clip: Clip,
  specs: Any,
  slack: float = 0.0,
) -> tuple[Any, jax.Array, jax.Array]:
  """Updates that end in the ball, the norm before, and the smallest factor."""
  proposed = optax.apply_updates(params, updates)
  norm, each, shards = _norms.norms(proposed, specs)
  clip_factor = jnp.float32(1.0)
  if clip is None:
    return updates, norm, clip_factor
  nodes = _norms.nodes(proposed)
  if clip == "global":
    factors = [_shrinkage(norm, radius, node.degree, slack) for node in nodes]
    smallest = list(
      {node.degree: f for node, f in zip(nodes, factors)}.values()
    )
  else:
    factors = [
      _shrinkage(size, radius, node.degree, slack)
      for node, size in zip(nodes, each)
    ]
    smallest = [
      _norms.across(jax.lax.pmin, axes, jnp.min(factor, initial=1.0))
      for axes, factor in zip(shards, factors)
    ]
  for factor in smallest:
    clip_factor = jnp.minimum(clip_factor, factor)
  factor = iter(factors)

  def project(old, update, new):
    # A masked node stays masked.
    if not _nodes.is_seen(new):
      return update
    return _projected(old, update, new, next(factor))

  updates = jax.tree.map(
    project, params, updates, proposed, is_leaf=_nodes.is_adapter
  )
  return updates, norm, clip_factor


def _radius(value: Any) -> jax.Array:
  """The radius in float32, 0 if the value is negative or NaN."""
  value = jnp.asarray(value, jnp.float32)
  return jnp.where(value > 0, value, 0.0)


def _shrinkage(
  norm: jax.Array, radius: jax.Array, degree: int, slack: float
) -> jax.Array:
  """The factor of the parameters that brings `norm` down to `radius`."""
  outside = norm > radius * (1 + slack) if slack else norm > radius
  ratio = radius / jnp.where(outside, norm, 1)
  return jnp.where(outside, _root(ratio, degree), 1)


def _root(x: jax.Array, degree: int) -> jax.Array:
  match degree:
    case 1:
      return x
    case 2:
      return jnp.sqrt(x)
    case 4:
      return jnp.sqrt(jnp.sqrt(x))
    case 3:
      return jnp.cbrt(x)
  return x ** (1 / degree)


def _projected(old: Any, update: Any, new: Any, factor: jax.Array) -> Any:
  """The update from `old` to `factor * new`; that of held fields stays."""

  def one(name, p, u, x):
    if _nodes.is_held(new, name):
      return u
    f = (
      jnp.where(factor > 0, factor, 1) if _nodes.is_kept(new, name) else factor
    )
    f = _nodes.expanded(f, x.ndim) if f.ndim else f
    shrunk = (f * x.astype(jnp.float32) - p.astype(jnp.float32)).astype(u.dtype)
    # Inside the ball the optimizer's update stays unchanged, to the bit.
    return jnp.where(f < 1, shrunk, u)

  return _nodes.map_fields(one, old, update, new)


def _check_rho(rho: ScalarOrSchedule) -> None:
  # Under optax.inject_hyperparams rho is an array; `_radius` clamps it.
  if callable(rho) or isinstance(rho, jax.Array):
    return
  if not (math.isfinite(rho) and rho >= 0):
    raise ValueError(
      f"rho, the radius of the auxiliary's ball, is finite and at least 0; "
      f"got {rho}."
    )
