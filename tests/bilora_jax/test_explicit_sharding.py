"""Meshes of Explicit axes, as `jax.set_mesh` has them: the same numbers."""

import functools

import devices
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from bilora_jax import Factors, LoraSpec, adapt, bilora, without_auxiliary

# Sums of fewer than 100 float32 products, added up by shards.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
STEPS = 3
X = jnp.sin(jnp.arange(4 * 8.0)).reshape(4, 8)
Y = jnp.cos(jnp.arange(4 * 8.0)).reshape(4, 8)


@pytest.fixture
def mesh():
  devices.require(8)
  return jax.make_mesh(
    (2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2
  )


def _put(mesh, tree, specs):
  return jax.tree.map(
    lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
  )


def _assert_close(found, expected):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, **CLOSE), found, expected
  )


def _normal(*shape, seed):
  return jax.random.normal(jax.random.key(seed), shape)


def _draw_pairs(seed):
  """A pair of one weight, and one of three experts."""
  return {
    "w": Factors(_normal(8, 2, seed=seed), _normal(2, 12, seed=seed + 1), 2.0),
    "v": Factors(
      _normal(4, 8, 2, seed=seed + 2), _normal(4, 2, 4, seed=seed + 3)
    ),
  }


PAIRS = {"primary": _draw_pairs(0), "auxiliary": _draw_pairs(4)}
GRADS = {"primary": _draw_pairs(8), "auxiliary": _draw_pairs(12)}
SPECS = {
  "w": Factors(P("model", None), P(None, "model"), 2.0),
  "v": Factors(P("data", "model", None), P("data", None, "model")),
}


def _update(adapters, grads, clip):
  tx = bilora(optax.adam(1e-2), rho=0.1, clip=clip)

  @jax.jit
  def step(adapters, state, grads):
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state

  state = tx.init(adapters)
  for _ in range(STEPS):
    adapters, state = step(adapters, state, grads)
  return adapters, optax.tree.get(state, "auxiliary_norm")


@pytest.mark.parametrize("clip", ["global", "layer"])
def test_the_transformation_gives_the_numbers_of_one_device(mesh, clip):
  specs = dict.fromkeys(PAIRS, SPECS)
  with jax.set_mesh(mesh):
    found, norm = _update(
      _put(mesh, PAIRS, specs), _put(mesh, GRADS, specs), clip
    )
  a = found["auxiliary"]["w"].a
  assert jax.typeof(a).sharding.spec == P("model", None)
  expected, expected_norm = _update(PAIRS, GRADS, clip)
  _assert_close(found, expected)
  np.testing.assert_allclose(norm, expected_norm, rtol=1e-6)


class Linen(nn.Module):
  """A weight split by its outputs, and one that is split by its inputs."""

  split: bool

  @nn.compact
  def __call__(self, x):
    up = self.param("up", nn.initializers.normal(), (8, 16))
    down = self.param("down", nn.initializers.normal(), (16, 8))
    # The result's axes are in another order than the product's.
    return jnp.einsum(
      "bh,ho->ob",
      jnp.tanh(jnp.dot(x, up)),
      down,
      out_sharding=P(None, "data") if self.split else None,
    ).T


class Nnx(nnx.Module):
  """The same of Flax's layers."""

  def __init__(self, split):
    rngs = nnx.Rngs(0)
    self.up = nnx.Linear(8, 16, rngs=rngs, use_bias=False)
    self.down = nnx.Linear(16, 8, rngs=rngs, use_bias=False)
    self.out_sharding = P("data", None) if split else None

  def __call__(self, x):
    return self.down(jnp.tanh(self.up(x)), out_sharding=self.out_sharding)


def _kernel_spec(path, x):
  split_by_inputs = "down" in jax.tree_util.keystr(path)
  return P("model", None) if split_by_inputs else P(None, "model")


def _train(make, dora, mesh=None):
  """The base's outputs, the losses, the primary's outputs, and merged ones."""
  model = make(split=mesh is not None)
  spec = LoraSpec(
    rank=2, auxiliary_rank=2, alpha=4.0, dora=dora, targets="|up|down"
  )
  adapted = adapt(model, spec, X)
  whole = make(split=False)
  variables = (
    whole.init(jax.random.key(0), X)
    if isinstance(model, nn.Module)
    else nnx.state(model)
  )
  adapters = adapted.init(jax.random.key(1), variables)
  x, y = X, Y
  if mesh is not None:
    specs = jax.tree_util.tree_map_with_path(_kernel_spec, variables)
    variables = _put(mesh, variables, specs)
    x, y = _put(mesh, (x, y), (P("data", None), P("data", None)))
    adapters = {
      part: jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(
          leaf, NamedSharding(mesh, _factor_spec(path, leaf))
        ),
        tree,
      )
      for part, tree in adapters.items()
    }
  tx = bilora(optax.adam(2e-2), rho=0.1)

  @jax.jit
  def step(adapters, state, variables, x, y):
    def loss_fn(adapters):
      return jnp.square(adapted.apply(variables, adapters, x) - y).mean()

    loss, grads = jax.value_and_grad(loss_fn)(adapters)
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, loss

  state, losses = tx.init(adapters), []
  start = jax.jit(adapted.apply)(variables, adapters, x)
  for _ in range(STEPS):
    adapters, state, loss = step(adapters, state, variables, x, y)
    losses.append(float(loss))
  primary = without_auxiliary(adapters)
  return {
    "start": start,
    "losses": losses,
    "adapters": adapters,
    "primary": jax.jit(adapted.apply)(variables, primary, x),
    "merged": jax.jit(adapted.merge)(variables, adapters),
  }


def _factor_spec(path, leaf):
  """Of `a` the inputs are split as the kernel's, of `b` the outputs."""
  name = jax.tree_util.keystr(path)
  if leaf.ndim == 1:
    return P("model" if "up" in name else None)
  if name.endswith(".a"):
    return P("model" if "down" in name else None, None)
  return P(None, "model" if "up" in name else None)


@pytest.mark.parametrize("make", [Linen, Nnx])
@pytest.mark.parametrize("dora", [False, True])
def test_adapted_models_train_as_on_one_device(make, dora, mesh):
  with jax.set_mesh(mesh):
    found = _train(make, dora, mesh)
  expected = _train(make, dora)
  _assert_close(found, expected)
  assert expected["losses"][-1] < expected["losses"][0]
