"""Perturbed are the whole weights, trained the adapters: a two-layer net."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilora_jax import Factors, baselines

SCALE = 2.0
RATE = 0.1
STEPS = 6
NAMES = ("one", "two")
MASK = {"trained": False, "weights": True}
# Threefry, the default, takes a second to compile.
KEY = jax.random.key(3, impl="unsafe_rbg")


def _problem():
  """Inputs (6, 4), outputs (6, 2), kernels (4, 5) and (5, 2), two pairs."""
  draws = np.random.default_rng(0)
  kernels = {"one": draws.normal(size=(4, 5)), "two": draws.normal(size=(5, 2))}
  pairs = {
    name: (
      0.3 * draws.normal(size=(kernel.shape[0], 2)),
      0.3 * draws.normal(size=(2, kernel.shape[1])),
    )
    for name, kernel in kernels.items()
  }
  return draws.normal(size=(6, 4)), draws.normal(size=(6, 2)), kernels, pairs


def _merged(params):
  return {
    name: kernel + params["trained"][name].weight()
    for name, kernel in params["weights"].items()
  }


def _loss(params, x, y):
  w = _merged(params)
  return jnp.mean((jnp.tanh(x @ w["one"]) @ w["two"] - y) ** 2)


def _dense(kernels, pairs):
  return {k: kernels[k] + SCALE * pairs[k][0] @ pairs[k][1] for k in NAMES}


def _dense_gradient(w, x, y):
  """The gradient of the loss with respect to the merged weights."""
  hidden = np.tanh(x @ w["one"])
  error = 2 * (hidden @ w["two"] - y) / y.size
  inner = error @ w["two"].T * (1 - hidden**2)
  return {"one": x.T @ inner, "two": hidden.T @ error}


def _train(estimator, x, y, kernels, pairs, keys):
  """The adapters after each step of SGD, with the kernels frozen."""
  weights = jax.tree.map(jnp.float32, kernels)
  trained = {
    name: Factors(jnp.float32(a), jnp.float32(b), SCALE)
    for name, (a, b) in pairs.items()
  }
  x, y = jnp.float32(x), jnp.float32(y)

  def step(carry, key):
    trained, state = carry
    params = {"trained": trained, "weights": weights}
    (_, grads), state = estimator.estimate(
      jax.value_and_grad(_loss), state, key, params, x, y
    )
    trained = jax.tree.map(lambda p, g: p - RATE * g, trained, grads["trained"])
    return (trained, state), trained

  carry = (trained, estimator.init({"trained": trained, "weights": weights}))
  return jax.jit(lambda keys: jax.lax.scan(step, carry, keys)[1])(keys)


def _sam(w, t, key, x, y):
  g = _dense_gradient(w, x, y)
  norm = np.sqrt(sum(np.sum(part**2) for part in g.values()))
  return {name: 0.5 * part / norm for name, part in g.items()}


def _flat_lora(w, t, key, x, y):
  f = (1 - np.cos(np.pi * min(t / 4, 1))) / 2
  e = {}
  for name, draw_key in zip(NAMES, jax.random.split(key, 2)):
    e[name] = np.float64(
      jax.random.normal(draw_key, w[name].shape, jnp.float32)
    )
    for j in range(w[name].shape[1]):
      column = w[name][:, j]
      e[name][:, j] *= f * 0.5 * np.linalg.norm(column) / np.sqrt(len(column))
  return e


@pytest.mark.parametrize(
  ("estimator", "perturbation"),
  [
    (baselines.sam(0.5, MASK), _sam),
    (baselines.flat_lora(0.5, 4, _merged, MASK), _flat_lora),
  ],
  ids=["full SAM", "Flat-LoRA"],
)
def test_adapters_train_by_the_dense_gradient_at_the_perturbed_weights(
  estimator, perturbation
):
  x, y, kernels, pairs = _problem()
  keys = jax.random.split(KEY, STEPS)
  trained = _train(estimator, x, y, kernels, pairs, keys)
  for t in range(STEPS):
    w = _dense(kernels, pairs)
    e = perturbation(w, t, keys[t], x, y)
    g = _dense_gradient({k: w[k] + e[k] for k in NAMES}, x, y)
    pairs = {
      name: (
        a - RATE * SCALE * g[name] @ b.T,
        b - RATE * SCALE * a.T @ g[name],
      )
      for name, (a, b) in pairs.items()
    }
    for name, (a, b) in pairs.items():
      # Errors of float32 grow from step to step; all are of size 1.
      np.testing.assert_allclose(trained[name].a[t], a, atol=1e-4)
      np.testing.assert_allclose(trained[name].b[t], b, atol=1e-4)


def _noise(params, **options):
  """What Flat-LoRA adds half-way, where f is 1/2, to weights of its own."""
  estimator = baselines.flat_lora(2.0, 2, lambda w: w, True, **options)
  state = estimator.init(params)
  for _ in range(2):
    (_, near), state = estimator.estimate(
      lambda w: (0.0, w), state, KEY, params
    )
  assert int(state.count) == 2
  return jax.tree.map(lambda a, b: a - b, near, params)


@pytest.mark.parametrize(
  ("input_axes", "norm_axes"),
  [
    (None, (0, 1)),
    ((-2,), (1,)),
    ({"w": (1,)}, (1,)),
    (lambda params: dict.fromkeys(params, (0, 2)), (0, 2)),
  ],
  ids=["all but the last", "stacked layers", "a tree", "a function"],
)
def test_the_noise_of_an_output_is_in_proportion_to_its_weights(
  input_axes, norm_axes
):
  w = np.random.default_rng(0).normal(size=(3, 4, 5))
  noise = _noise({"w": jnp.float32(w)}, input_axes=input_axes)
  draw = jax.random.normal(jax.random.split(KEY, 1)[0], w.shape, jnp.float32)
  # rho is 2 and f is 1/2: one root mean square of the output's weights.
  size = np.sqrt(np.mean(w**2, axis=norm_axes, keepdims=True))
  np.testing.assert_allclose(noise["w"], size * draw, atol=1e-5)


def test_merged_weights_of_other_shapes_are_refused():
  estimator = baselines.flat_lora(0.1, 2, lambda w: w[:1], True)
  params = [jnp.ones((2, 3)), jnp.ones((3, 2))]
  with pytest.raises(ValueError, match=r"\[\(2, 3\), \(3, 2\)\], got "):
    estimator.estimate(lambda w: (0.0, w), estimator.init(params), KEY, params)


def test_output_noise_is_added_to_the_logits_alone():
  logits = jnp.zeros((3, 2), jnp.bfloat16)
  got = baselines.output_noise(lambda z, *, add: z + add, 0.1)(
    KEY, logits, add=1.0
  )
  draw = np.float64(jax.random.normal(KEY, (3, 2), jnp.float32))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, 1 + 0.1 * draw, rtol=1e-6)
