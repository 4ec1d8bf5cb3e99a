"""Kernels' adapters of other kinds run, merge and train by `adapt`."""

import dataclasses

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilora_jax import (
  Factors,
  LoraSpec,
  adapt,
  adapters,
  bilora,
  save_adapters,
  without_auxiliary,
)

SPEC = LoraSpec(rank=2, auxiliary_rank=3)
KINDS = {
  "in/.*": adapters.lokr(rank=2, blocks=3),
  "layers/query/.*": adapters.loha(rank=2),
  "layers/key/.*": adapters.vera(rank=5),
  "layers/(value|conv)/.*": adapters.ia3(),
  "einsum/.*": adapters.ia3(),
}
X = np.float32(np.random.default_rng(0).normal(size=(2, 5, 6)))
# Of float32 sums of some tens, in two orders.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


class Block(nn.Module):
  """Of a scan: general layers, and a convolution."""

  @nn.compact
  def __call__(self, x, _):
    heads = [
      nn.DenseGeneral((2, 4), name=name)(x)
      for name in ("query", "key", "value")
    ]
    joined = sum(jnp.tanh(h) for h in heads).reshape(*x.shape[:-1], 8)
    return jnp.tanh(nn.Conv(8, (3,), name="conv")(joined)) + x, None


class Model(nn.Module):
  """Dense and general layers, einsums and convolutions, some scanned."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name="in")(x)
    scan = nn.scan(
      Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )
    x, _ = scan(name="layers")(x, None)
    x = nn.Einsum((2, 8, 4), "bti,kio->btko", name="einsum")(x)
    return nn.Dense(3, name="out")(x.reshape(*x.shape[:2], 8))


def shaken(tree):
  """With all that is trained away from zero."""
  rng = np.random.default_rng(1)

  def one(node):
    held = getattr(node, "held", ())
    return dataclasses.replace(
      node,
      **{
        f.name: getattr(node, f.name)
        + np.float32(0.1 * rng.normal(size=getattr(node, f.name).shape))
        for f in dataclasses.fields(node)
        if f.name not in held and not f.metadata.get("static")
      },
    )

  return jax.tree.map(one, tree, is_leaf=lambda x: hasattr(x, "degree"))


def dense(node, kernel):
  """The weight that a node adds to a kernel `(*batch, in, out)`, float64."""
  if isinstance(node, adapters.IA3):
    return np.float64(kernel) * np.float64(node.gain)[..., None, :]
  pair = node if isinstance(node, Factors) else node.factors()
  return pair.scale * np.float64(pair.a) @ np.float64(pair.b)


@pytest.fixture(scope="module")
def linen():
  model = Model()
  variables = jax.jit(model.init)(jax.random.key(0), X)
  adapted = adapt(model, SPEC, X)
  new = adapters.init(jax.random.key(1), adapted, variables, KINDS)
  return model, variables, adapted, new


def test_each_kernel_has_its_kind_and_the_model_stays_as_it_is(linen):
  model, variables, adapted, new = linen
  assert set(new) == {"primary", "auxiliary"}
  for part, rank in ("primary", 2), ("auxiliary", 3):
    layers = new[part]["layers"]
    kinds = {k: type(x["kernel"]).__name__ for k, x in layers.items()}
    assert kinds == {
      "query": "LoHa",
      "key": "VeRA",
      "value": "IA3",
      "conv": "IA3",
    }
    assert isinstance(new[part]["in"]["kernel"], adapters.LoKr)
    assert new[part]["out"]["kernel"].rank == rank
    # One frozen pair for both layers.
    assert layers["key"]["kernel"].a.shape == (8, 5)
    assert layers["key"]["kernel"].d.shape == (2, 5)
  drawn = [new[p]["in"]["kernel"].a for p in ("primary", "auxiliary")]
  assert not np.array_equal(*drawn)
  run, plain = jax.jit(
    lambda v, a: (adapted.apply(v, a, X), model.apply(v, X))
  )(variables, new)
  np.testing.assert_allclose(run, plain, rtol=1e-6, atol=1e-6)


def test_the_layers_multiply_by_the_dense_sums(linen):
  model, variables, adapted, new = linen
  new = shaken(new)

  def by_hand(parts):
    params = jax.tree.map(np.float64, variables["params"])
    for name in adapted.targets:
      *path, leaf = name.split("/")
      owner, nodes = params, [new[part] for part in parts]
      for key in path:
        owner, nodes = owner[key], [tree[key] for tree in nodes]
      kernel = owner[leaf]
      if path[-1] == "einsum":
        kernel = kernel.transpose(1, 0, 2)  # its input is the middle axis
      scanned = kernel.shape[: path[0] == "layers"]
      if path[-1] == "conv":
        matrices = kernel.reshape(*scanned, -1, kernel.shape[-1])
      else:
        matrices = kernel.reshape(*scanned, kernel.shape[len(scanned)], -1)
      total = matrices + sum(dense(tree[leaf], matrices) for tree in nodes)
      owner[leaf] = total.reshape(kernel.shape)
      if path[-1] == "einsum":
        owner[leaf] = owner[leaf].transpose(1, 0, 2)
    return {"params": jax.tree.map(np.float32, params)}

  def run(variables, new, both, one):
    return (
      (adapted.apply(variables, new, X), model.apply(both, X)),
      (
        adapted.apply(variables, without_auxiliary(new), X),
        model.apply(one, X),
      ),
      (model.apply(adapted.merge(variables, new), X), model.apply(one, X)),
    )

  pairs = jax.jit(run)(
    variables, new, by_hand(("primary", "auxiliary")), by_hand(("primary",))
  )
  for got, expected in pairs:
    np.testing.assert_allclose(got, expected, **CLOSE)
  assert np.abs(pairs[0][0] - pairs[1][0]).max() > 0.01


def test_a_step_moves_all_and_ends_in_the_ball(linen):
  _, variables, adapted, new = linen
  tx = bilora(optax.adamw(0.02, weight_decay=0.1), rho=0.05)

  @jax.jit
  def step(new, state):
    def loss(new):
      return jnp.mean((adapted.apply(variables, new, X) - 1) ** 2)

    updates, state = tx.update(jax.grad(loss)(new), state, new)
    return optax.apply_updates(new, updates), state

  state, moved = jax.jit(tx.init)(new), new
  for _ in range(3):
    moved, state = step(moved, state)
  nodes = jax.tree.leaves(
    moved["auxiliary"], is_leaf=lambda x: hasattr(x, "degree")
  )
  assert len(nodes) == 7
  square = sum(np.sum(np.square(adapters.norm(node))) for node in nodes)
  assert np.sqrt(square) == pytest.approx(0.05, rel=1e-6)

  def check(before, after):
    for field in dataclasses.fields(before):
      if field.metadata.get("static"):
        continue
      x, y = (getattr(node, field.name) for node in (before, after))
      assert np.isfinite(y).all()
      # Decay would move what is held, if anything did.
      held = field.name in getattr(before, "held", ())
      assert np.array_equal(x, y) == held, field.name

  jax.tree.map(check, new, moved, is_leaf=lambda x: hasattr(x, "degree"))


class Nnx(nnx.Module):
  """Two layers of different shapes."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.first = nnx.Linear(6, 9, rngs=rngs)
    self.second = nnx.Linear(9, 4, rngs=rngs)

  def __call__(self, x):
    return self.second(jnp.tanh(self.first(x)))


