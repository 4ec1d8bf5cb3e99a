"""An auxiliary that shares the primary's `a` and has its own `b`."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from bilora_jax import _ball, _nodes, _norms, _partition
from bilora_jax._factors import Factors, is_factors
from bilora_jax.variants._held import HeldA


class SharedAState(NamedTuple):
  """State of `shared_a`.

  Attributes:
    inner_state: state of the optimizers.
    ball: state of `keep_in_ball`.
  """

  inner_state: Any
  ball: _ball.FrobeniusBallState


def share_a(adapters: Mapping[str, Any]) -> dict[str, Any]:
  """Makes an auxiliary of `b` alone, at zero, for the primary's `a`.

  Args:
    adapters: the partition; its auxiliary, if any, is dropped.

  Returns:
    The adapters with an auxiliary of arrays `(*batch, r1, out)`, one in place
    of each pair. `shared_a` trains them; `with_shared_a` makes pairs from them
    for `Adapted.apply`.

  Raises:
    ValueError: if the primary holds an array outside of a pair.
  """
  adapters = _partition.without_auxiliary(adapters)
  _norms.pairs(adapters["primary"], user="share_a")
  return {
    **adapters,
    "auxiliary": jax.tree.map(
      lambda pair: jnp.zeros_like(pair.b),
      adapters["primary"],
      is_leaf=is_factors,
    ),
  }


def with_shared_a(adapters: Mapping[str, Any]) -> dict[str, Any]:
  """Makes pairs from the shared `a` and the auxiliary, for the forward pass.

  The primary's gradient is that of equation (9): it does not flow through the
  auxiliary, which is a perturbation and not a part of the trained model.

  Args:
    adapters: as `share_a` makes them.

  Returns:
    Adapters with an auxiliary of rank r1, for `Adapted.apply` if the spec has
    `auxiliary_rank=rank`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from bilora_jax import Factors
    >>> pair = Factors(jnp.ones((4, 2)), jnp.ones((2, 3)), 2.0)
    >>> adapters = share_a({'primary': {'w': pair}})
    >>> with_shared_a(adapters)['auxiliary']['w'].a.shape
    (4, 2)
  """
  return {
    **adapters,
    "auxiliary": _pairs(
      Factors, jax.lax.stop_gradient(adapters["primary"]), adapters["auxiliary"]
    ),
  }


def shared_a(
  optimizer: optax.GradientTransformation,
  rho: _ball.ScalarOrSchedule = 0.05,
  auxiliary_optimizer: optax.GradientTransformation | None = None,
  *,
  clip: _ball.Clip = "global",
  direction: Literal["ascent", "descent"] = "ascent",
) -> optax.GradientTransformationExtraArgs:
  r"""Bi-LoRA whose auxiliary shares the primary's `a`.

  With :math:`W_1 = s\, a\, b_1` and :math:`W_2 = s\, a\, b_2`, the auxiliary
  climbs in :math:`b_2` alone. After the step, with the new a,

  .. math::

    c = \sqrt{\sum_j \|s_j\, a_j\, b_{2,j}\|_F^2}, \qquad
    b_{2,j} \leftarrow (\rho / c)\, b_{2,j} \text{ if } c > \rho

  For square weights, this halves the auxiliary's parameters and their state.

  Args:
    optimizer: optimizer of the primary and of the extra parameters.
    rho: radius of the ball, as in `bilora`.
    auxiliary_optimizer: optimizer of the auxiliary; by default `optimizer`.
    clip: as in `bilora`.
    direction: as in `bilora`.

  Returns:
    A transformation of adapters as `share_a` makes them. Its state has
    `'auxiliary_norm'`, `'clip_factor'` and `'radius'`, as in `bilora`.

  Raises:
    ValueError: as `bilora`.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from bilora_jax import Factors
    >>> pair = Factors(jnp.ones((4, 2)), jnp.ones((2, 3)))
    >>> adapters = share_a({'primary': {'w': pair}})
    >>> tx = shared_a(optax.sgd(0.1), rho=0.05)
    >>> grads = jax.tree.map(jnp.ones_like, adapters)
    >>> updates, _ = tx.update(grads, tx.init(adapters), adapters)
    >>> adapters = optax.apply_updates(adapters, updates)
    >>> pair = with_shared_a(adapters)['auxiliary']['w']
    >>> print(f"{pair.frobenius_norm():.3f}")
    0.050
  """
  if direction not in ("ascent", "descent"):
    raise ValueError(f"direction is 'ascent' or 'descent'; got {direction!r}.")
  if auxiliary_optimizer is None:
    auxiliary_optimizer = optimizer
  inner = optax.partition(
    {
      "primary": _nodes.without_held(optimizer),
      "auxiliary": optax.chain(
        optax.scale(-1.0 if direction == "ascent" else 1.0), auxiliary_optimizer
      ),
    },
    _partition.labels,
  )
  ball = _ball.keep_in_ball(rho, clip=clip)

  def init_fn(params):
    if not _partition.is_placeholder(params):
      _check(params)
    return SharedAState(inner.init(params), cast(Any, ball.init({})))

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
        "shared_a needs params, the third argument of update; got None."
      )
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args
    )
    parts, old = cast(dict[str, Any], updates), cast(dict[str, Any], params)
    # The norm is taken with the primary's new `a`.
    primary = optax.apply_updates(old["primary"], parts["primary"])
    moved, ball_state = ball.update(
      _pairs(HeldA, optax.tree.zeros_like(primary), parts["auxiliary"]),
      state.ball,
      _pairs(HeldA, primary, old["auxiliary"]),
      **extra_args,
    )
    auxiliary = jax.tree.map(lambda pair: pair.b, moved, is_leaf=is_factors)
    updates = {**parts, "auxiliary": auxiliary}
    return updates, SharedAState(inner_state, cast(Any, ball_state))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _pairs(kind: type[Factors], primary: Any, auxiliary: Any) -> Any:
  """The pairs of the primary's `a` and the auxiliary's `b`."""
  return jax.tree.map(
    lambda pair, b: kind(pair.a, b, pair.scale),
    primary,
    auxiliary,
    is_leaf=is_factors,
  )


def _check(params: Any) -> None:
  _partition.check_parts(params)
  wanted = jax.tree.map(
    lambda pair: jnp.shape(pair.b), params["primary"], is_leaf=is_factors
  )
  got = jax.tree.map(jnp.shape, params.get("auxiliary"))
  if wanted != got:
    raise ValueError(
      "shared_a trains adapters that share_a makes, whose auxiliary has an "
      f"array b for each pair of the primary; wanted {wanted}, got {got}."
    )
