"""Norms of all kinds are the dense ones, and the ball scales each alike."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import transcription

from bilora_jax import Factors, _nodes, adapters, keep_in_ball

N, M, RANK = 6, 8, 2
KERNEL = np.random.default_rng(9).normal(size=(N, M))
NODES = {
  "lora": (Factors, {"a": (N, RANK), "b": (RANK, M)}, -0.5),
  "loha": (
    adapters.LoHa,
    {"a1": (N, RANK), "b1": (RANK, M), "a2": (N, 2), "b2": (2, M)},
    -0.5,
  ),
  "lokr": (adapters.LoKr, {"c": (2, 4), "a": (3, RANK), "b": (RANK, 2)}, -0.5),
  "vera": (
    adapters.VeRA,
    {"d": (5,), "g": (M,), "a": (N, 5), "b": (5, M)},
    None,
  ),
  "ia3": (adapters.IA3, {"gain": (M,), "norms": (M,)}, None),
  "prompt": (adapters.SoftPrompt, {"tokens": (3, N)}, None),
  "bottleneck": (
    adapters.Bottleneck,
    {"down": (N, 2), "down_bias": (2,), "up": (2, N), "up_bias": (N,)},
    None,
  ),
}


def make(name, seed=0, batch=(), size=1.0):
  """A random node; what is held of VeRA has no batch axes."""
  rng = np.random.default_rng(seed)
  kind, shapes, scale = NODES[name]
  held = {"a", "b"} if name == "vera" else set()
  fields = {
    field: np.float32(
      (1.0 if field in held else size)
      * rng.normal(size=shape if field in held else (*batch, *shape))
    )
    for field, shape in shapes.items()
  }
  if name == "ia3":
    norms = np.float32(np.linalg.norm(KERNEL, axis=0))
    fields["norms"] = np.broadcast_to(norms, (*batch, M))
    return kind(**fields, size_in=N)
  return kind(**fields) if scale is None else kind(**fields, scale=scale)


def dense_norm(name, node, index=()):
  """By the dense weight, in float64."""
  arrays = {
    field.name: np.float64(getattr(node, field.name))
    for field in dataclasses.fields(node)
    if not field.metadata.get("static")
  }
  held = ("a", "b") if name == "vera" else ()
  params = {k: x if k in held else x[index] for k, x in arrays.items()}
  problem = transcription.Problem(
    {}, {}, {name: KERNEL}, {name: NODES[name][2] or 1.0}, np.zeros(())
  )
  return np.linalg.norm(transcription.perturbation(name, params, problem))


@pytest.mark.parametrize("name", NODES)
def test_the_norm_is_the_dense_one(name):
  plain, stacked = make(name), make(name, 1, (2, 3))
  squares, norms = jax.jit(
    lambda *nodes: (
      [node.squared_norm() for node in nodes],
      [adapters.norm(node) for node in nodes],
    )
  )(plain, stacked)
  for node, square, norm in zip((plain, stacked), squares, norms):
    assert square.dtype == norm.dtype == jnp.float32
    expected = [
      dense_norm(name, node, index) for index in np.ndindex(square.shape)
    ]
    # Sums of some hundred float32 products.
    np.testing.assert_allclose(np.ravel(norm), expected, rtol=5e-6)
    np.testing.assert_allclose(np.ravel(square) ** 0.5, expected, rtol=5e-6)
  assert squares[1].shape == (2, 3)


@pytest.mark.parametrize("name", NODES)
def test_the_degree_is_how_the_perturbation_grows(name):
  node = make(name)
  held = getattr(node, "held", ())
  doubled = dataclasses.replace(
    node,
    **{
      field: 2 * getattr(node, field)
      for field in NODES[name][1]
      if field not in held
    },
  )
  ratio = dense_norm(name, doubled) / dense_norm(name, node)
  assert ratio == pytest.approx(2 ** type(node).degree, rel=1e-6)


@pytest.mark.parametrize("name", NODES)
def test_the_norm_survives_what_its_square_does_not(name):
  degree = NODES[name][0].degree
  for size in (1e-30, 1e30):
    # So large a norm that float32 holds it, and not its square.
    node = make(name, size=size ** (1 / degree))
    norm = jax.jit(adapters.norm)(node)
    assert norm == pytest.approx(dense_norm(name, node), rel=1e-5)
    assert not 1e-37 < float(node.squared_norm()) < 1e37


def projected(tree, tx):
  """What an update from zero to these nodes ends at, and the state."""

  @jax.jit
  def update(tree):
    # What is held is there before, and does not move.
    start = {
      name: _nodes.map_fields(
        lambda field, x, node=node: (
          x if _nodes.is_held(node, field) else jnp.zeros_like(x)
        ),
        node,
      )
      for name, node in tree.items()
    }
    steps = jax.tree.map(jnp.subtract, tree, start)
    updates, state = tx.update(steps, tx.init(start), start)
    return optax.apply_updates(start, updates), state

  return update(tree)


def test_one_update_brings_a_mixture_onto_the_sphere_each_by_one_share():
  tree = {name: make(name, seed) for seed, name in enumerate(NODES)}
  before = {name: dense_norm(name, node) for name, node in tree.items()}
  whole = np.linalg.norm(list(before.values()))
  new, state = projected(tree, keep_in_ball(0.05))
  after = {name: dense_norm(name, node) for name, node in new.items()}
  assert np.linalg.norm(list(after.values())) == pytest.approx(0.05, rel=1e-6)
  for name in NODES:
    share = after[name] / before[name]
    # Float32, of which up to four factors are multiplied.
    assert share == pytest.approx(0.05 / whole, rel=2e-6), name
  np.testing.assert_allclose(state.auxiliary_norm, whole, rtol=1e-6)
  # The smallest is that of degree 1.
  np.testing.assert_allclose(state.clip_factor, 0.05 / whole, rtol=1e-6)
  for held in ("a", "b"):
    np.testing.assert_array_equal(
      getattr(new["vera"], held), getattr(tree["vera"], held)
    )
  np.testing.assert_array_equal(new["ia3"].norms, tree["ia3"].norms)


def test_a_ball_for_each_is_one_for_each_index():
  tree = {name: make(name, i, (2,)) for i, name in enumerate(NODES)}
  new, _ = projected(tree, keep_in_ball(0.1, clip="layer"))
  for name, node in new.items():
    for index in (0, 1):
      size = dense_norm(name, node, (index,))
      assert size == pytest.approx(0.1, rel=1e-6), name


def test_a_radius_of_zero_leaves_each_kind_a_way_out():
  tree = {name: make(name) for name in NODES}
  new, _ = projected(tree, keep_in_ball(0.0))
  toward = {name: make(name, seed=5) for name in NODES}

  def climbed(tree):
    # Linear in each weight: its gradient is not zero where a step can climb.
    total = 0.0
    for name, node in tree.items():
      if hasattr(node, "factors"):
        total += jnp.sum(node.factors().weight() * KERNEL)
      elif isinstance(node, Factors):
        total += jnp.sum(node.weight() * KERNEL)
      else:
        pairs = zip(jax.tree.leaves(node), jax.tree.leaves(toward[name]))
        total += sum(jnp.sum(x * y) for x, y in pairs)
    return total

  grads = jax.jit(jax.grad(climbed))(new)
  for name, node in new.items():
    assert dense_norm(name, node) == 0, name
    held = getattr(node, "held", ())
    slopes = [getattr(grads[name], f) for f in NODES[name][1] if f not in held]
    assert any(np.any(x) for x in slopes), name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quadratic:
  """A user's own node: a perturbation that is a sum of squares."""

  degree: ClassVar[int] = 2

  x: Any

  def squared_norm(self):
    return jnp.sum(self.x.astype(jnp.float32) ** 4, axis=-1)


