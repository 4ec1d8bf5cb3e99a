"""Nodes that are alike are measured as one, and others are not."""

import re

import devices
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from bilora_jax import Factors, _stacks, adapters, keep_in_ball
from bilora_jax.variants import power_ascent


def _pair(seed, size=4, rank=2, scale=1.0):
  key_a, key_b = jax.random.split(jax.random.key(seed))
  return Factors(
    jax.random.normal(key_a, (size, rank)),
    jax.random.normal(key_b, (rank, 3)),
    scale,
  )


def _layers(count):
  """Layers that are written out, each with two pairs of one shape."""
  return {
    f"layers_{i}": {"q": _pair(i), "v": _pair(100 + i)} for i in range(count)
  }


def test_layers_are_stacked_by_name_shape_and_scale():
  tree = _layers(3) | {
    "layers_3": {"q": _pair(3, size=5), "v": _pair(4, scale=2.0)},
    "w1": _pair(5),
    "w2": _pair(6),
    "hidden": Factors(optax.MaskedNode(), optax.MaskedNode()),
    "prompt": adapters.SoftPrompt(jnp.ones((5, 4))),
  }
  groups = _stacks.alike(tree).groups
  # In the tree's order: q and v of each layer, the prompt, w1, w2.
  assert groups == ((0, 2, 4), (1, 3, 5), (6,), (7,), (8,), (9,), (10,))


def test_unstacking_undoes_stacking():
  tree = _layers(3)
  nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Factors))
  stacks = _stacks.alike(tree)
  again = stacks.unstack(stacks.stack(nodes))
  jax.tree.map(np.testing.assert_array_equal, again, nodes)


def test_specs_that_differ_are_not_stacked():
  split, whole = Factors(P("model"), P()), Factors(P(), P())
  # In the tree's order: q and v of two layers.
  specs = [whole, whole, whole, split]
  assert _stacks.alike(_layers(2), specs).groups == ((0, 2), (1,), (3,))


@pytest.mark.parametrize("tx", [keep_in_ball(0.05), power_ascent()])
def test_more_layers_are_no_more_products(tx):
  def products(count):
    tree = _layers(count)
    lowered = jax.jit(tx.update).lower(tree, tx.init(tree), tree)
    return len(re.findall("stablehlo.dot_general", lowered.as_text()))

  assert products(2) == products(7) > 0


def test_stacking_gathers_nothing_that_is_sharded():
  # Of one shape: q is split by its columns, and o by its rows.
  mesh = devices.mesh(model=8)
  specs = {
    "q": Factors(P(), P(None, "model")),
    "o": Factors(P("model", None), P()),
  }
  tree = {
    f"layers_{i}": {
      name: Factors(jnp.ones((16, 2)), jnp.ones((2, 16)), spec.scale)
      for name, spec in specs.items()
    }
    for i in range(3)
  }
  shardings = jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    dict.fromkeys(tree, specs),
    is_leaf=lambda x: isinstance(x, P),
  )
  tree = jax.device_put(tree, shardings)
  shardings = shardings, None
  tx = keep_in_ball(0.05)
  update = jax.jit(tx.update, out_shardings=shardings)
  text = update.lower(tree, tx.init(tree), tree).compile().as_text()
  assert "all-reduce" in text
  assert "all-gather" not in text and "all-to-all" not in text
