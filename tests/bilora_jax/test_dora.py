"""DoRA, alone and with the auxiliary, against its equation on dense weights."""

import json
import re

from flax import linen as nn
from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from bilora_jax import (
  Factors,
  LoraSpec,
  adapt,
  bilora,
  initializers,
  load_adapters,
  load_spec,
  primary,
  save_adapters,
)

SPEC = LoraSpec(rank=2, alpha=3.0, auxiliary_rank=1, dora=True)
# Sums of fewer than 100 float32 products of order 1, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
X = np.random.default_rng(0).normal(size=(5, 4, 4, 2)).astype(np.float32)


class _Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.tanh(nn.Dense(6, name="dense")(x)), None


class _Model(nn.Module):
  """A convolution, two scanned layers, a kernel of three axes, experts."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (2, 3), name="conv")(x).mean((1, 2))
    scan = nn.scan(
      nn.remat(_Layer),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=2,
    )
    x = scan(name="layers")(x, None)[0]
    x = nn.DenseGeneral((2, 4), name="heads")(x)
    return nn.Einsum((2, 4, 3), "bek,ekf->bef", use_bias=False, name="experts")(
      x
    )


# Each kernel's shape as (*batch, in, out), by its path.
MATRICES = {
  "conv/kernel": (12, 6),
  "layers/dense/kernel": (2, 6, 6),
  "heads/kernel": (6, 8),
  "experts/kernel": (2, 4, 3),
}


@pytest.fixture(scope="module")
def made():
  """A model, its variables, and adapters of which nothing is zero."""
  model = _Model()
  variables = model.init(jax.random.key(0), X)
  adapted = adapt(model, SPEC, X)
  assert set(adapted.targets) == set(MATRICES)
  fresh = adapted.init(jax.random.key(1), variables)
  leaves, structure = jax.tree.flatten(fresh)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  moved = structure.unflatten(
    [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
  )
  return model, adapted, variables, fresh, moved


def _dense(variables, adapters, parts, stop=lambda norm: norm):
  """The variables at `m (W0 + s a b) / ||W0 + s a b||`, by hand."""
  flat = traverse_util.flatten_dict(variables["params"], sep="/")
  extra = traverse_util.flatten_dict(adapters["extra"], sep="/")
  pairs = [
    traverse_util.flatten_dict(
      adapters[part], sep="/", is_leaf=lambda _, x: isinstance(x, Factors)
    )
    for part in parts
  ]
  for path, shape in MATRICES.items():
    weight = flat[path].reshape(shape)
    weight += sum(1.5 * (own[path].a @ own[path].b) for own in pairs)
    norm = stop(jnp.linalg.norm(weight, axis=-2, keepdims=True))
    magnitude = extra[f"{path}_magnitude"][..., None, :]
    flat[path] = (magnitude * weight / norm).reshape(flat[path].shape)
  return {"params": traverse_util.unflatten_dict(flat, sep="/")}


def test_a_new_adapter_leaves_the_model_as_it_is(made):
  model, adapted, variables, fresh, _ = made
  wanted = model.apply(variables, X)
  for own in (fresh, primary(fresh)):
    np.testing.assert_allclose(
      adapted.apply(variables, own, X), wanted, **CLOSE
    )
  norms = traverse_util.flatten_dict(fresh["extra"], sep="/")
  assert set(norms) == {f"{path}_magnitude" for path in MATRICES}
  kernel = np.float64(variables["params"]["conv"]["kernel"]).reshape(12, 6)
  np.testing.assert_allclose(
    norms["conv/kernel_magnitude"], np.linalg.norm(kernel, axis=0), **CLOSE
  )


def test_outputs_are_those_of_the_equation(made):
  model, adapted, variables, _, moved = made
  both = _dense(variables, moved, ("primary", "auxiliary"))
  one = _dense(variables, moved, ("primary",))
  for adapters, dense in ((moved, both), (primary(moved), one)):
    np.testing.assert_allclose(
      adapted.apply(variables, adapters, X), model.apply(dense, X), **CLOSE
    )
  merged = adapted.merge(variables, moved)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), merged, one
  )


def test_gradients_hold_the_norms_fixed(made):
  model, adapted, variables, _, moved = made
  target = jnp.sin(jnp.arange(30.0)).reshape(5, 2, 3)

  def loss(apply):
    return jnp.sum((apply() - target) ** 2)

  got = jax.jit(
    jax.grad(
      lambda adapters: loss(lambda: adapted.apply(variables, adapters, X))
    )
  )(moved)
  wanted = jax.jit(
    jax.grad(
      lambda adapters: loss(
        lambda: model.apply(
          _dense(
            variables,
            adapters,
            ("primary", "auxiliary"),
            stop=jax.lax.stop_gradient,
          ),
          X,
        )
      )
    )
  )(moved)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
    got,
    wanted,
  )
  assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(got))


def test_bilora_trains_magnitudes_with_the_primary(made):
  _, adapted, variables, fresh, _ = made
  tx = bilora(optax.sgd(0.1), rho=0.05)

  @jax.jit
  def step(adapters):
    grads = jax.grad(
      lambda own: jnp.sum(adapted.apply(variables, own, X) ** 2)
    )(adapters)
    updates, _ = tx.update(grads, tx.init(adapters), adapters)
    return optax.apply_updates(adapters, updates), grads

  new, grads = step(fresh)
  for before, after, grad in zip(
    *map(jax.tree.leaves, (fresh["extra"], new["extra"], grads["extra"]))
  ):
    np.testing.assert_allclose(after, before - 0.1 * grad, **CLOSE)
    assert np.abs(grad).max() > 0


def test_no_product_of_the_two_factors_is_formed(made):
  _, adapted, variables, _, moved = made
  text = str(
    jax.make_jaxpr(
      jax.grad(lambda own: jnp.sum(adapted.apply(variables, own, X)))
    )(moved)
  )
  shapes = set(re.findall(r"f32\[([\d,]+)\] = dot_general", text))
  # Of two layers with rank 3 in all, and 5 rows; (6, 6) would be the product.
  assert {"2,3,6", "5,6"} <= shapes
  assert not {"2,6,6", "6,6", "12,6", "6,8"} & shapes


def test_specs_of_magnitudes_follow_the_outputs():
  spec = jax.sharding.PartitionSpec
  init = nn.with_logical_partitioning(
    nn.initializers.lecun_normal(), ("embed", "mlp")
  )
  model, x = nn.Dense(8, kernel_init=init), np.ones((1, 4), np.float32)
  adapted = adapt(model, SPEC, x)
  variables = model.init(jax.random.key(0), x)
  adapters = adapted.init(jax.random.key(1), variables)
  specs = adapted.partition_specs(variables, adapters)
  assert specs["extra"] == {"kernel_magnitude": spec("mlp")}
  assert specs["primary"]["kernel"].a == spec("embed", None)


def test_nnx_is_as_linen_and_starts_of_others_go_with_it():
  model = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
  x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
  variables, adapted = nnx.state(model), adapt(model, SPEC, x)
  adapters = adapted.init(jax.random.key(0), variables)
  base, adapters = initializers.pissa(adapted, variables, adapters)
  np.testing.assert_allclose(
    adapted.apply(base, adapters, x), model(x), **CLOSE
  )
  pair = adapters["primary"]["kernel"]
  adapters["primary"]["kernel"] = Factors(pair.a, 2 * pair.b, pair.scale)
  kernel = np.float64(base["kernel"][...]) + 2 * np.float64(pair.weight())
  magnitude = np.linalg.norm(np.float64(model.kernel[...]), axis=0)
  kernel *= magnitude / np.linalg.norm(kernel, axis=0)
  np.testing.assert_allclose(
    adapted.apply(base, adapters, x), x @ kernel + model.bias[...], **CLOSE
  )


@pytest.mark.parametrize("changed", [{"dora": True}, {"base_dtype": "int8"}])
def test_an_nnx_weight_of_its_factor_s_shape_is_as_in_linen(changed):
  # r1 + r2 = 3 makes the joined a (4, 3) as well.
  spec = LoraSpec(rank=2, auxiliary_rank=1, **changed)
  x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
  model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  states = nnx.state(model), {"params": nnx.to_pure_dict(nnx.state(model))}
  outputs = []
  for host, state in zip((model, nn.Dense(3)), states):
    adapted = adapt(host, spec, x)
    state = adapted.quantize(state) if spec.base_dtype else state
    adapters = adapted.init(jax.random.key(0), state)
    adapters = jax.tree.map(lambda leaf: leaf + 0.5, adapters)
    outputs.append(adapted.apply(state, adapters, x))
  np.testing.assert_allclose(*outputs, rtol=1e-6)


def test_a_quantised_base_has_the_norms_of_what_it_stands_for():
  spec = LoraSpec(rank=2, dora=True, base_dtype="int8", tile_size=8)
  model, x = nn.Dense(8, use_bias=False), np.ones((2, 16), np.float32)
  adapted = adapt(model, spec, x)
  variables = adapted.quantize(model.init(jax.random.key(0), x))
  adapters = adapted.init(jax.random.key(1), variables)
  plain = adapted.merge(variables, adapters)
  np.testing.assert_allclose(
    adapters["extra"]["kernel_magnitude"],
    np.linalg.norm(plain["params"]["kernel"], axis=0),
    **CLOSE,
  )
  np.testing.assert_allclose(
    adapted.apply(variables, adapters, x), model.apply(plain, x), **CLOSE
  )


def test_a_column_of_zeros_stays():
  model, x = nn.Dense(3, kernel_init=nn.initializers.zeros), np.ones((1, 4))
  adapted = adapt(model, SPEC, x)
  variables = model.init(jax.random.key(0), x)
  adapters = adapted.init(jax.random.key(1), variables)
  value, grads = jax.value_and_grad(
    lambda own: jnp.sum(adapted.apply(variables, own, x))
  )(adapters)
  assert value == 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_files_keep_magnitudes_and_older_ones_have_none(made, tmp_path):
  model, adapted, _, _, moved = made
  save_adapters(tmp_path / "new", adapted, moved)
  back = load_adapters(tmp_path / "new", adapted)
  jax.tree.map(np.testing.assert_array_equal, back, moved)
  with pytest.raises(ValueError, match="dora is True there and False here"):
    load_adapters(tmp_path / "new", adapt(model, LoraSpec(rank=2), X))
  plain = LoraSpec(rank=2, alpha=3.0, auxiliary_rank=1)
  lora = adapt(model, plain, X)
  with pytest.raises(
    ValueError, match=r"heads/kernel_magnitude: \(8,\), expected nothing"
  ):
    lora.check(moved)
  # As files were written before there was DoRA.
  adapters = {part: moved[part] for part in ("primary", "auxiliary")}
  save_adapters(tmp_path / "old", lora, adapters)
  path = tmp_path / "old" / "adapters.json"
  config = json.loads(path.read_text())
  del config["spec"]["dora"]
  path.write_text(json.dumps(config))
  (tmp_path / "old" / "adapters.safetensors").write_bytes(
    safetensors.numpy.save(
      safetensors.numpy.load_file(path.with_suffix(".safetensors")),
      metadata={"bilora_jax": json.dumps(config)},
    )
  )
  assert load_spec(tmp_path / "old") == plain
  back = load_adapters(tmp_path / "old", lora)
  jax.tree.map(np.testing.assert_array_equal, back, adapters)
