"""Rescales Adam's moments of the auxiliary after the clip."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilora_jax._factors import Factors, is_factors


def rescale_moments(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  r"""Bi-LoRA whose clip rescales Adam's moments with the factors.

  The gradient of one factor is proportional to the other factor. So when the
  clip multiplies :math:`B_2` by f, the moments of :math:`A_2` belong to
  gradients that were 1/f times too large. They become

  .. math:: m_A \leftarrow f\, m_A, \qquad v_A \leftarrow f^2\, v_A

  The moments of :math:`B_2` are rescaled likewise, by the factor of
  :math:`A_2`. Both factors are f of equation (10), except at rho = 0, where the
  clip leaves :math:`A_2` unchanged. The primary's moments do not change.

  Args:
    tx: made by `bilora`, or by `adaptive_radius` around it, with Adam or AdamW
      for the auxiliary; other optimizers have other moments and are refused.

  Returns:
    The transformation, with the state of `tx`.

  Raises:
    ValueError: on init, if there is no `optax.ScaleByAdamState` for the
      auxiliary; on update, if params are missing.

  .. note::
    Each factor's f is measured, for any `clip`, against a second update with
    infinite rho; `jax.jit` computes the optimizer's arithmetic of both updates
    once. Not for factors that `jax.shard_map` shards.
  """
  inner = optax.with_extra_args_support(tx)

  def init_fn(params):
    state = inner.init(params)
    if not _moments(state):
      raise ValueError(
        "rescale_moments needs a transformation made by bilora, with Adam for "
        "the auxiliary; got one without optax.ScaleByAdamState there."
      )
    return state

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
        "rescale_moments needs params, the third argument of update; got None."
      )
    unclipped, _ = inner.update(
      updates, state, params, **{**extra_args, "radius": jnp.inf}
    )
    updates, state = inner.update(updates, state, params, **extra_args)
    trees: list[Any] = [params, unclipped, updates]
    factors = jax.tree.map(
      lambda p, u, v: _shrinkage(p + u, p + v),
      *(tree["auxiliary"] for tree in trees),
    )

    def rescaled(adam):
      mu, nu = (
        {**tree, "auxiliary": _times(tree["auxiliary"], factors, power)}
        for tree, power in ((adam.mu, 1), (adam.nu, 2))
      )
      return adam._replace(mu=mu, nu=nu)

    return updates, _map_moments(rescaled, state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _shrinkage(proposed: jax.Array, clipped: jax.Array) -> jax.Array:
  """The number that the clip multiplied a factor by, `(*batch, 1, 1)`."""
  before, after = (
    jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1), keepdims=True)
    for x in (proposed, clipped)
  )
  return jnp.where(before > 0, after / jnp.where(before > 0, before, 1), 1)


def _times(moments: Any, factors: Any, power: int) -> Any:
  """Multiplies the moments of each factor by the other factor's shrinkage."""

  def one(moment, factor):
    def scaled(x, f):
      return (f**power * x).astype(x.dtype)

    # Maps, as a mask may hide a pair.
    a = jax.tree.map(scaled, moment.a, factor.b)
    b = jax.tree.map(scaled, moment.b, factor.a)
    return Factors(a, b, moment.scale)

  return jax.tree.map(one, moments, factors, is_leaf=is_factors)


def _is_adam(node: Any) -> bool:
  return isinstance(node, optax.ScaleByAdamState)


def _is_partition(node: Any) -> bool:
  return (
    isinstance(node, optax.transforms.PartitionState)
    and "auxiliary" in node.inner_states
  )


def _moments(state: Any) -> list[optax.ScaleByAdamState]:
  """Adam's states under the label 'auxiliary'."""
  states = []
  _map_moments(lambda adam: states.append(adam) or adam, state)
  return states


def _map_moments(change: Any, state: Any) -> Any:
  """Applies `change` to Adam's states under the label 'auxiliary'."""

  def within(node):
    if not _is_partition(node):
      return node
    auxiliary = jax.tree.map(
      lambda x: change(x) if _is_adam(x) else x,
      node.inner_states["auxiliary"],
      is_leaf=_is_adam,
    )
    return node._replace(
      inner_states={**node.inner_states, "auxiliary": auxiliary}
    )

  return jax.tree.map(within, state, is_leaf=_is_partition)
