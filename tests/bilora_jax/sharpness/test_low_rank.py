"""Proposition 3, corrected, against dense singular value decompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilora_jax import sharpness

RHO, RANK = 0.1, 2
RNG = np.random.default_rng(0)
# Matrices, two stacked ones, and a vector.
G = {
  "x": RNG.normal(size=(5, 4)),
  "y": RNG.normal(size=(2, 3, 6)),
  "z": 10 * RNG.normal(size=(4,)),
}
ZERO = jax.tree.map(lambda g: jnp.zeros(g.shape), G)


def _linear(params):
  # Sums of products, in which no order is lost to fast matmuls.
  return sum(jnp.sum(jnp.float32(G[k]) * params[k]) for k in G)


def _matrices(tree):
  return [tree["x"], *tree["y"]]


def _truncated(g, rank):
  u, sigma, vt = np.linalg.svd(g, full_matrices=False)
  return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


@pytest.mark.parametrize("rank", [1, RANK, 99])
def test_the_maximiser_is_the_truncated_gradient_over_one_norm(rank):
  linearised, rise, perturbation = jax.jit(
    lambda params: sharpness.low_rank(_linear, params, RHO, rank)
  )(ZERO)
  nearest = [_truncated(g, rank) for g in _matrices(G)]
  whole = np.sqrt(sum(np.sum(g**2) for g in nearest))
  sigmas = np.concatenate(
    [np.linalg.svd(g, compute_uv=False)[:rank] for g in _matrices(G)]
  )
  bound = RHO * np.sqrt(np.sum(sigmas**2))
  np.testing.assert_allclose([linearised, rise], bound, rtol=1e-5)
  for ours, expected in zip(_matrices(perturbation), nearest):
    np.testing.assert_allclose(ours, RHO * expected / whole, atol=1e-6)
  np.testing.assert_array_equal(perturbation["z"], 0)


def test_no_other_perturbation_of_the_rank_rises_higher():
  bound = jax.jit(
    lambda params: sharpness.low_rank(_linear, params, RHO, RANK).linearised
  )(ZERO)
  best = 0.0
  for seed in range(100):
    rng = np.random.default_rng(seed)
    # From noise to nearly the maximiser.
    rivals = [
      _truncated(g + (1 - seed / 100) * 5 * rng.normal(size=g.shape), RANK)
      for g in _matrices(G)
    ]
    norm = np.sqrt(sum(np.sum(r**2) for r in rivals))
    value = sum(np.sum(g * r) for g, r in zip(_matrices(G), rivals))
    best = max(best, RHO * value / norm)
  assert 0.99 * bound < best <= bound * (1 + 1e-6)


def test_the_rise_is_the_losss_own_and_the_mask_counts():
  mask = {"x": True, "y": False, "z": False}

  def loss(params):
    return _linear(params) + 50 * jnp.sum(params["x"] ** 2)

  linearised, rise, perturbation = jax.jit(
    lambda params: sharpness.low_rank(loss, params, RHO, RANK, mask=mask)
  )(ZERO)
  sigma = np.linalg.svd(G["x"], compute_uv=False)[:RANK]
  assert float(linearised) == pytest.approx(
    RHO * np.linalg.norm(sigma), rel=1e-5
  )
  assert float(rise - linearised) == pytest.approx(50 * RHO**2, rel=1e-4)
  np.testing.assert_array_equal(perturbation["y"], 0)


def test_without_gradient_nothing_moves():
  result = jax.jit(
    lambda w: sharpness.low_rank(lambda w: jnp.sum(w * 0), w, 1.0, 1)
  )(jnp.ones((3, 2)))
  for leaf in jax.tree.leaves(result):
    np.testing.assert_array_equal(leaf, 0)


def test_vectors_alone_and_a_rank_of_zero_are_refused():
  with pytest.raises(ValueError, match=r"moves matrices.*\[\(3,\)\]"):
    sharpness.low_rank(jnp.sum, jnp.ones(3), 1.0, 1)
  with pytest.raises(ValueError, match=r"rank .*at least 1; got 0"):
    sharpness.low_rank(jnp.sum, jnp.ones((3, 2)), 1.0, 0)
