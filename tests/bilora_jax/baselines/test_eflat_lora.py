"""EFlat-LoRA on two layers: fifty steps of its algorithm, and what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilora_jax import Factors, baselines

S = 2.0
RHO, BETA, RATE = 0.2, 0.3, 0.05
KEY = jax.random.key(0)


def _problem(b_size):
  """Inputs (6, 4), outputs (6, 3), frozen W (out, in), and pairs (A, B)."""
  draws = np.random.default_rng(0)
  sizes = [(4, 5), (5, 3)]
  frozen = [draws.normal(size=(n, m)) for m, n in sizes]
  pairs = [
    (0.5 * draws.normal(size=(2, m)), b_size * draws.normal(size=(n, 2)))
    for m, n in sizes
  ]
  return draws.normal(size=(6, 4)), draws.normal(size=(6, 3)), frozen, pairs


def _loss(params, x, y, frozen):
  for i, (w, pair) in enumerate(zip(frozen, params)):
    x = x @ (w.T + pair.weight())
    x = jnp.tanh(x) if i == 0 else x
  return jnp.mean((x - y) ** 2)


def _gradients(x, y, frozen, pairs):
  """Those by the weights (out, in) of the two layers, in float64."""
  w1, w2 = (w + S * b @ a for w, (a, b) in zip(frozen, pairs))
  hidden = np.tanh(x @ w1.T)
  error = 2 * (hidden @ w2.T - y) / y.size
  return (error @ w2 * (1 - hidden**2)).T @ x, error.T @ hidden


def _algorithm_2(x, y, frozen, pairs):
  """The paper's algorithm 2 with SGD: the pairs after each step."""
  average = None
  while True:
    near = pairs
    if average is not None:
      near = [(a, b + e) for (a, b), e in zip(pairs, average)]
    whole = _gradients(x, y, frozen, near)
    of_a = [S * b.T @ g for (_, b), g in zip(near, whole)]
    of_b = [S * g @ a.T for (a, _), g in zip(near, whole)]
    # Equation (12), and equation (13) as equation (16) has it.
    estimates = [
      0.5 / S * (gb @ np.linalg.pinv(a.T) + np.linalg.pinv(b.T) @ ga)
      for (a, b), ga, gb in zip(near, of_a, of_b)
    ]
    norm = np.sqrt(sum(np.sum(e**2) for e in estimates))
    # Equation (15), and the moving average of equation (18).
    new = [
      RHO / S * e / norm @ np.linalg.pinv(a)
      for e, (a, _) in zip(estimates, pairs)
    ]
    average = (
      new
      if average is None
      else [(1 - BETA) * old + BETA * e for old, e in zip(average, new)]
    )
    pairs = [
      (a - RATE * ga, b - RATE * gb)
      for (a, b), ga, gb in zip(pairs, of_a, of_b)
    ]
    yield pairs


@pytest.mark.parametrize("b_size", [0.5, 0.0], ids=["b drawn", "b zero"])
def test_fifty_steps_are_the_papers_algorithm(b_size):
  x, y, frozen, pairs = _problem(b_size)
  estimator = baselines.eflat_lora(RHO, BETA)
  params = [Factors(jnp.float32(a.T), jnp.float32(b.T), S) for a, b in pairs]
  data = jax.tree.map(jnp.float32, (x, y, frozen))

  def step(carry, _):
    params, state = carry
    (_, grads), state = estimator.estimate(
      jax.value_and_grad(_loss), state, KEY, params, *data
    )
    params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
    return (params, state), params

  carry = (params, estimator.init(params))
  _, trained = jax.jit(lambda c: jax.lax.scan(step, c, length=50))(carry)
  for t, wanted in zip(range(50), _algorithm_2(x, y, frozen, pairs)):
    for got, (a, b) in zip(trained, wanted):
      np.testing.assert_allclose(got.a[t], a.T, atol=3e-5)
      np.testing.assert_allclose(got.b[t], b.T, atol=3e-5)


def test_the_perturbation_of_a_full_rank_pair_is_sams_of_its_weight():
  # The pseudo-inverses are inverses, and the estimate is the gradient.
  draws = np.random.default_rng(1)
  a, b, w = (draws.normal(size=(3, 3)) + 2 * np.eye(3) for _ in range(3))
  pair = Factors(jnp.float32(a), jnp.float32(b), S)
  estimator = baselines.eflat_lora(RHO)
  _, state = estimator.estimate(
    jax.value_and_grad(lambda pair: jnp.sum(jnp.sin(pair.weight() - w))),
    estimator.init(pair),
    KEY,
    pair,
  )
  gradient = np.cos(S * a @ b - w)
  np.testing.assert_allclose(
    S * a @ np.float64(state.average.b),
    RHO * gradient / np.linalg.norm(gradient),
    atol=1e-5,
  )


def test_stacked_layers_are_perturbed_as_layers_apart():
  *_, pairs = _problem(0.5)
  apart = [Factors(jnp.float32(a.T), jnp.float32(b.T), S) for a, b in pairs]
  # The second layer is brought to the first one's shape by its own zeros.
  a, b = np.zeros((2, 5, 2), np.float32), np.zeros((2, 2, 5), np.float32)
  for i, pair in enumerate(apart):
    a[i, : pair.a.shape[0]], b[i, :, : pair.b.shape[1]] = pair.a, pair.b
  stacked = Factors(jnp.asarray(a), jnp.asarray(b), S)
  estimator = baselines.eflat_lora(RHO)

  def average(loss, params):
    value_and_grad = jax.value_and_grad(loss)
    state = estimator.init(params)
    return estimator.estimate(value_and_grad, state, KEY, params)[1].average

  def curved(pair):
    return jnp.sum(jnp.sin(pair.weight()))

  one = average(lambda pairs: sum(map(curved, pairs)), apart)
  sizes = [(4, 5), (5, 3)]
  both = average(
    lambda pair: sum(
      jnp.sum(jnp.sin(pair.weight()[i, :m, :n]))
      for i, (m, n) in enumerate(sizes)
    ),
    stacked,
  )
  for i, (_, n) in enumerate(sizes):
    np.testing.assert_allclose(both.b[i, :, :n], one[i].b, atol=1e-6)
