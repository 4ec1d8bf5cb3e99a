"""`Layout` and `joined`: what hosts hold, split along the rank and back."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import qwix

from bilora_jax import (
  Layout,
  LoraSpec,
  adapt,
  bilora,
  joined,
  nnx_lora_layout,
  peft,
  qwix_layout,
)

R1, RANK = 2, 5
GEMMA = Layout("lora/a", "lora/b", 1.0)


def _normal(*shape):
  seed = sum(shape)
  draw = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(draw, jnp.float32)


def _nnx_lora():
  return nnx.state(
    nnx.List(
      [nnx.LoRALinear(4, 3, lora_rank=RANK, rngs=nnx.Rngs(i)) for i in range(2)]
    ),
    nnx.LoRAParam,
  )


def _qwix():
  with_lora = qwix.apply_lora_to_model(
    nnx.MultiHeadAttention(2, 6, 8, decode=False, rngs=nnx.Rngs(0)),
    qwix.LoraProvider(module_path=".*", rank=RANK, alpha=10.0),
    jnp.ones((1, 3, 6)),
    rngs=nnx.Rngs(1),
  )
  return nnx.state(with_lora, nnx.LoRAParam)


TREES = {
  "nnx.LoRA": (nnx_lora_layout(), _nnx_lora),
  "qwix in NNX": (qwix_layout(2.0), _qwix),
  "qwix in Linen, with a head": (
    qwix_layout(2.0),
    lambda: {
      "dense": {
        "kernel_lora_a": _normal(4, RANK),
        "kernel_lora_b": _normal(RANK, 3),
      },
      "head": [_normal(3, 2), _normal(2)],
    },
  ),
  "qwix convolution": (
    qwix_layout(2.0),
    lambda: {
      "kernel_lora_a": _normal(3, 2, 4, RANK),
      "kernel_lora_b": _normal(RANK, 6),
    },
  ),
  "scanned": (
    qwix_layout(2.0),
    lambda: {
      "layers": {
        "kernel_lora_a": _normal(7, 4, RANK),
        "kernel_lora_b": _normal(7, RANK, 3),
      }
    },
  ),
  "gemma": (
    GEMMA,
    lambda: {
      "attn": {
        "q": {"lora": {"a": _normal(6, RANK), "b": _normal(RANK, 2, 4)}},
        "o": {"lora": {"a": _normal(2, 4, RANK), "b": _normal(RANK, 6)}},
        "scanned": {
          "lora": {"a": _normal(7, 6, RANK), "b": _normal(7, RANK, 2, 4)}
        },
      }
    },
  ),
}


@pytest.fixture(scope="module", params=TREES)
def host(request):
  layout, make = TREES[request.param]
  return layout, make()


def _ranks(tree, layout, rank):
  """The host's shapes with another rank, by their own rule of where it is."""

  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    name = name.removesuffix("/value")
    if name.endswith(layout.a):
      return (*leaf.shape[:-1], rank)
    if name.endswith(layout.b):
      return tuple(rank if n == RANK else n for n in leaf.shape)
    return leaf.shape

  return jax.tree.leaves(
    jax.tree_util.tree_map_with_path(one, tree),
    is_leaf=lambda x: isinstance(x, tuple),
  )


def test_join_undoes_split_to_the_bit(host):
  layout, tree = host
  parts = layout.split(tree, R1)
  assert set(parts) == {"primary", "auxiliary", "extra"}
  back = layout.join(parts, like=tree)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_the_first_columns_are_the_primary_and_weights_add_up(host):
  layout, tree = host
  parts = layout.split(tree, R1)
  pairs, _ = layout._pairs(tree)
  assert set(pairs) == set(parts["primary"]) == set(parts["auxiliary"])
  for name, (a, b) in pairs.items():
    first, second = parts["primary"][name], parts["auxiliary"][name]
    assert (first.rank, second.rank) == (R1, RANK - R1)
    assert first.scale == second.scale == layout.scale
    batch = first.a.shape[:-2]
    a = a.reshape(*batch, -1, RANK)
    b = b.reshape(*batch, RANK, -1)
    np.testing.assert_array_equal(first.a, a[..., :R1])
    # Another order of sums of five float32 products.
    np.testing.assert_allclose(
      first.weight() + second.weight(), layout.scale * (a @ b), atol=1e-5
    )


@pytest.mark.parametrize(
  ("layout", "tree"),
  [
    (Layout("/a", "/b", 1.0), {"a": _normal(4, RANK), "b": _normal(RANK, 3)}),
    (Layout("a", "b", 1.0), {"a": _normal(4, RANK), "b": _normal(RANK, 3)}),
    (
      Layout("a", "b", 1.0),
      {
        "layer": {"a": _normal(4, RANK), "b": _normal(RANK, 3)},
        "alpha": _normal(2),
        "gamma": _normal(3, RANK),
      },
    ),
  ],
  ids=["the root, by paths", "the root", "keys that end in a factor's"],
)
def test_factors_are_found_at_the_root_and_by_whole_keys(layout, tree):
  parts = layout.split(tree, R1)
  (pair,) = parts["primary"].values()
  assert (pair.a.shape, pair.b.shape) == ((4, R1), (R1, 3))
  assert set(parts["extra"]) == set(tree) - {"layer", "a", "b"}
  back = layout.join(parts, like=tree)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_the_hosts_primary_has_rank_r1(host):
  layout, tree = host
  kept = layout.primary(tree, R1)
  assert jax.tree.structure(kept) == jax.tree.structure(tree)
  assert [x.shape for x in jax.tree.leaves(kept)] == _ranks(tree, layout, R1)


