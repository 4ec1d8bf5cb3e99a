"""The ball: adapters of any kinds, scaled until their norm is its radius."""

from collections.abc import Mapping
import math
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax

from bilora_jax import _nodes, _norms

Clip: TypeAlias = Literal["global", "layer"] | None
ScalarOrSchedule: TypeAlias = float | jax.Array | optax.Schedule

# What rounding may leave outside of a ball.
_SLACK = 1e-6


class FrobeniusBallState(NamedTuple):
  """State of `keep_in_ball`.

  Attributes:
    count: number of updates so far, int32 scalar; the argument of a schedule.
    auxiliary_norm: c of equation (10): the norm over all nodes before the last
      clip, float32 scalar, in units of the weights.
    clip_factor: what the last clip multiplied each parameter by, float32
      scalar; 1 if nothing was clipped, the smallest over all nodes if they
      differ.
    radius: rho of the last clip, float32 scalar; before any, that of the first.
  """

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
  auxiliary_norm: jax.Array
  clip_factor: jax.Array
  radius: jax.Array


def keep_in_ball(
  rho: ScalarOrSchedule, *, clip: Clip = "global", specs: Any = None
) -> optax.GradientTransformationExtraArgs:
  r"""Modifies the updates to keep adapters of any kinds inside one ball.

  Let node j have the perturbation :math:`W_j`, after the update, and the degree
  :math:`k_j`: its parameters times t stand for :math:`t^{k_j} W_j`. Then

  .. math::

    c = \sqrt{\sum_j \|W_j\|_F^2}, \qquad
    \theta_j \leftarrow (\rho / c)^{1 / k_j}\, \theta_j \text{ if } c > \rho

  brings each node to :math:`\rho / c` of its size, and all of them to the
  sphere. Of `Factors`, where k is 2, this is equation (10) of the paper.

  In a chain of transformations this is the last one: what comes after it may
  leave the ball, and nothing says so. `hold_ball` holds it all the same.

  Args:
    rho: radius of the ball, in units of the weights, or a schedule of it. The
      value of a schedule or an array counts as 0 if it is below 0 or NaN. The
      scale of each pair counts: rho bounds what the weights really get.
    clip: `'global'`, one ball over all nodes; `'layer'`, a ball of radius rho
      for each node, and for each index of its batch axes; `None`, no clip, the
      norm is only recorded. The last two are the paper's ablations.
    specs: only under `jax.shard_map` and `jax.pmap`, where the code sees
      shards: a tree like params, of pairs of `PartitionSpec`. Norms are then
      those of the whole pairs. Under `jax.jit` they are so without it.

  Returns:
    A transformation of trees of nodes with a `degree` and a `squared_norm`, as
    `Factors` and those of `bilora_jax.adapters`. Its state records the norm
    before the clip, the clip's factor and the radius, as
    `optax.tree.get(state, 'auxiliary_norm')`, `'clip_factor'` and `'radius'`.
    Its update takes an extra argument `radius` (or `rho`, its old name), that
    counts in place of the one given here.

  Raises:
    ValueError: if the number rho is negative or not finite, or clip is unknown;
      on update, if params are missing or hold an array outside of a node, or
      specs do not fit them, shard a rank, or shard nodes that are no pairs.

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
    (10). There the scale is left out of the norm.

  .. note::
    At rho = 0 the fields that a node names in `kept` stay, as `a` of a pair:
    with all of them zero it would stay there for ever, and a schedule could
    not start at 0. The same holds where c is infinite.

  .. note::
    Norms are right for entries from 1e-30 to 1e30, of lopsided pairs too.
    After an update c is at most `rho * (1 + 1e-6)`, unless the parameters
    before it were far outside of the ball: Optax adds updates, and their sum
    has the rounding of what they are added to.
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
"""`keep_in_ball`, by the name that it has for pairs."""


def hold_ball(
  tx: optax.GradientTransformation, *, clip: Clip = "global", specs: Any = None
) -> optax.GradientTransformationExtraArgs:
  """Holds the auxiliary in its ball, whatever stands around `bilora`.

  What follows `bilora` in a chain, an average or a scheduled scale, moves the
  auxiliary out of its ball, and so does `optax.masked`, which passes on the
  gradients that it hides. Put this around all of it: after the last of them the
  auxiliary is brought back into the ball of the radius that is in the state.

  Args:
    tx: with `bilora` somewhere in it.
    clip: see `keep_in_ball`; as in `bilora`.
    specs: likewise.

  Returns:
    A transformation of the partition. Its state is that of `tx`, and so are its
    updates, to the bit, where those stay in the ball.

  Raises:
    ValueError: if clip is unknown; on init, if tx has no ball, or several; on
      update, if params are missing.

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
        "hold_ball holds the ball of one bilora; the transformation that it "
        f"got has {balls}."
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
  """The states of balls in the state of any transformation."""
  found = optax.tree.get_all_with_path(state, "FrobeniusBallState")
  return [cast(FrobeniusBallState, ball) for _, ball in found]


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
  """The updates that end in the ball, the norm, and the smallest factor."""
  proposed = optax.apply_updates(params, updates)
  norm, each, shards = _norms.norms(proposed, specs)
  clip_factor = jnp.float32(1.0)
  if clip is None:
    return updates, norm, clip_factor
  found = _norms.nodes(proposed)
  if clip == "global":
    factors = [_shrinkage(norm, radius, node.degree, slack) for node in found]
    smallest = list(
      {node.degree: f for node, f in zip(found, factors)}.values()
    )
  else:
    factors = [
      _shrinkage(size, radius, node.degree, slack)
      for node, size in zip(found, each)
    ]
    smallest = [
      _norms.across(jax.lax.pmin, axes, jnp.min(factor, initial=1.0))
      for axes, factor in zip(shards, factors)
    ]
  for factor in smallest:
    clip_factor = jnp.minimum(clip_factor, factor)
  factor = iter(factors)

  def project(old, update, new):
    # What a mask hides stays hidden.
    if not _nodes.is_seen(new):
      return update
    return _projected(old, update, new, next(factor))

  updates = jax.tree.map(
    project, params, updates, proposed, is_leaf=_nodes.is_adapter
  )
  return updates, norm, clip_factor


def _radius(value: Any) -> jax.Array:
  """The radius, where what is negative or NaN is 0."""
  value = jnp.asarray(value, jnp.float32)
  return jnp.where(value > 0, value, 0.0)


def _shrinkage(
  norm: jax.Array, radius: jax.Array, degree: int, slack: float
) -> jax.Array:
  """What to multiply parameters by to bring `norm` down to `radius`."""
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
  """The update that takes `old` to `factor * new`, where fields move."""

  def one(name, p, u, x):
    if _nodes.is_held(new, name):
      return u
    f = (
      jnp.where(factor > 0, factor, 1) if _nodes.is_kept(new, name) else factor
    )
    f = _nodes.expanded(f, x.ndim) if f.ndim else f
    shrunk = (f * x.astype(jnp.float32) - p.astype(jnp.float32)).astype(u.dtype)
    # Inside the ball the optimizer's own update is left as it is, to the bit.
    return jnp.where(f < 1, shrunk, u)

  return _nodes.map_fields(one, old, update, new)


def _check_rho(rho: ScalarOrSchedule) -> None:
  # Under optax.inject_hyperparams rho is an array, which is clamped.
  if callable(rho) or isinstance(rho, jax.Array):
    return
  if not (math.isfinite(rho) and rho >= 0):
    raise ValueError(
      f"rho, the radius of the auxiliary's ball, is finite and at least 0; "
      f"got {rho}."
    )
