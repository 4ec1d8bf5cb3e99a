"""LookSAM: SAM every k steps, and its direction reused in between.

With `loss_fn(params, batch)` and any optimizer `tx`,

  estimator = baselines.looksam(rho=0.05, every=5)
  state, opt_state = estimator.init(params), tx.init(params)
  for key, batch in batches:
    (loss, grads), state = estimator.estimate(
      jax.value_and_grad(loss_fn), state, key, params, batch
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilora_jax.baselines import _estimator
from bilora_jax.baselines._estimator import GradientEstimator


class LookSAMState(NamedTuple):
  """State of `looksam`.

  Attributes:
    count: number of steps so far, int32 scalar.
    direction: g_v of the last SAM step: like params, float32, None where
      nothing is perturbed.
  """

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
  direction: Any


def looksam(
  rho: float, every: int = 5, alpha: float = 0.7, mask: Any = True
) -> GradientEstimator:
  r"""LookSAM: SAM every k steps, and its direction reused in between.

  With :math:`g = g(w)`, the first step and every k-th step after it compute

  .. math::

    g_s = g(w + \rho\, g / \|g\|_2), \qquad
    g_v = g_s - \frac{\langle g_s, g \rangle}{\|g\|_2^2}\, g,

  and their gradient is :math:`g_s`. The gradient of the other steps is
  :math:`g + \alpha\, (\|g\|_2 / \|g_v\|_2)\, g_v`, or plain if :math:`g_v` is
  zero. As in the paper, products and norms are those of one vector of all
  perturbed parameters. In the other steps, parameters that are not perturbed
  have the plain gradient.

  Args:
    rho: radius of the perturbation, in units of the parameters.
    every: k, number of steps from one SAM step to the next; 5 in the paper.
    alpha: weight of the reused direction; 0.7 in the paper.
    mask: which parameters are perturbed, as in `sam`.

  Returns:
    A `GradientEstimator` whose state has the size of the perturbed parameters,
    of 1 + 1/k gradients a step, as only one branch of a `jax.lax.cond` runs.
    The value is that at `params`.

  Raises:
    ValueError: if rho or alpha is negative or not finite, or every is below 1.

  References:
    Liu et al, `Towards Efficient and Scalable Sharpness-Aware Minimization
    <https://arxiv.org/abs/2203.02714>`_, 2022, algorithm 1. The layer-wise
    form, Look-LayerSAM, is a different algorithm.
  """
  _estimator.check_size("rho", "the radius of the perturbation", rho)
  _estimator.check_size("alpha", "the weight of the reused direction", alpha)
  _estimator.check_steps("every", "from one step of SAM to the next", every)

  def init(params):
    return LookSAMState(
      count=jnp.zeros([], jnp.int32),
      direction=_estimator.zeros_of_selected(mask, params),
    )

  def estimate(value_and_grad, state, key, params, *args, **kwargs):
    del key
    value, grads = value_and_grad(params, *args, **kwargs)
    plain = _estimator.selected(grads, mask, params)

    def look():
      worst = _estimator.shifted(params, _estimator.scaled_to(rho, plain))
      sharp = value_and_grad(worst, *args, **kwargs)[1]
      unit = _estimator.scaled_to(1.0, plain)
      new = _estimator.selected(sharp, mask, params)
      along = optax.tree.vdot(new, unit)
      return sharp, jax.tree.map(lambda s, u: s - along * u, new, unit)

    def reuse():
      length = alpha * optax.tree.norm(plain)
      added = _estimator.scaled_to(length, state.direction)
      return _estimator.shifted(grads, added), state.direction

    grads, direction = jax.lax.cond(state.count % every == 0, look, reuse)
    count = jnp.asarray(optax.safe_increment(state.count))
    return (value, grads), LookSAMState(count, direction)

  return GradientEstimator(init, estimate)
