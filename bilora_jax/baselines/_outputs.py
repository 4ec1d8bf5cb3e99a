"""Random output perturbation: the loss of noisy logits.

With `logits_fn(params, batch)` and `loss(logits, batch)`,

  noisy = baselines.output_noise(loss, sigma=0.1)

  def loss_fn(params, batch, key):
    return noisy(key, logits_fn(params, batch), batch)

  opt_state = tx.init(params)
  for key, batch in batches:
    grads = jax.grad(loss_fn)(params, batch, key)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
"""

from collections.abc import Callable

import jax

from bilora_jax.baselines import _estimator


def output_noise(
  loss: Callable[..., jax.Array], sigma: float
) -> Callable[..., jax.Array]:
  r"""Random output perturbation: a loss of noisy logits.

  .. math:: L(z + e), \qquad e_i \sim N(0, \sigma^2)

  A step takes one gradient. The noise is in the loss, not in the parameters, so
  this is not a `GradientEstimator`: pass the step's key to the noisy loss, and
  use the plain loss to evaluate the model.

  Args:
    loss: a function of `(logits, *args, **kwargs)`.
    sigma: standard deviation of the noise, in units of the logits.

  Returns:
    A function of `(key, logits, *args, **kwargs)` that returns `loss` of the
    noisy logits, which are float32 at least.

  Raises:
    ValueError: if sigma is negative or not finite.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> spread = output_noise(jnp.std, 0.1)
    >>> print(f"{spread(jax.random.key(0), jnp.zeros(10_000)):.2f}")
    0.10

  References:
    Liu et al, `Bi-LoRA <https://arxiv.org/abs/2508.19564>`_, 2025, where the
    method is named ROP.
  """
  _estimator.check_size("sigma", "the noise's standard deviation", sigma)

  def noisy(key, logits, *args, **kwargs):
    noise = sigma * _estimator.normal(key, logits.shape)
    return loss(logits + noise, *args, **kwargs)

  return noisy
