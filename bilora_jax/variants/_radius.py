"""A ball that grows with the primary."""

import math

import jax
import optax

from bilora_jax import _ball


def adaptive_radius(
  tx: optax.GradientTransformation, ratio: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
  r"""Bi-LoRA in a ball as large as the primary, times a ratio.

  .. math:: \rho_t = \gamma \sqrt{\sum_j \|s_j B_{1,j} A_{1,j}\|_F^2}

  of the primary before the step. It starts at zero, where the primary does:
  the first step perturbs nothing.

  Args:
    tx: made by `bilora`, of which the clip is kept; its rho is not used.
    ratio: :math:`\gamma`, of the radius and the primary's norm.

  Returns:
    The transformation with that radius; its state is that of `tx`. An extra
    argument `radius` to its update overrides it.

  Raises:
    ValueError: if ratio is negative or not finite; on init, if tx has no ball.

  .. note::
    Norms are those of what the code sees: not for factors that `jax.shard_map`
    shards.
  """
  # Under optax.inject_hyperparams it is an array, and a ball clamps its radius.
  if not isinstance(ratio, jax.Array) and not (
    math.isfinite(ratio) and ratio >= 0
  ):
    raise ValueError(
      "ratio, of the radius and the primary's norm, is finite and at least 0; "
      f"got {ratio}."
    )
  inner = optax.with_extra_args_support(tx)

  def init_fn(params):
    state = inner.init(params)
    if optax.tree.get(state, "auxiliary_norm") is None:
      raise ValueError(
        "adaptive_radius sets the radius of what bilora makes; the "
        "transformation that it got has no ball."
      )
    return state

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
        "adaptive_radius needs params, the third argument of update; got None."
      )
    radius = _ball.given_radius(extra_args)
    if radius is None:
      norm, *_ = _ball.norms(params["primary"], user="adaptive_radius")
      radius = ratio * norm
    return inner.update(
      updates, state, params, **{**extra_args, "radius": radius}
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
