"""Random weight perturbation: the gradient at a random point nearby.

With `loss_fn(params, batch)` and any optimizer `tx`,

  estimator = baselines.weight_noise(sigma=0.01)
  state, opt_state = estimator.init(params), tx.init(params)
  for key, batch in batches:
    (loss, grads), state = estimator.estimate(
      jax.value_and_grad(loss_fn), state, key, params, batch
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
"""

from typing import Any

import jax

from bilora_jax.baselines import _estimator
from bilora_jax.baselines._estimator import GradientEstimator


def weight_noise(sigma: float, mask: Any = True) -> GradientEstimator:
  r"""Random weight perturbation: the gradient at a random point nearby.

  .. math::

    w \leftarrow w - \eta\, g(w + e), \qquad e_i \sim N(0, \sigma^2)

  The parameters are low-rank factors, or, to perturb the whole weights,
  `{'trained': adapters, 'weights': kernels}` with the mask
  `{'trained': False, 'weights': True}`.

  Args:
    sigma: standard deviation of the noise, in units of the parameters.
    mask: which parameters are perturbed, as in `sam`.

  Returns:
    A `GradientEstimator` without state, of one gradient a step: value and
    gradient are those at the perturbed parameters.

  Raises:
    ValueError: if sigma is negative or not finite.

  References:
    Bisla et al, `Low-Pass Filtering SGD for Recovering Flat Optima in the Deep
    Learning Optimization Landscape <https://arxiv.org/abs/2201.08025>`_, 2022;
    Li et al, `Revisiting Random Weight Perturbation for Efficiently Improving
    Generalization <https://arxiv.org/abs/2404.00357>`_, 2024.
  """
  _estimator.check_size("sigma", "the noise's standard deviation", sigma)

  def estimate(value_and_grad, state, key, params, *args, **kwargs):
    perturbed = _estimator.selected(params, mask, params)
    noise = _estimator.drawn(_estimator.normal, key, perturbed)
    noise = jax.tree.map(lambda e: sigma * e, noise)
    near = _estimator.shifted(params, noise)
    return value_and_grad(near, *args, **kwargs), state

  return GradientEstimator(_estimator.stateless, estimate)