@pytest.mark.parametrize("size", [1.0, 1e-8, 1e14])
def test_a_node_of_a_users_own_is_kept_too(size):
  node = Quadratic(np.float32(size) * np.float32([1.0, -2.0, 3.0]))
  norm = size**2 * np.sqrt(1 + 16 + 81)
  radius = 1e-3 * norm
  tx = keep_in_ball(radius)
  updates, state = tx.update(Quadratic(jnp.zeros(3)), tx.init(node), node)
  np.testing.assert_allclose(state.auxiliary_norm, norm, rtol=1e-6)
  moved = optax.apply_updates(node, updates)
  np.testing.assert_allclose(moved.x, 1e-3**0.5 * node.x, rtol=1e-5)


def test_half_a_node_and_sharded_kinds_are_refused():
  node = make("lokr")
  half = dataclasses.replace(node, c=optax.MaskedNode())
  with pytest.raises(ValueError, match=r"all fields of a LoKr, or none; .*'w'"):
    keep_in_ball(0.1).init({"w": half})
  split = jax.sharding.PartitionSpec("model")
  specs = jax.tree.map(lambda _: split, node)
  tx = keep_in_ball(0.1, specs={"w": specs})
  with pytest.raises(ValueError, match=r"specs may shard only pairs; got"):
    tx.update({"w": node}, tx.init({"w": node}), {"w": node})


def test_the_kinds_keep_their_bounds():
  kernel = jnp.ones((6, 9))
  for make_kind in (adapters.loha, adapters.lokr, adapters.vera):
    with pytest.raises(ValueError, match=r"rank .* at least 1; got 0"):
      make_kind(rank=0)
  with pytest.raises(ValueError, match=r"blocks .* at least 1; got 0"):
    adapters.lokr(blocks=0)
  node = adapters.lokr(rank=1, blocks=4)(jax.random.key(0), kernel)
  assert (node.c.shape, node.a.shape, node.b.shape) == ((3, 3), (2, 1), (1, 3))
  assert node.outer_shape == ((), 6, 9)
  assert problems.dense(node.factors()).shape == (6, 9)
