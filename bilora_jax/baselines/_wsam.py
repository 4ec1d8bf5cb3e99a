"""WSAM: the loss plus its sharpness times a weight.

With `loss_fn(params, batch)` and any optimizer `tx`,

  estimator = baselines.wsam(rho=0.05, weight=0.8)
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

from bilora_jax.baselines import _estimator, _sam
from bilora_jax.baselines._estimator import GradientEstimator


def wsam(rho: float, weight: float, mask: Any = True) -> GradientEstimator:
  r"""WSAM: sharpness as a regularisation term with a weight.

  With SAM's :math:`\epsilon` held fixed, the gradient of the loss
  :math:`L(w) + \frac{c}{1 - c} (L(w + \epsilon) - L(w))` is

  .. math::

    \frac{1 - 2c}{1 - c}\, g(w) + \frac{c}{1 - c}\, g(w + \epsilon),
    \qquad \epsilon = \rho\, \frac{g(w)}{\|g(w)\|_2}

  It is the plain gradient at c = 0 and SAM's gradient at c = 1/2. For larger c,
  flatness has more weight than the loss.

  Args:
    rho: radius of the perturbation, in units of the parameters.
    weight: c, at least 0 and below 1.
    mask: which parameters are perturbed, as in `sam`.

  Returns:
    A `GradientEstimator` without state, of two gradients a step; the value is
    the loss at `params`.

  Raises:
    ValueError: if rho is negative or not finite, or weight is not in [0, 1).

  References:
    Yue et al, `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
    Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023.

  .. note::
    Here both terms pass through the optimizer and its moments. The form that
    the paper prefers keeps the sharpness term out of the optimizer, and
    subtracts it from the parameters as plain gradient descent does. Under SGD
    without momentum, the two forms are equal.
  """
  _estimator.check_size("rho", "the radius of the perturbation", rho)
  if not 0 <= weight < 1:
    raise ValueError(
      f"weight, of the sharpness term, is at least 0 and below 1; got {weight}."
    )

  def estimate(value_and_grad, state, key, params, *args, **kwargs):
    del key
    value, grads = value_and_grad(params, *args, **kwargs)
    worst = _estimator.shifted(params, _sam.ascent(grads, rho, mask, params))
    sharp = value_and_grad(worst, *args, **kwargs)[1]
    ratio = weight / (1 - weight)

    def weighted(g, s):
      g32, s32 = g.astype(jnp.float32), s.astype(jnp.float32)
      return ((1 - ratio) * g32 + ratio * s32).astype(g.dtype)

    return (value, jax.tree.map(weighted, grads, sharp)), state

  return GradientEstimator(_estimator.stateless, estimate)