@pytest.mark.parametrize("kind", ["ia3", "loha"])
def test_nnx_runs_them_too(kind):
  model = Nnx()
  variables, adapted = nnx.state(model), adapt(model, SPEC, X)
  new = adapters.init(
    jax.random.key(0),
    adapted,
    variables,
    {"first/.*": getattr(adapters, kind)()},
  )
  new = shaken(new)
  whole = {}
  for name in ("first", "second"):
    kernel = np.float64(variables[name]["kernel"][...])
    nodes = [new[part][name]["kernel"] for part in new]
    whole[name] = kernel + sum(dense(node, kernel) for node in nodes)
  hidden = np.tanh(X @ whole["first"])
  got = adapted.apply(variables, new, X)
  np.testing.assert_allclose(got, hidden @ whole["second"], **CLOSE)
  graphdef = nnx.graphdef(model)
  merged = nnx.merge(graphdef, adapted.merge(variables, new))(X)
  alone = adapted.apply(variables, without_auxiliary(new), X)
  np.testing.assert_allclose(merged, alone, **CLOSE)


def test_a_pair_and_a_gain_of_one_weight_both_count():
  # The kernel has the shape of the pair's `a`, which Qwix could not tell apart.
  model = nnx.Linear(6, 2, rngs=nnx.Rngs(0))
  variables, adapted = nnx.state(model), adapt(model, SPEC, X)
  gains = adapters.init(jax.random.key(0), adapted, variables, adapters.ia3())[
    "auxiliary"
  ]
  primary = adapted.init(jax.random.key(1), variables)["primary"]
  new = shaken({"primary": primary, "auxiliary": gains})
  kernel = np.float64(variables["kernel"][...])
  whole = kernel + dense(new["primary"]["kernel"], kernel)
  whole += dense(new["auxiliary"]["kernel"], whole)
  got = adapted.apply(variables, new, X)
  np.testing.assert_allclose(got, X @ whole, **CLOSE)


