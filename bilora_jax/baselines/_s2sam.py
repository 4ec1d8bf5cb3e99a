"""S2-SAM: SAM whose perturbation is the last step's gradient.

With `loss_fn(params, batch)` and any optimizer `tx`,

  estimator = baselines.s2sam(rho=0.05)
  state, opt_state = estimator.init(params), tx.init(params)
  for key, batch in batches:
    (loss, grads), state = estimator.estimate(
      jax.value_and_grad(loss_fn), state, key, params, batch
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
"""

from typing import Any

from bilora_jax.baselines import _estimator
from bilora_jax.baselines._estimator import GradientEstimator


def s2sam(rho: float, mask: Any = True) -> GradientEstimator:
  r"""S2-SAM: one gradient a step, perturbed along the last step's gradient.

  .. math::

    g_t = g\!\left(w_t + \rho\, \frac{g_{t-1}}{\|g_{t-1}\|_2}\right), \qquad
    w_{t+1} = w_t - \eta\, g_t

  with one norm over all perturbed parameters. The first gradient is plain, and
  so is a gradient after a zero gradient.

  Args:
    rho: radius of the perturbation, in units of the parameters.
    mask: which parameters are perturbed, as in `sam`.

  Returns:
    A `GradientEstimator` of one gradient a step, whose state is the last
    gradient of the perturbed parameters. Value and gradient are those at the
    perturbed point.

  Raises:
    ValueError: if rho is negative or not finite.

  References:
    Ji et al, `A Single-Step, Sharpness-Aware Minimization is All You Need to
    Achieve Efficient and Accurate Sparse Training`, NeurIPS 2024.
  """
  _estimator.check_size("rho", "the radius of the perturbation", rho)

  def init(params):
    return _estimator.zeros_of_selected(mask, params)

  def estimate(value_and_grad, state, key, params, *args, **kwargs):
    del key
    near = _estimator.shifted(params, _estimator.scaled_to(rho, state))
    value, grads = value_and_grad(near, *args, **kwargs)
    return (value, grads), _estimator.selected(grads, mask, params)

  return GradientEstimator(init, estimate)
