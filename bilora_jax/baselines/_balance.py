"""oBAR and nBAR: SAM's pull towards balanced factors, without SAM's cost.

With `loss_fn(params, batch)`,

  rate = 0.25 * 5e-4
  tx = baselines.balanced(optax.adam(5e-4), rate, by='gradients')
  opt_state = tx.init(params)
  for key, batch in batches:
    grads = jax.grad(loss_fn)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from bilora_jax import _norms
from bilora_jax._factors import Factors, is_factors


class BalancedState(NamedTuple):
  """State of `balanced`.

  Attributes:
    count: number of updates so far, int32 scalar; the argument of a schedule.
    inner_state: state of the optimizer.
  """

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
  inner_state: Any


def balanced(
  optimizer: optax.GradientTransformation,
  rate: optax.ScalarOrSchedule,
  *,
  by: Literal["factors", "gradients"],
) -> optax.GradientTransformationExtraArgs:
  r"""Balancedness-aware regularization: oBAR by factors, nBAR by gradients.

  SAM draws the norms of two factors together. BAR does the same without a
  second gradient: in each pair, before the optimizer's step,

  .. math::

    (x, y) \leftarrow \begin{cases}
      ((1 - \alpha_t \eta_t)\, x,\; (1 + \alpha_t \eta_t)\, y)
        & \text{if } \|x\| \geq \|y\| \text{ (oBAR)}
          \text{ or } \|g_x\| < \|g_y\| \text{ (nBAR)} \\
      ((1 + \alpha_t \eta_t)\, x,\; (1 - \alpha_t \eta_t)\, y)
        & \text{otherwise}
    \end{cases}

  where x is `a`, y is `b`, :math:`g_x` and :math:`g_y` are their gradients
  before this change, and norms are Frobenius norms. Each index of the batch
  axes is a separate pair. The optimizer sees the changed parameters, for weight
  decay for example.

  Args:
    optimizer: optimizer of the parameters.
    rate: :math:`\alpha_t \eta_t`, a number below 1 or a schedule: the
      optimizer's learning rate times a coefficient. In the paper, the
      coefficient starts between 0.05 and 2, and is constant or decays linearly
      or by a cosine.
    by: `'factors'` is oBAR, named after the overparametrised problems for which
      it is exact; `'gradients'` is nBAR, for the other problems, such as LoRA.

  Returns:
    A transformation of any tree, which balances only its `Factors`.

  Raises:
    ValueError: if rate is negative or 1 or more, or `by` is unknown; on update,
      if params are missing.

  Examples:
    >>> import jax, jax.numpy as jnp, optax
    >>> from bilora_jax import Factors
    >>> params = {'w': Factors(2 * jnp.ones((1, 1)), jnp.ones((1, 1)))}
    >>> tx = balanced(optax.sgd(0.1), 0.25 * 0.1, by='factors')
    >>> grads = jax.tree.map(jnp.zeros_like, params)
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> print(f"{updates['w'].a[0, 0]:.3f} {updates['w'].b[0, 0]:.3f}")
    -0.050 0.025

  References:
    Li et al, `Implicit Regularization of Sharpness-Aware Minimization for
    Scale-Invariant Problems <https://arxiv.org/abs/2410.14802>`_, 2024,
    algorithms 2 (nBAR) and 3 (oBAR).

  .. note::
    As in the paper, equal norms are not an exception: if all gradients are
    zero, nBAR still makes `a` larger.
  """
  if by not in ("factors", "gradients"):
    raise ValueError(
      "by is 'factors', which is oBAR, or 'gradients', which is nBAR; got "
      f"{by!r}."
    )
  _check_rate(rate)
  inner = optax.with_extra_args_support(optimizer)

  def init_fn(params):
    return BalancedState(jnp.zeros([], jnp.int32), inner.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
        "balanced needs params, the third argument of update; got None."
      )
    step = jnp.asarray(rate(state.count) if callable(rate) else rate)
    shift = jax.tree.map(
      lambda p, g: _shift(p, g, step, by), params, updates, is_leaf=is_factors
    )
    updates, inner_state = inner.update(
      updates,
      state.inner_state,
      optax.apply_updates(params, shift),
      **extra_args,
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    return optax.tree.add(updates, shift), BalancedState(count, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_rate(rate: optax.ScalarOrSchedule) -> None:
  # Under optax.inject_hyperparams rate is traced, and its value is unknown.
  if callable(rate) or isinstance(rate, jax.core.Tracer):
    return
  if not (math.isfinite(rate) and 0 <= rate < 1):
    raise ValueError(
      "rate, by which factors grow or shrink, is at least 0 and below 1; got "
      f"{rate}."
    )


def _shift(params: Any, grads: Any, step: jax.Array, by: str) -> Any:
  """The change of one node of the tree by balancing: zeros outside of pairs."""
  if not (is_factors(params) and _norms.is_pair(params)):
    return jax.tree.map(jnp.zeros_like, params)
  if by == "factors":
    shrinks = _square(params.a) >= _square(params.b)
  else:
    shrinks = _square(grads.a) < _square(grads.b)
  signed = jnp.where(shrinks, -step, step)
  return Factors(
    (signed * params.a).astype(params.a.dtype),
    (-signed * params.b).astype(params.b.dtype),
    params.scale,
  )


def _square(x: jax.Array) -> jax.Array:
  """The squared Frobenius norm, `(*batch, 1, 1)`, in float32."""
  return jnp.sum(x.astype(jnp.float32) ** 2, (-2, -1), keepdims=True)