def test_a_quantised_base_and_dora_take_them():
  model, x = nn.Dense(5, use_bias=False), X[0]
  variables = model.init(jax.random.key(0), x)
  spec = dataclasses.replace(SPEC, base_dtype="int8", dora=True)
  adapted = adapt(model, spec, x)
  quantised = adapted.quantize(variables)
  new = adapters.init(jax.random.key(1), adapted, quantised, adapters.ia3())
  gains = {"primary": 0.5, "auxiliary": -0.2}
  for part, gain in gains.items():
    node = new[part]["kernel"]
    new[part]["kernel"] = dataclasses.replace(node, gain=node.gain + gain)
  plain = adapted.apply(
    quantised, adapted.init(jax.random.key(1), quantised), x
  )
  both = adapted.apply(quantised, new, x)
  np.testing.assert_allclose(both, 1.3 * plain, rtol=1e-5)
  merged = model.apply(adapted.merge(quantised, new), x)
  np.testing.assert_allclose(merged, 1.5 * plain, rtol=1e-5, atol=1e-6)


def test_logical_axes_of_other_kinds_are_whole(linen):
  _, variables, adapted, new = linen
  specs = adapted.partition_specs(variables, new)
  leaves = jax.tree.leaves(
    specs["primary"]["layers"]["query"],
    is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec),
  )
  assert leaves == [jax.sharding.PartitionSpec()] * 4
  assert jax.tree.structure(specs) == jax.tree.structure(
    jax.tree.map(lambda _: jax.sharding.PartitionSpec(), new)
  )


def test_what_does_not_fit_is_refused(linen, tmp_path):
  _, variables, adapted, new = linen
  wrong = jax.tree.map(lambda x: x, new)
  kernel = wrong["primary"]["in"]["kernel"]
  wrong["primary"]["in"]["kernel"] = dataclasses.replace(kernel, c=kernel.c[:1])
  with pytest.raises(
    ValueError,
    match=r"primary/in/kernel: \(\(\), 2, 8\), expected \(\(\), 6, 8\)",
  ):
    adapted.apply(variables, wrong, X)
  prompt = {"in": {"kernel": adapters.SoftPrompt(jnp.ones((3, 6)))}}
  with pytest.raises(ValueError, match=r"in/kernel: SoftPrompt, expected"):
    adapted.apply(variables, {**new, "auxiliary": prompt}, X)
  # Files and PEFT have pairs alone.
  with pytest.raises(ValueError, match=r"primary/in/kernel: .*expected \(\(6"):
    save_adapters(tmp_path, adapted, new)
  with pytest.raises(
    ValueError, match=r"no kernel gets the kinds of .*\['nil'\]"
  ):
    adapters.init(
      jax.random.key(0), adapted, variables, {"nil": adapters.ia3()}
    )
  with pytest.raises(ValueError, match="pattern"):
    adapters.init(jax.random.key(0), adapted, variables, {"(": adapters.ia3()})
