"""ESAM: SAM on random weights and on the samples whose loss rises most.

With `losses(params, batch)`, the loss of each row,

  def take(args, index):
    return (jax.tree.map(lambda rows: rows[index], args[0]),)

  def loss_fn(params, batch):
    return losses(params, batch).mean()

  estimator = baselines.esam(0.05, losses, take)
  state, opt_state = estimator.init(params), tx.init(params)
  for key, batch in batches:
    (loss, grads), state = estimator.estimate(
      jax.value_and_grad(loss_fn), state, key, params, batch
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp

from bilora_jax.baselines import _estimator
from bilora_jax.baselines._estimator import GradientEstimator


def esam(
  rho: float,
  losses: Callable[..., jax.Array],
  take: Callable[[tuple[Any, ...], jax.Array], tuple[Any, ...]],
  *,
  weight_fraction: float = 0.5,
  sample_fraction: float = 0.5,
  mask: Any = True,
) -> GradientEstimator:
  r"""ESAM: SAM on random weights and on the samples whose loss rises most.

  Let :math:`\ell_i` be the loss of sample i of B, and g the gradient of the
  mean loss. A fraction b of the weights is perturbed, drawn independently,

  .. math::

    \epsilon = \frac{\rho}{b}\, m \odot \frac{g(w)}{\|g(w)\|_2}, \qquad
    m_j \sim \mathrm{Bernoulli}(b),

  The gradient is then taken at :math:`w + \epsilon`, of the :math:`\lceil
  \gamma B \rceil` samples whose :math:`\ell_i(w + \epsilon) - \ell_i(w)` is
  largest.

  Args:
    rho: radius of the perturbation before the draw, in units of the parameters.
    losses: function of `(params, *args, **kwargs)` that returns the loss of
      each sample, (B,). The mean loss is the value of the estimate.
    take: function of `(args, index)` that returns the args with only the rows
      `index`, (n,), int32; keyword arguments are passed on unchanged.
    weight_fraction: b, above 0 and at most 1.
    sample_fraction: gamma, above 0 and at most 1.
    mask: which parameters are perturbed, as in `sam`.

  Returns:
    A `GradientEstimator` without state. A step takes one gradient of `losses`
    of all samples, one forward pass of all samples, and one `value_and_grad` of
    the selected samples: about 4/3 + gamma gradients, as a gradient costs about
    three forward passes. The value is that of all samples at `params`;
    auxiliary output is that of the selected samples at the perturbed
    parameters.

  Raises:
    ValueError: if rho is negative or not finite, or a fraction is not in
      (0, 1]; on estimate, if losses does not return one number for each sample.

  References:
    Du et al, `Efficient Sharpness-aware Minimization for Improved Training of
    Neural Networks <https://arxiv.org/abs/2110.03141>`_, 2022, algorithm 1.

  .. note::
    The paper perturbs few weights to save a part of the backward pass. Here the
    gradient of all parameters is needed, because the draw is made for each
    entry, as in the paper's equations: only the selection of samples saves
    time.
  """
  _estimator.check_size("rho", "the radius of the perturbation", rho)
  _check_fraction("weight_fraction", weight_fraction)
  _check_fraction("sample_fraction", sample_fraction)

  def bernoulli(key, shape):
    return jax.random.bernoulli(key, weight_fraction, shape)

  def estimate(value_and_grad, state, key, params, *args, **kwargs):
    before, pull_back = jax.vjp(lambda p: losses(p, *args, **kwargs), params)
    if before.ndim != 1:
      raise ValueError(
        "losses gives one number for each sample, (B,); got the shape "
        f"{before.shape}."
      )
    [grads] = pull_back(jnp.full_like(before, 1 / before.size))
    ascent = _estimator.scaled_to(
      rho / weight_fraction, _estimator.selected(grads, mask, params)
    )
    kept = _estimator.drawn(bernoulli, key, ascent)
    shift = jax.tree.map(lambda m, e: jnp.where(m, e, 0), kept, ascent)
    worst = _estimator.shifted(params, shift)

    rise = losses(worst, *args, **kwargs) - before
    _, index = jax.lax.top_k(rise, _rows(sample_fraction, before.size))
    value, grads = value_and_grad(worst, *take(args, index), **kwargs)
    mean = jnp.mean(before)
    value = (mean, *value[1:]) if isinstance(value, tuple) else mean
    return (value, grads), state

  return GradientEstimator(_estimator.stateless, estimate)


def _check_fraction(name: str, fraction: float) -> None:
  if not 0 < fraction <= 1:
    raise ValueError(f"{name} is above 0 and at most 1; got {fraction}.")


def _rows(fraction: float, batch: int) -> int:
  # 0.1 * 30 is a little more than 3.
  return max(1, math.ceil(round(fraction * batch, 6)))
