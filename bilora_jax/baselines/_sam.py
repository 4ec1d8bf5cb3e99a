"""SAM and ASAM: the gradient at the worst point nearby.

With `loss_fn(params, batch)` and any optimizer `tx`,

  estimator = baselines.sam(rho=0.05)
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
import jax.numpy as jnp

from bilora_jax.baselines import _estimator
from bilora_jax.baselines._estimator import GradientEstimator


def sam(
  rho: float, mask: Any = True, *, adaptive: bool = False
) -> GradientEstimator:
  r"""Sharpness-Aware Minimization: the gradient at the worst point nearby.

  .. math::

    \epsilon = \rho\, \frac{T_w^2\, g(w)}{\|T_w\, g(w)\|_2}, \qquad
    w \leftarrow w - \eta\, g(w + \epsilon)

  with one norm over all perturbed parameters, and :math:`T_w = 1`, or
  :math:`T_w = |w|` elementwise for adaptive SAM. If all gradients are zero,
  there is no perturbation. With low-rank factors as parameters, this is
  LoRA-SAM, which needs two gradients a step, where Bi-LoRA needs one. With
  `{'trained': adapters, 'weights': kernels}` and the mask
  `{'trained': False, 'weights': True}`, it is SAM of the whole weights that
  trains only the adapters.

  Args:
    rho: radius of the perturbation, in units of the parameters; for adaptive
      SAM, radius of :math:`\epsilon / |w|`, without units.
    mask: which parameters are perturbed: a tree of bools like params, or like
      their upper levels, or one bool, or a function from params to such a mask.
      Norms are those of the perturbed parameters only.
    adaptive: whether the ball is scaled by the parameters' magnitudes.

  Returns:
    A `GradientEstimator` without state, of two gradients a step: the value is
    that at `params`, the gradient that at the perturbed parameters.

  Raises:
    ValueError: if rho is negative or not finite.

  References:
    Foret et al, `Sharpness-Aware Minimization
    <https://arxiv.org/abs/2010.01412>`_, 2021, equation (3); Kwon et al, `ASAM
    <https://arxiv.org/abs/2102.11600>`_, 2021, which adds a constant to
    :math:`|w|` for stability; this function adds nothing.
  """
  _estimator.check_size("rho", "the radius of the perturbation", rho)

  def estimate(value_and_grad, state, key, params, *args, **kwargs):
    del key
    value, grads = value_and_grad(params, *args, **kwargs)
    shift = ascent(grads, rho, mask, params, adaptive=adaptive)
    worst = _estimator.shifted(params, shift)
    return (value, value_and_grad(worst, *args, **kwargs)[1]), state

  return GradientEstimator(_estimator.stateless, estimate)


def ascent(
  grads: Any, rho: float, mask: Any, params: Any, *, adaptive: bool = False
) -> Any:
  """SAM's perturbation in float32, with None for unperturbed parameters."""
  direction = _estimator.selected(grads, mask, params)
  if not adaptive:
    return _estimator.scaled_to(rho, direction)
  size = jax.tree.map(jnp.abs, _estimator.selected(params, mask, params))
  shift = _estimator.scaled_to(rho, jax.tree.map(jnp.multiply, size, direction))
  return jax.tree.map(jnp.multiply, size, shift)
