"""oBAR and nBAR against algorithms 2 and 3 of the paper."""

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import reference

from bilora_jax import Factors
from bilora_jax.baselines import balanced

STEPS = 12
# Float32 against float64.
ROUNDING = 3e-5


def rate(count):
  """A learning rate of 0.1 by coefficients that fall from 2."""
  return 0.1 * 2 * (1 - count / STEPS)


def lora():
  """Adapters of plain LoRA, both factors at some size, and data."""
  adapters, data = problems.make(problems.SMALL, fresh=False)
  zero = jax.tree.map(np.zeros_like, adapters["auxiliary"])
  return {**adapters, "auxiliary": zero}, data


def twice(tx):
  """Each step in two halves, with NaNs watched for."""
  return optax.apply_if_finite(optax.MultiSteps(tx, 2), 3)


@pytest.mark.parametrize("by", ["factors", "gradients"])
def test_a_run_is_the_papers_algorithm(by):
  adapters, data = lora()
  trained = {name: adapters[name] for name in ("primary", "extra")}
  # Weight decay tells the new parameters from the old.
  tx = balanced(optax.adamw(0.01, b2=0.99, weight_decay=0.3), rate, by=by)
  history, _ = problems.train(twice(tx), trained, data, 2 * STEPS)

  layers, modules = problems.to_reference(adapters, data)
  taken = []

  def balance(modules, grads, t):
    for j in range(len(layers)):
      # X is A1, which is drawn at the start, and Y is B1, which is zero.
      if by == "factors":
        x, y = (np.linalg.norm(modules[name][j]) for name in ("A1", "B1"))
        grows = not x >= y
      else:
        x, y = (np.linalg.norm(grads[name][j]) for name in ("A1", "B1"))
        grows = x >= y
      taken.append(grows)
      sign = 1 if grows else -1
      modules["A1"][j] = (1 + sign * rate(t)) * modules["A1"][j]
      modules["B1"][j] = (1 - sign * rate(t)) * modules["B1"][j]

  adamw = reference.adamw(0.01, beta2=0.99, weight_decay=0.3)
  modules = by_hand.train(
    layers, modules, STEPS, dict.fromkeys(("B1", "A1", "v"), adamw), balance
  )
  assert len(set(taken)) == 2  # both branches
  expected = problems.from_reference(modules, adapters)
  del expected["auxiliary"]
  actual = problems.at(history, -1)
  assert problems.relative_error(actual, expected) <= ROUNDING


def test_norms_are_drawn_together():
  # By the factors themselves: no gradient is needed, and no step taken.
  params = {
    "long a": Factors(9 * jnp.ones((3, 2)), jnp.ones((2, 4))),
    "long b": Factors(jnp.ones((2, 3, 2)), 5 * jnp.ones((2, 2, 4))),
    "array": jnp.ones(3),
  }
  step = 0.05
  tx = balanced(optax.set_to_zero(), step, by="factors")

  @jax.jit
  def run(params):
    def body(carry, _):
      params, state = carry
      grads = jax.tree.map(jnp.zeros_like, params)
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(body, (params, tx.init(params)), length=60)[0][0]

  after = run(params)
  for pair in after["long a"], after["long b"]:
    a, b = (np.linalg.norm(x, axis=(-2, -1)) for x in (pair.a, pair.b))
    # From then on they change places.
    assert np.all(np.abs(np.log(a / b)) <= np.log((1 + step) / (1 - step)))
  np.testing.assert_array_equal(after["array"], 1)


def test_equal_norms_are_as_printed():
  # `>=` in both algorithms: without a gradient nBAR grows a, and of equal
  # factors oBAR shrinks it. Each index of a batch axis by itself.
  pair = Factors(np.ones((2, 4, 1)), np.array([2.0, 3.0])[:, None, None])
  zero = jax.tree.map(np.zeros_like, pair)

  def shift(by):
    tx = balanced(optax.set_to_zero(), 0.1, by=by)
    return jax.jit(tx.update)(zero, tx.init(pair), pair)[0]

  np.testing.assert_allclose(shift("gradients").a[:, 0, 0], 0.1)
  np.testing.assert_allclose(shift("gradients").b[:, 0, 0], [-0.2, -0.3])
  # ||a|| is 2.
  np.testing.assert_allclose(shift("factors").a[:, 0, 0], [-0.1, 0.1])


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_bad_rates_are_refused(rate):
  with pytest.raises(ValueError, match=r"rate.* at least 0 and below 1; got"):
    balanced(optax.sgd(0.1), rate, by="factors")


def test_an_unknown_criterion_is_refused():
  with pytest.raises(ValueError, match=r"'factors'.*'gradients'.*got 'norms'"):
    balanced(optax.sgd(0.1), 0.1, by="norms")  # pyright: ignore


def test_missing_params_are_refused():
  tx = balanced(optax.sgd(0.1), 0.1, by="factors")
  with pytest.raises(ValueError, match="needs params"):
    tx.update({}, tx.init({}))
