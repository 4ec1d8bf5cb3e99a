"""How far the loss rises on average over random directions."""

from typing import Any

import jax

from bilora_jax.sharpness import _space
from bilora_jax.sharpness._estimate import Estimate, estimate


def average(
  loss: _space.Loss,
  params: Any,
  radius: jax.typing.ArrayLike,
  key: jax.Array,
  *,
  draws: int = 16,
  mask: Any = True,
  adaptive: bool = False,
) -> Estimate:
  r"""How far the loss rises on average at a distance, in random directions.

  .. math::

    \mathbb{E}\, L\left(w + r\, \frac{z}{\|z\|_2}\right) - L(w), \qquad
    z \sim \mathcal{N}(0, I)

  The norm of each perturbation is exactly r, so that the result is comparable
  with `one_step` at the same radius. If n numbers move, the result is, to
  second order, :math:`r^2 / (2n)` times the Hessian's trace.

  Args:
    loss: `params` to a scalar.
    params: a tree of floats.
    radius: r, scalar, in units of the parameters.
    key: random key.
    draws: number of directions, evaluated one after the other.
    mask: which parameters move and count in the norm; see `direction`.
    adaptive: whether the perturbation is multiplied, element by element, by
      abs(w); its norm is r before this product.

  Returns:
    Mean and standard error of the rise.

  Raises:
    ValueError: if the mask does not fit, the radius is negative or not finite,
      or there are fewer than 2 draws.

  References:
    Andriushchenko et al, `A Modern Look at the Relationship between Sharpness
    and Generalization <https://arxiv.org/abs/2302.07011>`_, 2023, where the
    noise of each number is Gaussian with standard deviation r.
  """
  _space.check_radius(radius)
  _space.check_at_least(2, draws=draws)
  value, _, zero = _space.objective(loss, params, mask, adaptive)
  heights = jax.lax.map(
    lambda k: value(_space.on_sphere(k, zero, radius)),
    jax.random.split(key, draws),
  )
  return estimate(heights - value(zero))
