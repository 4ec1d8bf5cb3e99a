"""Random directions, against the Hessian's trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratic
import scipy.stats

from bilora_jax import sharpness
from bilora_jax.sharpness import _estimate

HESSIAN = quadratic.symmetric(np.array([-1.0, 0, 0.5, 1, 2, 3, 4]))


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_average_is_the_trace_over_twice_the_size(adaptive):
  w = np.random.default_rng(0).normal(size=7)
  radius = 0.7
  mean, error = jax.jit(
    lambda params, key: sharpness.average(
      quadratic.loss(HESSIAN, np.ones(7)),
      params,
      radius,
      key,
      draws=4000,
      adaptive=adaptive,
    )
  )(quadratic.tree(w), jax.random.key(1))
  scale = np.abs(w) if adaptive else np.ones(7)
  matrix = scale[:, None] * HESSIAN * scale
  # For z uniform on the unit sphere of R^n, with S symmetric:
  # E z'Sz = tr S / n, and Var z'Sz = 2 (n tr S^2 - (tr S)^2) / (n^2 (n + 2)).
  n, trace = 7, np.trace(matrix)
  g = scale * (HESSIAN @ w + 1)
  variance = radius**2 * g @ g / n + radius**4 / 4 * 2 * (
    n * np.sum(matrix**2) - trace**2
  ) / (n**2 * (n + 2))
  assert float(error) == pytest.approx(np.sqrt(variance / 4000), rel=0.1)
  assert abs(mean - radius**2 * trace / (2 * n)) < 4 * float(error)


def test_each_direction_has_the_norm_exactly():
  # The loss is the squared distance: no draw deviates from r^2.
  mean, error = jax.jit(
    lambda params: sharpness.average(
      lambda p: jnp.sum(p["u"] ** 2) + jnp.sum(p["v"] ** 2),
      params,
      0.3,
      jax.random.key(0),
      draws=8,
    )
  )(quadratic.tree(np.zeros(7)))
  assert float(mean) == pytest.approx(0.09, rel=1e-5)
  assert float(error) < 1e-7


def test_only_what_the_mask_lets_move_is_drawn():
  mean, error = jax.jit(
    lambda params: sharpness.average(
      lambda p: jnp.sum(p["u"] ** 2) + 100 * jnp.sum(p["v"] ** 2),
      params,
      0.3,
      jax.random.key(0),
      draws=8,
      mask={"u": True, "v": False},
    )
  )(quadratic.tree(np.zeros(7)))
  assert float(mean) == pytest.approx(0.09, rel=1e-5)
  assert float(error) < 1e-7


def test_one_draw_has_no_error_and_is_refused():
  with pytest.raises(ValueError, match=r"draws .*at least 2; got 1"):
    sharpness.average(jnp.sum, jnp.ones(3), 1.0, jax.random.key(0), draws=1)


def test_the_standard_error_is_unbiased_by_few_draws():
  draws = np.float32([1.0, 2.5, -3.0])
  mean, error = _estimate.estimate(jnp.asarray(draws))
  assert float(mean) == pytest.approx(np.mean(draws))
  assert float(error) == pytest.approx(scipy.stats.sem(draws))
