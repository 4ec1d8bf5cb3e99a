"""Where baselines take the gradient, against their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilora_jax


def _problem():
  draws = np.random.default_rng(0)
  x, y = draws.normal(size=(7, 4)), draws.normal(size=(7, 3))
  params = {
    "a": draws.normal(size=(4, 2)),
    "b": draws.normal(size=(2, 3)),
  }
  return x, y, params


def _loss(params, x, y):
  return jnp.mean((x @ params["a"] @ params["b"] - y) ** 2)


def _gradient(params, x, y):
  """The gradient of `_loss`, in float64."""
  error = 2 * (x @ params["a"] @ params["b"] - y) / y.size
  return {
    "a": x.T @ error @ params["b"].T,
    "b": (x @ params["a"]).T @ error,
  }


@pytest.mark.parametrize(
  "mask",
  [True, {"a": True, "b": False}, lambda p: {name: name == "b" for name in p}],
  ids=["all", "a", "b, by a function"],
)
def test_lora_sam_trains_as_its_equations_say(mask):
  x, y, reference = _problem()
  rho, rate = 0.3, 0.05
  where = mask(reference) if callable(mask) else mask
  where = where if isinstance(where, dict) else dict.fromkeys(reference, where)
  params = jax.tree.map(jnp.float32, reference)
  value_and_grad = jax.jit(bilora_jax.sam(jax.value_and_grad(_loss), rho, mask))
  tx = optax.sgd(rate)
  state = tx.init(params)
  for _ in range(20):
    value, grads = value_and_grad(params, jnp.float32(x), jnp.float32(y))
    first = np.mean((x @ reference["a"] @ reference["b"] - y) ** 2)
    assert float(value) == pytest.approx(first, rel=1e-4)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)

    g = _gradient(reference, x, y)
    norm = np.sqrt(sum(np.sum(g[k] ** 2) for k in g if where[k]))
    worst = {k: reference[k] + where[k] * rho * g[k] / norm for k in reference}
    g = _gradient(worst, x, y)
    reference = {k: reference[k] - rate * g[k] for k in reference}
  for name in reference:
    np.testing.assert_allclose(params[name], reference[name], rtol=1e-4)


def test_without_gradient_nothing_is_perturbed():
  value_and_grad = bilora_jax.sam(jax.value_and_grad(lambda w: 0 * w @ w), 0.1)
  value, grad = value_and_grad(jnp.ones(3))
  assert float(value) == 0
  np.testing.assert_array_equal(grad, np.zeros(3))


def test_gradients_of_half_precision_do_not_underflow():
  w = jnp.full(4, 1e-4, jnp.float16)
  value_and_grad = bilora_jax.sam(
    jax.value_and_grad(lambda w: jnp.sum(w.astype(jnp.float32) ** 2)), 2.0
  )
  # 2e-4 squared is less than the least float16; each moves by rho / 2.
  np.testing.assert_allclose(
    value_and_grad(w)[1].astype(jnp.float32), 2.0, rtol=1e-2
  )


def test_two_gradients_and_auxiliary_output_pass_through():
  calls = []

  def value_and_grad(params, scale):
    calls.append(params)
    return (params @ params, scale), 2 * params

  (value, aux), grad = bilora_jax.sam(value_and_grad, 1.0)(
    jnp.array([3.0, 4.0]), scale=7
  )
  assert (float(value), aux, len(calls)) == (25.0, 7, 2)
  np.testing.assert_allclose(grad, [7.2, 9.6], rtol=1e-6)


@pytest.mark.parametrize("rho", [-1.0, float("nan"), float("inf")])
def test_a_radius_that_cannot_be_is_refused(rho):
  with pytest.raises(ValueError, match=r"finite and at least 0; got"):
    bilora_jax.sam(jax.value_and_grad(jnp.sum), rho)
