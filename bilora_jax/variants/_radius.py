"""A ball whose radius grows with the primary."""

import math

import jax
import optax

from bilora_jax import _ball, _norms


def adaptive_radius(
  tx: optax.GradientTransformation, ratio: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
  r"""Bi-LoRA whose radius is the primary's norm times a ratio.

  .. math:: \rho_t = \gamma \sqrt{\sum_j \|s_j B_{1,j} A_{1,j}\|_F^2}

  with the primary before the step. If the primary starts at zero, so does the
  radius: the first step perturbs nothing.

  Args:
    tx: made by `bilora`; its clip is kept, its rho is not used.
    ratio: :math:`\gamma`, the radius over the primary's norm.

  Returns:
    The transformation with this radius and the state of `tx`. An extra argument
    `radius` of its update overrides the radius.

  Raises:
    ValueError: if ratio is negative or not finite; on init, if tx has no ball.

  .. note::
    Norms are computed from local arrays: not for factors that `jax.shard_map`
    shards.
  """
  # Under optax.inject_hyperparams ratio is an array; a ball clamps its radius.
  if not isinstance(ratio, jax.Array) and not (
    math.isfinite(ratio) and ratio >= 0
  ):
    raise ValueError(
      "ratio, the radius over the primary's norm, is finite and at least 0; "
      f"got {ratio}."
    )
  inner = optax.with_extra_args_support(tx)

  def init_fn(params):
    state = inner.init(params)
    if optax.tree.get(state, "auxiliary_norm") is None:
      raise ValueError(
        "adaptive_radius sets the radius of a transformation made by bilora; "
        "got a transformation without a ball."
      )
    return state

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
        "adaptive_radius needs params, the third argument of update; got None."
      )
    radius = _ball.given_radius(extra_args)
    if radius is None:
      norm, *_ = _norms.norms(params["primary"], user="adaptive_radius")
      radius = ratio * norm
    return inner.update(
      updates, state, params, **{**extra_args, "radius": radius}
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