def test_all_other_leaves_are_extra():
  layout, make = TREES["qwix in Linen, with a head"]
  tree = make()
  extra = layout.split(tree, R1)["extra"]
  assert set(extra) == {"head/0", "head/1"}
  np.testing.assert_array_equal(extra["head/0"], tree["head"][0])


def test_masked_pairs_and_leaves_stay_masked():
  layout, make = TREES["gemma"]
  tree = {**make(), "head": _normal(3)}
  hidden = optax.MaskedNode()
  tree["attn"]["q"]["lora"] = {"a": hidden, "b": hidden}
  tree["norm"] = hidden
  back = layout.join(layout.split(tree, R1), like=tree)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_joined_under_a_mask_leaves_what_it_hides():
  layout, make = TREES["gemma"]
  tree = make()
  mask = {"attn": {"q": True, "o": False, "scanned": True}}
  tx = optax.masked(joined(bilora(optax.sgd(0.1)), layout, R1), mask)
  updates, _ = _first_update(tx, tree, tree)
  for name, trained in mask["attn"].items():
    a, given = (t["attn"][name]["lora"]["a"] for t in (updates, tree))
    assert np.array_equal(a, given) != trained


def _first_update(tx, grads, params):
  """Compiled: dispatching each operation is slower."""
  return jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(grads, params)


def test_joined_is_the_transformation_of_the_split_tree(host):
  layout, tree = host
  grads = jax.tree.map(lambda x: 0.3 * x + 0.1, tree)
  inner = bilora(optax.adam(0.01), rho=0.01)
  outer = joined(inner, layout, R1)
  parts = layout.split(tree, R1)
  wanted, _ = _first_update(inner, layout.split(grads, R1), parts)
  got, state = _first_update(outer, grads, tree)
  # Two programs, of which XLA fuses the same operations in two ways.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
    got,
    layout.join(wanted, like=tree),
  )
  assert optax.tree.get(state, "auxiliary_norm") > 0.01
  moved = layout.split(optax.apply_updates(tree, got), R1)["auxiliary"]
  norm = np.sqrt(sum(np.sum(p.squared_norm()) for p in moved.values()))
  # Rounding of float32.
  np.testing.assert_allclose(norm, 0.01, rtol=1e-5)


def _error(call, *args):
  with pytest.raises(ValueError) as caught:
    call(*args)
  return str(caught.value)


@pytest.mark.parametrize("rank", [0, RANK, 7, -1])
def test_a_rank_that_leaves_no_auxiliary_is_refused(rank):
  layout, make = TREES["gemma"]
  wanted = (
    "primary_rank is above 0 and below the rank of the host's LoRA, 5 at "
  )
  assert wanted in _error(layout.split, make(), rank)
  tx = joined(bilora(optax.sgd(0.1)), layout, rank)
  assert f"got {rank}." in _error(tx.init, make())


def test_a_tree_without_pairs_is_refused_and_its_paths_listed():
  message = _error(qwix_layout(1.0).split, {"dense": {"kernel": _normal(2)}}, 1)
  assert message == (
    "a LoRA has leaves whose paths end in '_lora_a' and '_lora_b'; got none "
    "among ['dense/kernel']."
  )


def test_half_a_pair_is_refused_by_name():
  tree = {"x": {"lora": {"a": _normal(4, RANK)}}}
  assert "got only one of the two for ['x/']." in _error(GEMMA.split, tree, R1)


@pytest.mark.parametrize(
  "a, b", [((4, 5), (4, 3)), ((7, 4, 5), (6, 5, 3)), ((5,), (5, 3))]
)
def test_a_pair_that_disagrees_is_refused_with_its_shapes(a, b):
  tree = {"x": {"lora": {"a": _normal(*a), "b": _normal(*b)}}}
  message = _error(GEMMA.split, tree, R1)
  assert message.endswith(f"got {a} and {b} at 'x/'.")


class _Heads(nnx.Module):
  """An einsum with heads, and a layer in a list, as Tunix's models have."""

  def __init__(self, rngs):
    self.query = nnx.Einsum("BD,DNH->BNH", (4, 2, 3), rngs=rngs)
    self.layers = nnx.List([nnx.Linear(6, 5, rngs=rngs)])

  def __call__(self, x):
    return self.layers[0](self.query(x).reshape(len(x), -1))


def test_a_lora_that_orbax_kept_is_a_primary(tmp_path):
  model, x = _Heads(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (3, 4))
  provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=3.0)
  host = qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(1))
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda w: jnp.asarray(rng.normal(size=w.shape), w.dtype),
    nnx.state(host, nnx.LoRAParam),
  )
  nnx.update(host, state)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "kept", state)
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(tmp_path / "kept")
  spec = LoraSpec(rank=2, alpha=3.0, auxiliary_rank=0)
  adapted = adapt(model, spec, x)
  wanted = host(x)
  for kept in (restored, state):
    adapters = qwix_layout(3.0 / 2).as_primary(kept)
    assert set(adapters) == {"primary"}
    got = adapted.apply(nnx.state(model), adapters, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
  names = {"query/kernel": "q_proj", "layers/0/kernel": "o_proj"}
  peft.save(tmp_path / "peft", adapted, adapters, names)
  loaded = peft.load(tmp_path / "peft", adapted, names)
  jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
