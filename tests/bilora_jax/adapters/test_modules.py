"""Soft prompts and bottlenecks as modules, in Linen and in NNX."""

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilora_jax import adapters, bilora

WIDTH, LENGTH, HIDDEN = 6, 3, 2
X = np.float32(np.random.default_rng(0).normal(size=(2, 5, WIDTH)))


class Linen(nn.Module):
  """A prompt, a layer, a bottleneck."""

  @nn.compact
  def __call__(self, x):
    x = adapters.linen.SoftPrompt(LENGTH, name="prompt")(x)
    x = nn.Dense(WIDTH, use_bias=False, name="dense")(x)
    return adapters.linen.Bottleneck(HIDDEN, name="bottleneck")(x)


class Nnx(nnx.Module):
  """The same."""

  def __init__(self, rngs):
    self.prompt = adapters.nnx.SoftPrompt(LENGTH, WIDTH, rngs=rngs)
    self.dense = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
    self.bottleneck = adapters.nnx.Bottleneck(WIDTH, HIDDEN, rngs=rngs)

  def __call__(self, x):
    return self.bottleneck(self.dense(self.prompt(x)))


@pytest.fixture(scope="module")
def both():
  """A function of the trained parts in each, and where both start."""
  linen, model = Linen(), Nnx(nnx.Rngs(0))
  variables = jax.jit(linen.init)(jax.random.key(0), X)
  nodes = variables["adapters"]
  graphdef, state, rest = nnx.split(model, adapters.nnx.AdapterVariable, ...)
  rest = jax.tree.map(lambda x: variables["params"]["dense"]["kernel"], rest)
  state = nnx.from_flat_state(
    [
      (path, leaf.replace(nodes[path[0]][path[1]]))
      for path, leaf in nnx.to_flat_state(state)
    ]
  )

  def of_linen(parts):
    total = optax.tree.add(parts["primary"], parts["auxiliary"])
    return linen.apply({**variables, "adapters": total}, X)

  def of_nnx(parts):
    total = optax.tree.add(parts["primary"], parts["auxiliary"])
    return nnx.merge(graphdef, total, rest)(X)

  def start(primary):
    return {"primary": primary, "auxiliary": optax.tree.zeros_like(primary)}

  return (of_linen, start(nodes)), (of_nnx, start(state)), variables


def test_the_nodes_are_no_parameters_of_the_model(both):
  _, (_, state), variables = both
  assert set(variables["params"]) == {"dense"}
  assert isinstance(
    variables["adapters"]["prompt"]["prompt"], adapters.SoftPrompt
  )
  assert not jax.tree.leaves(nnx.filter_state(state["primary"], nnx.Param))


def test_the_functions_are_those_of_their_papers(both):
  (run, start), _, variables = both
  rng = np.random.default_rng(1)
  start = jax.tree.map(
    lambda x: x + np.float32(0.3 * rng.normal(size=x.shape)), start
  )
  total = optax.tree.add(start["primary"], start["auxiliary"])
  prompt = np.float64(total["prompt"]["prompt"].tokens)
  p = total["bottleneck"]["bottleneck"]
  kernel = np.float64(variables["params"]["dense"]["kernel"])
  x = np.concatenate([np.broadcast_to(prompt, (2, *prompt.shape)), X], axis=1)
  x = x @ kernel
  before = x @ np.float64(p.down) + np.float64(p.down_bias)
  # GELU by its approximation, as JAX's default is.
  hidden = (
    0.5
    * before
    * (1 + np.tanh(np.sqrt(2 / np.pi) * (before + 0.044715 * before**3)))
  )
  expected = x + hidden @ np.float64(p.up) + np.float64(p.up_bias)
  np.testing.assert_allclose(
    jax.jit(run)(start), expected, rtol=1e-5, atol=1e-5
  )


def test_a_new_bottleneck_adds_nothing_and_a_prompt_is_in_the_inputs_dtype():
  module = adapters.linen.Bottleneck(HIDDEN)
  variables = module.init(jax.random.key(0), X)
  np.testing.assert_array_equal(module.apply(variables, X), X)
  half = X.astype(jnp.bfloat16)
  assert module.apply(variables, half).dtype == jnp.bfloat16
  prompt = adapters.SoftPrompt(jnp.ones((LENGTH, WIDTH)))
  assert prompt(half).dtype == jnp.bfloat16
  assert prompt(half).shape == (2, 5 + LENGTH, WIDTH)


def test_both_hosts_train_alike_and_stay_in_the_ball(both):
  tx = bilora(optax.adam(0.02), rho=0.05)

  def train(run, parts):
    def step(carry, _):
      parts, state = carry
      grads = jax.grad(lambda x: jnp.mean((run(x) - 1) ** 2))(parts)
      updates, state = tx.update(grads, state, parts)
      return (optax.apply_updates(parts, updates), state), state

    (parts, _), states = jax.lax.scan(step, (parts, tx.init(parts)), length=10)
    return parts, optax.tree.get(states, "auxiliary_norm")

  (linen, c), (of_nnx, d) = (
    jax.jit(lambda x, run=run: train(run, x))(start) for run, start in both[:2]
  )
  assert c[-1] > 0.05
  # The same arithmetic, in another order.
  np.testing.assert_allclose(c, d, rtol=1e-5)
  for part in ("primary", "auxiliary"):
    flat = dict(nnx.to_flat_state(of_nnx[part]))
    for (name, field), leaf in flat.items():
      ours = jax.tree.leaves(linen[part][name][field])
      for x, y in zip(ours, jax.tree.leaves(leaf.get_value())):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  square = sum(
    jnp.sum(node.squared_norm())
    for node in jax.tree.leaves(
      linen["auxiliary"], is_leaf=lambda x: hasattr(x, "degree")
    )
  )
  assert np.sqrt(square) == pytest.approx(0.05, rel=1e-6)
