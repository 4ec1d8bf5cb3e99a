"""Bi-LoRA as an Optax gradient transformation."""

from collections.abc import Callable
import math
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import optax

from bilora_jax import _partition
from bilora_jax._factors import Factors, batch_axes, is_factors

Clip: TypeAlias = Literal["global", "layer"] | None
ScalarOrSchedule: TypeAlias = float | jax.Array | optax.Schedule


class FrobeniusBallState(NamedTuple):
  """State of `keep_in_frobenius_ball`.

  Attributes:
    count: number of updates so far, int32 scalar; the argument of a schedule.
    auxiliary_norm: c of equation (10): the norm over all pairs before the last
      clip, float32 scalar, in units of the weights.
    clip_factor: what the last clip multiplied each factor by, float32 scalar;
      1 if nothing was clipped, the smallest over all layers with
      `clip='layer'`.
  """

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
  auxiliary_norm: jax.Array
  clip_factor: jax.Array


def keep_in_frobenius_ball(
  rho: ScalarOrSchedule, *, clip: Clip = "global", specs: Any = None
) -> optax.GradientTransformationExtraArgs:
  r"""Modifies the updates to keep low-rank pairs inside a Frobenius ball.

  With :math:`W_j = s_j a_j b_j` the weight of pair j after the update,

  .. math::

    c = \sqrt{\sum_j \|W_j\|_F^2}, \qquad
    (a_j, b_j) \leftarrow \sqrt{\rho / c}\,(a_j, b_j) \text{ if } c > \rho

  In a chain of transformations, this should be the last one.

  Args:
    rho: radius of the ball, in units of the weights, or a schedule of it. The
      scale of each pair counts: rho bounds what the weights really get.
    clip: `'global'`, one ball over all pairs; `'layer'`, a ball of radius rho
      for each pair, and for each index of its batch axes; `None`, no clip, the
      norm is only recorded. The last two are the paper's ablations.
    specs: only under `jax.shard_map` and `jax.pmap`, where the code sees
      shards: a tree like params, of pairs of `PartitionSpec`. Norms are then
      those of the whole pairs. Under `jax.jit` they are so without it.

  Returns:
    A transformation of trees of `Factors`. Its state records the norm before
    the clip and the clip's factor, as `optax.tree.get(state,
    'auxiliary_norm')` and `'clip_factor'`. Its update takes an extra argument
    `rho`, a radius that counts in place of the one given here.

  Raises:
    ValueError: if rho is negative or not finite, or clip is unknown; on update,
      if params are missing or hold an array outside of a pair, or specs do not
      fit them or shard a rank.

  References:
    Liu et al, `Bi-LoRA <https://arxiv.org/abs/2508.19564>`_, 2025, equation
    (10). There the scale is left out of the norm.

  .. note::
    At rho = 0 only `b` is set to zero: with `a` zero too the pair would stay
    there for ever, and a schedule could not start at 0.
  """
  _check_rho(rho)
  if clip not in ("global", "layer", None):
    raise ValueError(f"clip is 'global', 'layer' or None; got {clip!r}.")

  def init_fn(params):
    pairs(params)
    return FrobeniusBallState(
      count=jnp.zeros([], jnp.int32),
      auxiliary_norm=jnp.zeros([], jnp.float32),
      clip_factor=jnp.ones([], jnp.float32),
    )

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
        "keep_in_frobenius_ball needs params, the third argument of update; "
        "got None."
      )
    radius = extra_args.get("rho")
    if radius is None:
      radius = rho(state.count) if callable(rho) else rho
    radius = jnp.asarray(radius, jnp.float32)
    proposed = optax.apply_updates(params, updates)
    norm, squares, shards = norms(proposed, specs)

    clip_factor = jnp.float32(1.0)
    if clip is not None:
      if clip == "global":
        clip_factor = _shrinkage(norm, radius)
        factors = [clip_factor] * len(squares)
      else:
        factors = [_shrinkage(jnp.sqrt(square), radius) for square in squares]
        smallest = [
          _over(jax.lax.pmin, axes, jnp.min(factor, initial=1.0))
          for axes, factor in zip(shards, factors)
        ]
        clip_factor = jnp.min(jnp.stack([clip_factor, *smallest]))
      factor = iter(factors)

      def project(old, update, new):
        # What a mask hides stays hidden.
        return (
          update
          if not is_pair(new)
          else _projected(old, update, new, next(factor), radius)
        )

      updates = jax.tree.map(
        project, params, updates, proposed, is_leaf=is_factors
      )
    return updates, FrobeniusBallState(
      count=jnp.asarray(optax.safe_increment(state.count)),
      auxiliary_norm=norm,
      clip_factor=clip_factor,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def bilora(
  optimizer: optax.GradientTransformation,
  rho: ScalarOrSchedule = 0.05,
  auxiliary_optimizer: optax.GradientTransformation | None = None,
  *,
  clip: Clip = "global",
  direction: Literal["ascent", "descent"] = "ascent",
  specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Bi-LoRA: the primary descends the loss, the auxiliary climbs it in a ball.

  For frozen :math:`W_0` and one gradient
  :math:`G = \nabla L(W_0 + B_1 A_1 + B_2 A_2)`, with gradient descent,

  .. math::

    \begin{align*}
      B_1 &\leftarrow B_1 - \eta\, G A_1^\top, &
      A_1 &\leftarrow A_1 - \eta\, B_1^\top G, \\
      B_2 &\leftarrow B_2 + \eta\, G A_2^\top, &
      A_2 &\leftarrow A_2 + \eta\, B_2^\top G,
    \end{align*}

  all from the values before the step; then all of :math:`(B_2, A_2)` are
  scaled back into :math:`\sum_j \|B_{2,j} A_{2,j}\|_F^2 \le \rho^2`. The
  auxiliary approximates the adversary of Sharpness-Aware Minimization, at the
  cost of LoRA: nothing is evaluated twice.

  Args:
    optimizer: what the primary and the extra parameters descend with.
    rho: radius of the auxiliary's ball, in units of the weights, or a schedule
      of it.
    auxiliary_optimizer: what the auxiliary climbs with; by default
      `optimizer`, with a state of its own. It is fed the negated gradient, so
      weight decay still decays.
    clip: see `keep_in_frobenius_ball`.
    direction: `'ascent'`, or `'descent'` for the paper's ablation Dual-LoRA,
      in which the auxiliary descends too.
    specs: of all parameters, as `Adapted.partition_specs` gives them; only
      under `jax.shard_map` and `jax.pmap` with sharded factors, see
      `keep_in_frobenius_ball`.

  Returns:
    A transformation of the partition, a dict of `primary` and `auxiliary`,
    trees of `Factors`, and `extra`, any other parameters, which is optional.

  Raises:
    ValueError: if rho is negative or not finite, clip or direction unknown; on
      init, if the parameters are not so partitioned.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from bilora_jax import bilora, Factors
    >>> pair = Factors(a=jnp.ones((4, 2)), b=jnp.zeros((2, 3)))
    >>> adapters = {'primary': {'w': pair}, 'auxiliary': {'w': pair}}
    >>> tx = bilora(optax.sgd(0.1), rho=0.05)
    >>> state = tx.init(adapters)
    >>> grads = jax.tree.map(jnp.ones_like, adapters)
    >>> updates, state = tx.update(grads, state, adapters)
    >>> adapters = optax.apply_updates(adapters, updates)
    >>> print(f"{adapters['auxiliary']['w'].frobenius_norm():.3f}")
    0.050
    >>> print(f"{optax.tree.get(state, 'auxiliary_norm'):.3f}")
    0.762

  References:
    Liu et al, `Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning
    Large-Scale Models <https://arxiv.org/abs/2508.19564>`_, 2025, equations
    (8) to (10).

  .. note::
    Wrap `bilora` in `optax.MultiSteps`, not the optimizer inside of it, and
    evaluate with `primary(adapters)`.
  """
  if direction not in ("ascent", "descent"):
    raise ValueError(f"direction is 'ascent' or 'descent'; got {direction!r}.")
  sign = -1.0 if direction == "ascent" else 1.0
  inner = optax.partition(
    {
      "primary": optimizer,
      "auxiliary": optax.chain(
        optax.scale(sign),
        optimizer if auxiliary_optimizer is None else auxiliary_optimizer,
        keep_in_frobenius_ball(rho, clip=clip, specs=specs),
      ),
    },
    _partition.labels,
  )

  def init_fn(params):
    _partition.check_parts(params)
    if "auxiliary" not in params:
      raise ValueError(
        "bilora trains a primary and an auxiliary; the parameters hold only "
        f"{sorted(params)}. For plain LoRA use the optimizer alone."
      )
    return inner.init(params)

  return optax.GradientTransformationExtraArgs(init_fn, inner.update)


def _check_rho(rho: ScalarOrSchedule) -> None:
  # Under optax.inject_hyperparams rho is traced, and its value unknown.
  if callable(rho) or isinstance(rho, jax.core.Tracer):
    return
  if not (math.isfinite(rho) and rho >= 0):
    raise ValueError(
      f"rho, the radius of the auxiliary's ball, is finite and at least 0; "
      f"got {rho}."
    )


def norms(
  tree: Any, specs: Any = None, user: str = "keep_in_frobenius_ball"
) -> tuple[jax.Array, list[jax.Array], list[tuple[str, ...]]]:
  """The norm over all pairs of a tree, from the square of each pair's.

  Args:
    tree: of `Factors`; those that a mask hides do not count.
    specs: as in `keep_in_frobenius_ball`.
    user: who asks, for the error's message.

  Returns:
    The norm, the pairs' squares, and the mesh axes to add these up over.
  """
  found, pair_specs = pairs(tree, user), _pair_specs(specs, tree)
  squares = [pair.squared_norm(spec) for pair, spec in zip(found, pair_specs)]
  shards = [
    () if spec is None else batch_axes(pair, spec)
    for pair, spec in zip(found, pair_specs)
  ]
  sums = (_over(jax.lax.psum, x, jnp.sum(s)) for x, s in zip(shards, squares))
  return jnp.sqrt(sum(sums, start=jnp.float32(0.0))), squares, shards


def _is_masked(node: Any) -> bool:
  return isinstance(node, optax.MaskedNode)


def is_pair(node: Any) -> bool:
  return is_factors(node) and not _is_masked(node.a)


def pairs(tree: Any, user: str = "keep_in_frobenius_ball") -> list[Factors]:
  """The pairs of a tree, without those that a mask hides."""
  nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_factors)
  for path, node in nodes:
    where = jax.tree_util.keystr(path) or "the root"
    if not is_factors(node):
      raise ValueError(
        f"{user} needs a tree of Factors; got {type(node).__name__} at {where}."
      )
    if _is_masked(node.a) != _is_masked(node.b):
      raise ValueError(
        f"{user} needs both factors of a pair, or neither; a mask hides one "
        f"of them at {where}."
      )
  return [node for _, node in nodes if is_pair(node)]


def map_pairs(f: Callable[..., Any], *trees: Any) -> Any:
  """Applies f to the pairs; what a mask hides stays as it is."""
  return jax.tree.map(
    lambda *nodes: f(*nodes) if is_pair(nodes[0]) else nodes[0],
    *trees,
    is_leaf=is_factors,
  )


def _pair_specs(specs: Any, tree: Any) -> list[Factors | None]:
  """The specs of a tree's pairs, in the order of `pairs`."""
  if specs is None:
    return [None] * len(pairs(tree))
  known = dict(jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_factors))
  nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_factors)
  paths = [path for path, node in nodes if is_pair(node)]
  missing = [p for p in paths if not is_factors(known.get(p))]
  if missing:
    raise ValueError(
      "specs is a tree like the parameters, of Factors of PartitionSpec; it "
      f"has none at {', '.join(map(jax.tree_util.keystr, missing))}."
    )
  return [known[path] for path in paths]


def _over(reduce: Any, axes: tuple[str, ...], x: jax.Array) -> jax.Array:
  return reduce(x, axes) if axes else x


def _shrinkage(norm: jax.Array, radius: jax.Array) -> jax.Array:
  """What to multiply both factors by to bring `norm` down to `radius`."""
  outside = norm > radius
  return jnp.where(outside, jnp.sqrt(radius / jnp.where(outside, norm, 1)), 1)


def _projected(
  old: Factors,
  update: Factors,
  new: Factors,
  factor: jax.Array,
  radius: jax.Array,
) -> Factors:
  """The update that takes `old` to `factor * new`, for both factors."""

  def one(p, u, x, f):
    f = jnp.expand_dims(f, (-2, -1)) if f.ndim else f
    shrunk = (f * x.astype(jnp.float32) - p.astype(jnp.float32)).astype(u.dtype)
    # Inside the ball the optimizer's own update is left as it is, to the bit.
    return jnp.where(f < 1, shrunk, u)

  return Factors(
    one(old.a, update.a, new.a, jnp.where(radius > 0, factor, 1)),
    one(old.b, update.b, new.b, factor),
    new.scale,
  )
