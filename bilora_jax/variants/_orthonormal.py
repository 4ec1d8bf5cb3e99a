"""An auxiliary with a frozen orthonormal `a`, redrawn every k steps."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from bilora_jax import _linalg, _norms, _partition
from bilora_jax._factors import Factors, is_factors
from bilora_jax.variants._held import OrthonormalA


class RedrawState(NamedTuple):
  """State of `redraw_a`.

  Attributes:
    count: number of updates so far, int32 scalar.
    inner_state: state of the wrapped transformation.
  """

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
  inner_state: Any


def orthonormal_a(
  key: jax.Array, adapters: Mapping[str, Any]
) -> dict[str, Any]:
  r"""Gives the auxiliary an orthonormal `a`: `bilora` then trains `b` alone.

  .. math:: \|s\, a\, b\|_F = |s|\, \|b\|_F

  The perturbation is linear in `b`, so the projection onto the ball is exact:
  it is the nearest point. The optimizer needs a state for `b` only, half of the
  usual state if the weights are square. The drawback: the auxiliary climbs only
  in r2 random directions of the input.

  Args:
    key: random key of the draws.
    adapters: the partition, with an auxiliary, of which only shapes, dtypes and
      scales matter.

  Returns:
    The adapters, with a new auxiliary of `OrthonormalA` nodes with b = 0.
    `bilora` and `Adapted.apply` take them.

  Raises:
    ValueError: if there is no auxiliary, or the auxiliary holds an array
      outside of a pair, or a rank is above the input's size.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from bilora_jax import Factors, bilora
    >>> pair = Factors(jnp.ones((4, 2)), jnp.zeros((2, 3)))
    >>> adapters = {'primary': {'w': pair}, 'auxiliary': {'w': pair}}
    >>> adapters = orthonormal_a(jax.random.key(0), adapters)
    >>> tx = redraw_a(bilora(optax.sgd(0.1), rho=0.05), every=100)
    >>> grads = jax.tree.map(jnp.ones_like, adapters)
    >>> updates, _ = tx.update(grads, tx.init(adapters), adapters)
    >>> moved = optax.apply_updates(adapters, updates)['auxiliary']['w']
    >>> print(f"{jnp.linalg.norm(moved.b):.3f} {moved.frobenius_norm():.3f}")
    0.050 0.050
  """
  _partition.check_parts(adapters)
  if "auxiliary" not in adapters:
    raise ValueError(
      f"orthonormal_a needs an auxiliary; the adapters hold {sorted(adapters)}."
    )
  tree = adapters["auxiliary"]
  for pair in _norms.pairs(tree, user="orthonormal_a"):
    size_in, rank = pair.a.shape[-2:]
    if rank > size_in:
      raise ValueError(
        "orthonormal_a needs ranks up to the inputs' sizes; got a rank of "
        f"{rank} and an input of {size_in}."
      )
  return {
    **adapters,
    "auxiliary": jax.tree.map(
      lambda pair, a: OrthonormalA(
        a.astype(pair.a.dtype), jnp.zeros_like(pair.b), pair.scale
      ),
      tree,
      _drawn(key, tree),
      is_leaf=is_factors,
    ),
  }


def redraw_a(
  tx: optax.GradientTransformation, every: int, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
  r"""Bi-LoRA whose auxiliary gets a new orthonormal `a` every k steps.

  At each k-th step, after the clip, a' is drawn, and

  .. math:: b' = a'^\top a\, b, \qquad a' b' = a' a'^\top a\, b

  which projects the perturbation onto the span of a'. The projection is smaller
  than the perturbation, so it is in the ball: a random span keeps about r / n
  of the squared norm. The optimizer's state stays, as in GaLore.

  Args:
    tx: made by `bilora`, for adapters made by `orthonormal_a`.
    every: k, in updates.
    seed: seed of the draws.

  Returns:
    The transformation.

  Raises:
    ValueError: if every is below 1; on init, if the auxiliary is not made by
      `orthonormal_a`; on update, if params are missing.

  References:
    Zhao et al, `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, which also
    keeps the optimizer's state when the span changes.

  .. note::
    Not for factors that `jax.shard_map` shards.
  """
  if every < 1:
    raise ValueError(f"every is an integer of at least 1; got {every}.")
  inner = optax.with_extra_args_support(tx)

  def init_fn(params):
    if not _partition.is_placeholder(params):
      for pair in _norms.pairs(params["auxiliary"], user="redraw_a"):
        if not isinstance(pair, OrthonormalA):
          raise ValueError(
            "redraw_a needs an auxiliary made by orthonormal_a; got "
            f"{type(pair).__name__}."
          )
    return RedrawState(jnp.zeros([], jnp.int32), inner.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
        "redraw_a needs params, the third argument of update; got None."
      )
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args
    )
    count = jnp.asarray(optax.safe_increment(state.count))

    def redrawn(old, updates):
      key = jax.random.fold_in(jax.random.key(seed), count)
      return jax.tree.map(
        _moved, old, updates, _drawn(key, old), is_leaf=is_factors
      )

    parts, old = cast(dict[str, Any], updates), cast(dict[str, Any], params)
    auxiliary = jax.lax.cond(
      count % every == 0,
      redrawn,
      lambda old, updates: updates,
      old["auxiliary"],
      parts["auxiliary"],
    )
    return {**parts, "auxiliary": auxiliary}, RedrawState(count, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _moved(old: Any, update: Any, a: Any) -> Any:
  """The update that gives a pair a new `a` and projects its weight onto it."""
  if not _norms.is_pair(old):
    return update
  within = jnp.einsum(
    "...is,...ir->...sr", a, old.a, precision=jax.lax.Precision.HIGHEST
  )
  b = jnp.matmul(within, old.b + update.b, precision=jax.lax.Precision.HIGHEST)
  return OrthonormalA(
    (a - old.a).astype(update.a.dtype),
    (b - old.b).astype(update.b.dtype),
    old.scale,
  )


def _drawn(key: jax.Array, tree: Any) -> Any:
  """An orthonormal `a` for each pair, uniformly drawn, in float32."""
  keys = optax.tree.split_key_like(
    key, jax.tree.map(lambda _: 0, tree, is_leaf=is_factors)
  )

  def draw(pair: Factors, key: jax.Array):
    if not _norms.is_pair(pair):
      return pair.a
    return _linalg.qr(jax.random.normal(key, pair.a.shape))[0]

  return jax.tree.map(draw, tree, keys, is_leaf=is_factors)
