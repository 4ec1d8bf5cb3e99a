"""The examples train as one device does."""

import importlib
import pathlib
import sys

import jax
import numpy as np
import optax
import pytest

from bilora_jax import bilora

_EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
  """Imports an example by name."""
  sys.path.insert(0, str(_EXAMPLES))
  yield importlib.import_module
  sys.path.remove(str(_EXAMPLES))


@pytest.fixture(scope="module")
def one_device(example):
  """Losses and adapters of twenty steps of the README's step."""
  model = example("model")
  tx = bilora(optax.adam(3e-3), rho=0.05)
  adapters = model.adapted.init(jax.random.key(1), model.variables)
  state, losses = tx.init(adapters), []

  @jax.jit
  def step(adapters, state, batch):
    loss, grads = jax.value_and_grad(model.loss_fn)(
      adapters, model.variables, batch
    )
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, loss

  for batch in model.batches(20):
    adapters, state, loss = step(adapters, state, batch)
    losses.append(float(loss))
  # The ball was reached, so the clip is among what is compared.
  assert float(optax.tree.get(state, "clip_factor")) < 1
  return losses, adapters


@pytest.mark.parametrize("name", ["pmap", "shard_map"])
def test_an_example_ends_where_one_device_does(example, one_device, name):
  losses, adapters = example(name).train(20)
  np.testing.assert_allclose(losses, one_device[0], atol=1e-5)
  left, right = map(jax.tree.leaves, (adapters, one_device[1]))
  for x, y in zip(left, right, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
