"""`adapt` on Linen: the same outputs as dense weights summed by hand."""

import collections
from collections.abc import Callable
import functools
import math
import runpy
from typing import Any, NamedTuple

from dense import outputs
import devices
from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix

from bilora_jax import LoraSpec, adapt, bilora, primary

SPEC = LoraSpec(rank=2, alpha=3.0, auxiliary_rank=3)
SCALE = 1.5  # 3 / 2
# Sums of fewer than 100 float32 products of order 1, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KEY = jax.random.key(0)


def _normal(*shape, seed=0, dtype=jnp.float32):
  draw = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(draw, dtype)


class Dense2(nn.Module):
  """A layer by itself and one behind `nn.remat`."""

  @nn.compact
  def __call__(self, x):
    return nn.remat(nn.Dense)(3, name="b")(nn.tanh(nn.Dense(4, name="a")(x)))


class Layer(nn.Module):
  """One layer of `Scanned`."""

  @nn.compact
  def __call__(self, x, _):
    return nn.tanh(nn.Dense(5, name="dense")(x)), None


class Scanned(nn.Module):
  """Layers under `nn.scan` and `nn.remat`."""

  axis: int = 0

  @nn.compact
  def __call__(self, x):
    scan = nn.scan(
      nn.remat(Layer),
      variable_axes={"params": self.axis},
      split_rngs={"params": True},
      length=3,
    )
    return scan(name="layers")(x, None)[0]


class Attention(nn.Module):
  """Self-attention, whose projections are of three axes."""

  @nn.compact
  def __call__(self, x):
    return nn.MultiHeadDotProductAttention(
      num_heads=2, qkv_features=6, out_features=7, name="attention"
    )(x)


class Custom(nn.Module):
  """A weight multiplied by in some way, beside a layer as any other."""

  multiply: Callable[[Any, Any], Any]
  shape: tuple[int, ...] = (5, 5)
  name_of_weight: str = "w"

  @nn.compact
  def __call__(self, x):
    w = self.param(self.name_of_weight, nn.initializers.normal(), self.shape)
    return nn.Dense(3, name="dense")(self.multiply(x, w))


class Weight(NamedTuple):
  """A kernel as the equations of its layer have it.

  `a` and `b` are reshaped to `left + (r,)` and `(r,) + right` behind the batch
  axes, and multiplied by `einsum`.
  """

  batch: tuple[int, ...]
  left: tuple[int, ...]
  right: tuple[int, ...]
  einsum: str


class Case(NamedTuple):
  """A model, its input, and the equations of its weights."""

  model: nn.Module
  x: Any
  weights: dict[str, Weight]


def _convolved_by_the_transpose(x, w):
  """Convolves with a kernel that is stored as `(out, in, width)`."""
  return jax.lax.conv_general_dilated(
    x,
    jnp.transpose(w, (2, 1, 0)),
    (1,),
    "SAME",
    dimension_numbers=("NWC", "WIO", "NWC"),
  )


PROJECTION = Weight((), (5,), (2, 3), "ir,rhd->ihd")
CASES = {
  "dense": Case(
    Dense2(),
    _normal(2, 5),
    {
      "a/kernel": Weight((), (5,), (4,), "ir,ro->io"),
      "b/kernel": Weight((), (4,), (3,), "ir,ro->io"),
    },
  ),
  "dense_general": Case(
    nn.DenseGeneral((2, 4), axis=(-2, -1)),
    _normal(2, 5, 3),
    {"kernel": Weight((), (5, 3), (2, 4), "ijr,rkl->ijkl")},
  ),
  "dense_general_of_batches": Case(
    nn.DenseGeneral(4, batch_dims=(0,)),
    _normal(2, 3, 5),
    {"kernel": Weight((2,), (5,), (4,), "nir,nro->nio")},
  ),
  "einsum": Case(
    nn.Einsum((3, 5, 4), "bi,hio->bho"),
    _normal(2, 5),
    {"kernel": Weight((), (5,), (3, 4), "ir,rho->hio")},
  ),
  "einsum_of_experts": Case(
    nn.Einsum((2, 5, 4), "bei,eio->ebo"),
    _normal(3, 2, 5),
    {"kernel": Weight((2,), (5,), (4,), "eir,ero->eio")},
  ),
  "conv": Case(
    nn.Conv(6, (3, 2), strides=2),
    _normal(1, 6, 5, 4),
    {"kernel": Weight((), (3, 2, 4), (6,), "hwir,ro->hwio")},
  ),
  "conv_transpose": Case(
    nn.ConvTranspose(6, (3,)),
    _normal(1, 5, 4),
    {"kernel": Weight((), (3, 4), (6,), "wir,ro->wio")},
  ),
  "attention": Case(
    Attention(),
    _normal(1, 3, 5),
    {
      "attention/query/kernel": PROJECTION,
      "attention/key/kernel": PROJECTION,
      "attention/value/kernel": PROJECTION,
      "attention/out/kernel": Weight((), (2, 3), (7,), "hdr,ro->hdo"),
    },
  ),
  "transposed": Case(
    Custom(lambda x, w: jnp.dot(x, jnp.asarray(w.T, x.dtype)), (7, 5)),
    _normal(2, 5),
    {
      "w": Weight((), (5,), (7,), "ir,ro->oi"),
      "dense/kernel": Weight((), (7,), (3,), "ir,ro->io"),
    },
  ),
  "square_transposed": Case(
    Custom(lambda x, w: jnp.dot(x, jnp.swapaxes(w, 0, 1))),
    _normal(2, 5),
    {
      "w": Weight((), (5,), (5,), "ir,ro->oi"),
      "dense/kernel": Weight((), (5,), (3,), "ir,ro->io"),
    },
  ),
  "transposed_twice": Case(
    Custom(
      lambda x, w: jnp.einsum(
        "bi,ihk->bhk", x, jnp.moveaxis(w, -1, 0).transpose(0, 2, 1)
      ),
      (4, 3, 5),
    ),
    _normal(2, 5),
    {
      "w": Weight((), (5,), (3, 4), "ir,rhk->khi"),
      "dense/kernel": Weight((), (4,), (3,), "ir,ro->io"),
    },
  ),
  "transposed_convolution": Case(
    Custom(_convolved_by_the_transpose, (6, 4, 3)),
    _normal(2, 5, 4),
    {
      "w": Weight((), (3, 4), (6,), "wir,ro->oiw"),
      "dense/kernel": Weight((), (6,), (3,), "ir,ro->io"),
    },
  ),
  "indexed": Case(
    Custom(lambda x, w: sum(jnp.dot(x, w[i].T) for i in (0, 2, -2)), (3, 4, 5)),
    _normal(2, 5),
    {
      "w": Weight((3,), (5,), (4,), "lir,lro->loi"),
      "dense/kernel": Weight((), (4,), (3,), "ir,ro->io"),
    },
  ),
  "indexed_in_a_loop": Case(
    Custom(
      lambda x, w: jax.lax.fori_loop(
        0, 3, lambda i, x: jnp.tanh(jnp.dot(x, jnp.astype(w[i], x.dtype))), x
      ),
      (3, 5, 5),
    ),
    _normal(2, 5),
    {
      "w": Weight((3,), (5,), (5,), "lir,lro->lio"),
      "dense/kernel": Weight((), (5,), (3,), "ir,ro->io"),
    },
  ),
  "scan": Case(
    Scanned(),
    _normal(2, 5),
    {"layers/dense/kernel": Weight((3,), (5,), (5,), "lir,lro->lio")},
  ),
}


def _random_like(tree, seed=1):
  """All leaves drawn, so that no bias and no `b` hides behind a zero."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, x.dtype), tree
  )


def _dense(variables, adapters, weights, parts):
  """`W0` plus the products of some parts, by the equations of each layer."""
  flat = traverse_util.flatten_dict(variables["params"], sep="/")
  for part in parts:
    pairs = traverse_util.flatten_dict(adapters[part], sep="/")
    assert set(pairs) == set(weights)
    for path, w in weights.items():
      a, b = (np.asarray(x, np.float64) for x in (pairs[path].a, pairs[path].b))
      rank = a.shape[-1]
      product = np.einsum(
        w.einsum,
        a.reshape(*w.batch, *w.left, rank),
        b.reshape(*w.batch, rank, *w.right),
      )
      assert product.shape == flat[path].shape
      flat[path] = np.asarray(flat[path] + SCALE * product, np.float32)
  params = traverse_util.unflatten_dict(flat, sep="/")
  return {**variables, "params": params}


@pytest.fixture(scope="module", params=CASES)
def run(request):
  model, x, weights = CASES[request.param]
  adapted = adapt(model, SPEC, x)
  variables = _random_like(jax.eval_shape(model.init, KEY, x))
  adapters = _random_like(jax.eval_shape(adapted.init, KEY, variables), seed=2)
  summed = functools.partial(_dense, variables, adapters, weights)
  return outputs(adapted, model.apply, variables, adapters, summed, x)


def test_apply_is_the_model_at_w0_plus_primary_plus_auxiliary(run):
  np.testing.assert_allclose(run.both, run.both_dense, **CLOSE)
  assert np.abs(run.both - run.primary).max() > 1e-2


def test_apply_of_the_primary_is_the_model_at_w0_plus_primary(run):
  np.testing.assert_allclose(run.primary, run.primary_dense, **CLOSE)
  assert np.abs(run.primary - run.plain).max() > 1e-2


def test_the_merged_model_is_the_model_at_w0_plus_primary(run):
  np.testing.assert_allclose(run.merged, run.primary_dense, **CLOSE)


# What is found, and how it starts.


@pytest.fixture(scope="module")
def mlp():
  model, x, _ = CASES["dense"]
  return model, x, model.init(KEY, x)


def test_new_adapters_leave_the_model_as_it_is_to_the_bit(mlp):
  model, x, variables = mlp
  adapted = adapt(model, SPEC, x)
  adapters = adapted.init(KEY, variables)
  np.testing.assert_array_equal(
    adapted.apply(variables, adapters, x), model.apply(variables, x)
  )


def test_a_starts_uniform_within_one_over_root_in_and_b_at_zero():
  model, x = nn.Dense(3), jnp.zeros((1, 400))
  spec = LoraSpec(rank=30, auxiliary_rank=20)
  adapted = adapt(model, spec, x)
  adapters = jax.jit(lambda: adapted.init(KEY, model.init(KEY, x)))()
  for part, rank in (("primary", 30), ("auxiliary", 20)):
    pair = adapters[part]["kernel"]
    assert (pair.a.shape, pair.b.shape) == ((400, rank), (rank, 3))
    assert pair.a.dtype == pair.b.dtype == jnp.float32
    assert not pair.b.any()
    # Of 8,000 draws or more: the largest is that near the bound with
    # probability 1 - 1e-35, and the deviation 1/sqrt(3) of it within 5 sigma.
    assert 0.99 < 20 * np.abs(pair.a).max() <= 1
    np.testing.assert_allclose(20 * np.std(pair.a), 3**-0.5, rtol=0.03)


def test_primary_and_auxiliary_are_drawn_by_the_key_and_differ(mlp):
  model, x, variables = mlp
  adapted = adapt(model, LoraSpec(rank=2, auxiliary_rank=2), x)
  first, again = (adapted.init(KEY, variables) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  other = adapted.init(jax.random.key(1), variables)
  for layer in "ab":
    a = first["primary"][layer]["kernel"].a
    assert (a != first["auxiliary"][layer]["kernel"].a).all()
    assert (a != other["primary"][layer]["kernel"].a).all()


def test_dropping_the_auxiliary_changes_no_byte_of_the_primary(mlp):
  model, x, variables = mlp
  adapters = adapt(model, SPEC, x).init(KEY, variables)
  kept = primary(adapters)
  assert set(kept) == {"primary"}
  before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(adapters)]
  after = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(kept)]
  # Dicts flatten by their sorted keys: the primary comes last.
  assert after == before[len(before) // 2 :]


def test_no_auxiliary_rank_is_plain_lora(mlp):
  model, x, variables = mlp
  adapted = adapt(model, LoraSpec(rank=2, auxiliary_rank=0), x)
  adapters = adapted.init(KEY, variables)
  assert set(adapters) == {"primary"}
  assert adapted.apply(variables, adapters, x).shape == (2, 3)


class Transformer(nn.Module):
  """Names as transformers have them."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(7, 4, name="embed")(tokens)
    for i in range(2):
      for name in ("query", "value", "up"):
        x = x + nn.Dense(4, name=f"layers_{i}_{name}")(x)
    return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x))


TOKENS = np.array([[1, 2, 3]])


def _targets(**kwargs):
  adapted = adapt(Transformer(), LoraSpec(**kwargs), TOKENS)
  return {path.removesuffix("/kernel") for path in adapted.targets}


def test_targets_are_regular_expressions_for_whole_paths():
  assert _targets(targets="layers_._(query|value)") == {
    "layers_0_query",
    "layers_0_value",
    "layers_1_query",
    "layers_1_value",
  }
  assert _targets(targets="layers_0.*", exclude=".*(up|value)") == {
    "layers_0_query"
  }


def test_targets_are_last_parts_of_paths():
  model, x, _ = CASES["attention"]
  spec = LoraSpec(targets=["query", "attention/out"])
  assert set(adapt(model, spec, x).targets) == {
    "attention/query/kernel",
    "attention/out/kernel",
  }
  # Whole parts: no module ends in `/ry`.
  with pytest.raises(ValueError, match="match no module"):
    adapt(model, LoraSpec(targets=["ry"]), x)


def test_of_a_mapping_the_first_pattern_that_matches_counts():
  spec = LoraSpec(
    rank=2,
    alpha=3.0,
    auxiliary_rank=1,
    targets={
      ".*query": {"rank": 4, "alpha": 8.0},
      "layers_0_.*": {"auxiliary_rank": 0},
      ".*value": {},
    },
  )
  adapted = adapt(Transformer(), spec, TOKENS)
  shapes = jax.eval_shape(
    adapted.init, KEY, jax.eval_shape(Transformer().init, KEY, TOKENS)
  )
  pairs = {k: v["kernel"] for k, v in shapes["primary"].items()}
  assert {k: (v.a.shape[-1], v.scale) for k, v in pairs.items()} == {
    "layers_0_query": (4, 2.0),
    "layers_1_query": (4, 2.0),
    "layers_0_up": (2, 1.5),
    "layers_0_value": (2, 1.5),
    "layers_1_value": (2, 1.5),
  }
  auxiliary = {k: v["kernel"].a.shape for k, v in shapes["auxiliary"].items()}
  assert auxiliary == dict.fromkeys(
    ("layers_0_query", "layers_1_query", "layers_1_value"), (4, 1)
  )


def test_unequal_ranks_and_scales_train_and_merge(mlp):
  model, x, variables = mlp
  spec = LoraSpec(
    rank=2,
    targets={"a": {"rank": 1, "alpha": 2.0, "auxiliary_rank": 0}, "b": {}},
  )
  adapted = adapt(model, spec, x)
  adapters = _random_like(adapted.init(KEY, variables))
  flat = dict(variables["params"])
  for name, scale in (("a", 2.0), ("b", 8.0)):
    pair = adapters["primary"][name]["kernel"]
    kernel = flat[name]["kernel"] + scale * (pair.a @ pair.b)
    flat[name] = {**flat[name], "kernel": kernel}
  np.testing.assert_allclose(
    adapted.apply(variables, primary(adapters), x),
    model.apply({"params": flat}, x),
    **CLOSE,
  )


def test_rslora_scales_by_the_root_of_the_rank():
  spec = LoraSpec(rank=4, alpha=3.0, rslora=True)
  assert spec.match("anything") == (4, 8, 1.5)
  assert LoraSpec(rank=4, alpha=3.0).match("anything") == (4, 8, 0.75)


# Beside adapters: parameters trained as they are, state, rngs, methods.


class Full(nn.Module):
  """Dropout, running statistics, and a second method."""

  def setup(self):
    self.body = nn.Dense(4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    self.norm = nn.BatchNorm()
    self.drop = nn.Dropout(0.5)
    self.head = nn.Dense(3)

  def encode(self, x):
    return self.body(x)

  def __call__(self, x, train=False):
    y = self.norm(self.encode(x), use_running_average=not train)
    return self.head(self.drop(y, deterministic=not train))


@pytest.fixture(scope="module")
def full():
  model, x = Full(), _normal(4, 5)
  spec = LoraSpec(rank=2, alpha=3.0, auxiliary_rank=3, extra="(head|norm)/.*")
  adapted = adapt(model, spec, x, methods=("__call__", "encode"))
  variables = _random_like(model.init(KEY, x))
  return (
    model,
    adapted,
    variables,
    _random_like(adapted.init(KEY, variables)),
    x,
  )


def test_extra_is_a_float32_copy_that_adapters_leave_alone():
  model, x = Full(), _normal(4, 5)
  variables = _random_like(model.init(KEY, x))
  variables["params"]["head"] = jax.tree.map(
    lambda leaf: leaf.astype(jnp.bfloat16), variables["params"]["head"]
  )
  adapted = adapt(model, LoraSpec(extra="(head|norm)/.*"), x)
  assert set(adapted.targets) == {"body/kernel"}
  extra = adapted.init(KEY, variables)["extra"]
  assert set(extra) == {"head", "norm"}
  for name in extra:
    for leaf, given in zip(
      *map(jax.tree.leaves, (extra, {k: variables["params"][k] for k in extra}))
    ):
      assert leaf.dtype == jnp.float32, name
      np.testing.assert_array_equal(leaf, given.astype(jnp.float32))


def test_apply_and_merge_use_extra(full):
  model, adapted, variables, adapters, x = full
  params = {**variables["params"], **adapters["extra"]}
  zero = jax.tree.map(jnp.zeros_like, adapters["primary"])
  got = adapted.apply(
    variables, {"primary": zero, "extra": adapters["extra"]}, x
  )
  np.testing.assert_allclose(
    got, model.apply({**variables, "params": params}, x), **CLOSE
  )
  merged = adapted.merge(variables, adapters)["params"]
  for name in ("head", "norm"):
    jax.tree.map(
      np.testing.assert_array_equal, merged[name], adapters["extra"][name]
    )


def test_other_collections_are_updated_and_parameters_are_not(full):
  _, adapted, variables, adapters, x = full
  rngs = {"dropout": jax.random.key(3)}
  _, changed = adapted.apply(
    variables, adapters, x, train=True, rngs=rngs, mutable=["batch_stats"]
  )
  hidden = adapted.apply(variables, adapters, x, method="encode")
  # BatchNorm's momentum is 0.99.
  np.testing.assert_allclose(
    changed["batch_stats"]["norm"]["mean"],
    0.99 * variables["batch_stats"]["norm"]["mean"]
    + 0.01 * hidden.astype(jnp.float32).mean(0),
    **CLOSE,
  )
  _, everything = adapted.apply(variables, adapters, x, mutable=True)
  assert set(everything) == {"batch_stats"}


def test_rngs_reach_the_models_own_dropout(full):
  _, adapted, variables, adapters, x = full
  run = functools.partial(
    adapted.apply, variables, adapters, x, train=True, mutable=["batch_stats"]
  )
  first, again, other = (
    run(rngs={"dropout": jax.random.key(i)})[0] for i in (3, 3, 4)
  )
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_methods_have_adapters_where_they_are_named(full):
  model, adapted, variables, adapters, x = full
  by_name = adapted.apply(variables, adapters, x, method="encode")
  by_function = adapted.apply(variables, adapters, x, method=Full.encode)
  np.testing.assert_array_equal(by_name, by_function)
  merged = adapted.merge(variables, adapters)
  np.testing.assert_allclose(
    adapted.apply(variables, primary(adapters), x, method="encode").astype(
      jnp.float32
    ),
    model.apply(merged, x, method="encode").astype(jnp.float32),
    # The layer computes in bfloat16, of 8 bits.
    rtol=2**-5,
    atol=2**-5,
  )
  with pytest.raises(ValueError, match=r"active in the methods \['__call__'\]"):
    other = adapt(model, LoraSpec(), x)
    adapters = other.init(KEY, variables)
    other.apply(variables, adapters, x, method="encode")


def test_dropout_of_adapters_is_on_only_with_a_dropout_rng(mlp):
  model, x, variables = mlp
  apart = adapt(model, LoraSpec(rank=2, alpha=3.0, auxiliary_rank=3), x)
  adapted = adapt(
    model, LoraSpec(rank=2, alpha=3.0, auxiliary_rank=3, dropout=0.5), x
  )
  adapters = _random_like(adapted.init(KEY, variables))
  off = adapted.apply(variables, adapters, x)
  np.testing.assert_array_equal(off, apart.apply(variables, adapters, x))
  run = jax.jit(
    lambda key: adapted.apply(variables, adapters, x, rngs={"dropout": key})
  )
  first, again, other = (run(jax.random.key(i)) for i in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()
  assert (first != off).any()


# Dtypes.


@pytest.mark.parametrize("layer", ["dense", "conv"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_the_output_dtype_is_the_layers_and_gradients_are_float32(
  layer, param_dtype, dtype
):
  kwargs = {"dtype": jnp.bfloat16, "param_dtype": param_dtype}
  model = nn.Dense(4, **kwargs) if layer == "dense" else nn.Conv(4, 3, **kwargs)
  x = jnp.ones((2, 5))
  variables = jax.eval_shape(model.init, KEY, x)
  adapted = adapt(model, LoraSpec(rank=2, auxiliary_rank=1, dtype=dtype), x)
  adapters = jax.eval_shape(adapted.init, KEY, variables)

  def loss(adapters, variables):
    y = adapted.apply(variables, adapters, x)
    assert y.dtype == jnp.bfloat16
    return y.astype(jnp.float32).sum()

  grads = jax.eval_shape(jax.grad(loss), adapters, variables)
  assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {
    jnp.dtype("float32")
  }


def test_adapters_compute_in_the_dtype_of_the_spec():
  model, x = nn.Dense(4, use_bias=False), _normal(2, 5)
  variables = jax.tree.map(jnp.zeros_like, model.init(KEY, x))
  outputs = {}
  for dtype in (None, "bfloat16"):
    adapted = adapt(model, LoraSpec(rank=2, dtype=dtype), x)
    adapters = _random_like(adapted.init(KEY, variables))
    outputs[dtype] = adapted.apply(variables, primary(adapters), x)
  error = np.abs(outputs["bfloat16"] - outputs[None]).max()
  # Factors of 8 bits: seen, and small.
  assert 1e-5 < error < 2**-5 * np.abs(outputs[None]).max()


def test_merge_sums_in_float32_and_casts_once():
  model, x = nn.Dense(64, param_dtype=jnp.bfloat16), jnp.ones((1, 32))
  variables = jax.jit(model.init)(KEY, x)
  adapted = adapt(model, LoraSpec(rank=2, alpha=2.0), x)
  rng = np.random.default_rng(0)
  # Multiples of 2**-6 below 2: the product of two is exact in float32, and has
  # more bits than bfloat16.
  adapters = jax.tree.map(
    lambda leaf: jnp.asarray(
      rng.integers(-99, 99, leaf.shape) / 64, leaf.dtype
    ),
    adapted.init(KEY, variables),
  )
  pair = adapters["primary"]["kernel"]
  kernel = variables["params"]["kernel"]
  product = np.asarray(pair.a) @ np.asarray(pair.b)
  once = (kernel.astype(np.float32) + product).astype(jnp.bfloat16)
  merged = adapted.merge(variables, adapters)["params"]["kernel"]
  assert merged.dtype == jnp.bfloat16
  np.testing.assert_array_equal(merged, once)
  twice = kernel + product.astype(jnp.bfloat16)
  assert (once != twice).any()


# Boxes and shardings.


class Sharded(nn.Module):
  """Kernels with names of axes, one stacked by `nn.scan`."""

  box: Callable[..., Any] = nn.with_partitioning

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.normal()
    x = nn.DenseGeneral(
      (2, 5), kernel_init=self.box(init, ("embed", "heads", "kv")), name="in"
    )(x)
    x = nn.DenseGeneral(
      5,
      axis=(-2, -1),
      kernel_init=self.box(init, ("heads", "kv", "embed")),
      name="out",
    )(x)

    class Layer(nn.Module):
      """Of the scan."""

      box: Callable[..., Any]

      @nn.compact
      def __call__(self, x, _):
        kernel = self.box(init, ("embed", "mlp"))
        return nn.Dense(5, kernel_init=kernel, name="dense")(x), None

    scan = nn.scan(
      Layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=3,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    x = scan(self.box, name="layers")(x, None)[0]
    return nn.Dense(7, name="head")(x)


@pytest.fixture(
  scope="module", params=["with_partitioning", "with_logical_partitioning"]
)
def sharded(request):
  model, x = Sharded(getattr(nn, request.param)), _normal(2, 5)
  adapted = adapt(model, LoraSpec(rank=2, extra="head/.*"), x)
  variables = jax.jit(model.init)(KEY, x)
  return model, adapted, variables, jax.jit(adapted.init)(KEY, variables), x


def test_partition_specs_follow_the_kernels_and_never_split_the_rank(sharded):
  _, adapted, variables, adapters, _ = sharded
  specs = adapted.partition_specs(variables, adapters)
  spec = jax.sharding.PartitionSpec
  for part in ("primary", "auxiliary"):
    got = {
      path[0]: (pair.a, pair.b)
      for path, pair in traverse_util.flatten_dict(specs[part]).items()
    }
    assert got == {
      "in": (spec("embed", None), spec(None, "heads")),
      "out": (spec("heads", None), spec(None, "embed")),
      "layers": (spec("layers", "embed", None), spec("layers", None, "mlp")),
    }
  assert specs["extra"]["head"]["kernel"] == spec()
  assert jax.tree.structure(
    specs, is_leaf=lambda x: isinstance(x, spec)
  ) == jax.tree.structure(adapters)


def test_boxed_variables_work_and_merge_keeps_the_boxes(sharded):
  model, adapted, variables, adapters, x = sharded
  adapters = _random_like(adapters)
  merged = jax.jit(adapted.merge)(variables, adapters)
  assert jax.tree.structure(merged) == jax.tree.structure(variables)
  boxes = [
    leaf
    for leaf in jax.tree.leaves(
      merged, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )
    if isinstance(leaf, nn.Partitioned)
  ]
  assert len(boxes) == 3

  @jax.jit
  def outputs(variables, merged, adapters):
    adapters = primary(adapters)
    return (
      model.apply(merged, x),
      adapted.apply(variables, adapters, x),
      adapted.apply(nn.unbox(variables), adapters, x),
    )

  wanted, boxed, unboxed = outputs(variables, merged, adapters)
  np.testing.assert_allclose(boxed, wanted, **CLOSE)
  np.testing.assert_allclose(unboxed, wanted, **CLOSE)


# The cost of a step.


class Small(nn.Module):
  """All sizes differ, and the first layer hides nothing of the others."""

  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(13, name="in")(x))
    x = nn.MultiHeadDotProductAttention(
      num_heads=2, qkv_features=38, out_features=17, name="attention"
    )(x)
    return nn.Dense(29, name="out")(nn.tanh(x))


def _products(jaxpr):
  """Shapes of operands and results of each `dot_general`, inner ones too."""
  found = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      found.append(tuple(v.aval.shape for v in (*eqn.invars, *eqn.outvars)))
    for inner in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        found += _products(inner)
  return found


def _step_products(spec, tx):
  model, x = Small(), jax.ShapeDtypeStruct((6, 23, 11), jnp.float32)
  adapted = adapt(model, spec, x)
  variables = jax.eval_shape(model.init, KEY, x)
  adapters = jax.eval_shape(adapted.init, KEY, variables)
  state = jax.eval_shape(tx.init, adapters)

  def step(variables, adapters, state, x):
    def loss(adapters):
      return jnp.sum(adapted.apply(variables, adapters, x) ** 2)

    value, grads = jax.value_and_grad(loss)(adapters)
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, value

  jaxpr = jax.make_jaxpr(step)(variables, adapters, state, x)
  return list(adapted.targets.values()), _products(jaxpr.jaxpr)


def test_a_step_has_the_products_of_one_plain_lora_step_and_small_grams():
  optimizer = optax.adam(1e-3)
  kernels, ours = _step_products(
    LoraSpec(rank=3, auxiliary_rank=4), bilora(optimizer)
  )
  _, plain = _step_products(LoraSpec(rank=7, auxiliary_rank=0), optimizer)
  grams = [shapes for shapes in ours if shapes[-1][-2:] == (4, 4)]
  # Two of the auxiliary of each of the six layers; those alike are one product.
  assert sum(math.prod(shapes[-1][:-2]) for shapes in grams) == 12
  rest = collections.Counter(ours) - collections.Counter(grams)
  assert rest == collections.Counter(plain)

  with_base = [
    shapes for shapes in ours if any(kernel in shapes for kernel in kernels)
  ]
  # Forward and backward, but for the first layer, whose input is no variable.
  assert len(kernels) == 6
  assert len(with_base) == 2 * 6 - 1
  # Each adapter: two thin products forward and four backward, of which the
  # first layer lacks the one for its input. The sizes 3 and 4 are nowhere.
  thin = [shapes for shapes in ours if any(7 in s for s in shapes)]
  assert len(thin) == 6 * 6 - 1
  assert not [s for s in set(rest) if any({3, 4} & set(t) for t in s)]


def test_no_product_of_a_step_has_the_size_of_a_weight():
  kernels, ours = _step_products(
    LoraSpec(rank=3, auxiliary_rank=4), bilora(optax.adam(1e-3))
  )
  sizes = {tuple(sorted(kernel)) for kernel in kernels}
  flat = {tuple(sorted((13, 38))), tuple(sorted((38, 17)))}
  results = {tuple(sorted(shapes[-1])) for shapes in ours}
  assert not results & (sizes | flat)


# What is not adapted, and says so or is left alone.


def _error(model, x, spec=SPEC, **kwargs):
  with pytest.raises(ValueError) as caught:
    adapt(model, spec, x, **kwargs)
  return str(caught.value)


# Named, not the default targets: these leave out what cannot be adapted.
ALL = LoraSpec(targets="|.+")


def test_a_weight_that_is_scaled_before_use_is_refused_by_name():
  model = Custom(lambda x, w: jnp.dot(x, 2 * w))
  message = _error(model, jnp.ones((2, 5)), ALL)
  assert message.startswith("the weight w cannot be adapted: ")
  assert "LoraSpec(exclude=...)" in message


def test_a_use_that_was_not_seen_is_refused_by_name():
  def multiply(x, w):
    assert jax.typeof(w).shape == (5, 5)  # not in the traced program
    return jnp.dot(x, w)

  model, x = Custom(multiply), jnp.ones((2, 5))
  adapted, variables = adapt(model, SPEC, x), model.init(KEY, x)
  with pytest.raises(ValueError, match=r"the adapted weight w, here of shape"):
    adapted.apply(variables, adapted.init(KEY, variables), x)


def test_a_reversed_convolution_kernel_is_refused_by_name():
  model = nn.ConvTranspose(6, (3,), transpose_kernel=True)
  assert "the weight kernel cannot" in _error(model, jnp.ones((1, 5, 4)), ALL)


@pytest.mark.parametrize("axis", [1, -1])
def test_a_scan_along_another_axis_is_refused_by_name(axis):
  message = _error(Scanned(axis), jnp.ones((2, 5)), ALL)
  assert "the weight layers/dense/kernel cannot be adapted" in message
  assert "scanned along another axis than the first" in message


def test_a_weight_that_is_left_out_need_not_be_adaptable():
  model = Custom(jnp.dot, name_of_weight="v")
  spec = LoraSpec(targets="dense", exclude="")
  assert set(adapt(model, spec, jnp.ones((2, 5))).targets) == {"dense/kernel"}


def test_the_default_targets_skip_what_cannot_be_adapted_with_a_warning():
  model = Custom(lambda x, w: jnp.dot(x, 2 * w))
  x = jnp.ones((2, 5))
  with pytest.warns(UserWarning, match="adapt leaves out w: it is resh") as w:
    adapted = adapt(model, SPEC, x)
  assert len(w) == 1
  assert set(adapted.targets) == {"dense/kernel"}
  assert set(adapted.skipped) == {"w"}
  assert "scaled" in adapted.skipped["w"]
  assert not adapt(model, LoraSpec(targets="dense"), x).skipped


@pytest.mark.parametrize(
  ("multiply", "reason"),
  [
    (lambda x, w: jnp.dot(x, w) + jnp.sum(w), "but also in reduce_sum"),
    (lambda x, w: jnp.einsum("bi,oi->bo", jnp.dot(x, w), w), "in their axes"),
  ],
)
def test_a_weight_of_two_uses_is_refused_with_the_reason(multiply, reason):
  assert reason in _error(Custom(multiply), jnp.ones((2, 5)), ALL)


def test_of_two_weights_in_a_module_one_is_adapted_and_one_trained_whole():
  class Two(nn.Module):
    """Two weights in one module."""

    @nn.compact
    def __call__(self, x):
      v = self.param("v", nn.initializers.normal(), (5, 4))
      w = self.param("w", nn.initializers.normal(), (4, 3))
      return jnp.dot(jnp.dot(x, v), w)

  model, x = Two(), _normal(2, 5)
  adapted = adapt(model, LoraSpec(rank=2, extra="w"), x)
  assert set(adapted.targets) == {"v"}
  variables = model.init(KEY, x)
  adapters = _random_like(adapted.init(KEY, variables))
  np.testing.assert_allclose(
    adapted.apply(variables, primary(adapters), x),
    model.apply(adapted.merge(variables, adapters), x),
    **CLOSE,
  )


class NestedHead(nn.Module):
  """A head that is applied to a table from elsewhere, as Hugging Face's."""

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(7, 5, name="embed")
    x = nn.Dense(5, name="dense")(embed(tokens))
    table = embed.variables["params"]["embedding"]
    head = nn.Dense(7, use_bias=False, name="head")
    return head.apply({"params": {"kernel": table.T}}, x)


def test_a_model_with_a_nested_apply_is_adapted():
  model = NestedHead()
  adapted = adapt(model, SPEC, TOKENS)
  assert set(adapted.targets) == {"dense/kernel"}
  variables = model.init(KEY, TOKENS)
  adapters = _random_like(adapted.init(KEY, variables))
  np.testing.assert_allclose(
    adapted.apply(variables, primary(adapters), TOKENS),
    model.apply(adapted.merge(variables, adapters), TOKENS),
    **CLOSE,
  )


def test_a_model_with_an_init_of_its_own_keeps_what_it_sets():
  # The models of diffusers keep a configuration so, by a decorator.
  class Configured(nn.Module):
    width: int = 3

    @nn.compact
    def __call__(self, x):
      return nn.Dense(self.config["width"], name="dense")(x)

  of_fields = Configured.__init__

  def init(self, *args, **kwargs):
    of_fields(self, *args, **kwargs)
    object.__setattr__(self, "config", {"width": self.width})

  Configured.__init__ = init
  model, x = Configured(), _normal(2, 4)
  variables = model.init(KEY, x)
  adapted = adapt(model, SPEC, x)
  assert list(adapted.targets) == ["dense/kernel"]
  np.testing.assert_array_equal(
    adapted.apply(variables, adapted.init(KEY, variables), x),
    model.apply(variables, x),
  )


def test_partitioned_kernels_are_adapted_under_a_set_mesh():
  devices.require(2)
  model = nn.Dense(
    4, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("x", None))
  )
  mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  x = _normal(2, 8)
  with jax.set_mesh(mesh):
    variables = model.init(KEY, x)
    adapted = adapt(model, SPEC, x)
    adapters = _random_like(adapted.init(KEY, variables))
    np.testing.assert_allclose(
      adapted.apply(variables, primary(adapters), x),
      model.apply(adapted.merge(variables, adapters), x),
      **CLOSE,
    )


def test_the_model_is_traced_twice_however_many_targets_there_are():
  calls = []

  class Counted(nn.Module):
    """Counts its calls."""

    @nn.compact
    def __call__(self, x):
      calls.append(x)
      for _ in range(4):
        x = nn.Dense(5)(x)
      return x

  adapted = adapt(Counted(), SPEC, jnp.ones((2, 5)))
  assert len(adapted.targets) == 4
  assert len(calls) == 2  # for the shapes of its parameters, and for their uses


def test_a_cast_and_a_sharding_constraint_leave_a_weight_adaptable():
  def multiply(x, w):
    mesh = jax.sharding.Mesh(jax.devices()[:1], "x")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    w = jax.lax.with_sharding_constraint(jnp.asarray(w, jnp.bfloat16), sharding)
    return jnp.dot(x, w.astype(jnp.float32))

  model, x = Custom(multiply), _normal(2, 5)
  adapted = adapt(model, SPEC, x)
  assert set(adapted.targets) == {"w", "dense/kernel"}
  variables = model.init(KEY, x)
  adapters = _random_like(adapted.init(KEY, variables))
  rounded = variables["params"]["w"].astype(jnp.bfloat16)
  merged = adapted.merge(variables, adapters)["params"]
  weight = rounded + adapters["primary"]["w"].weight()
  np.testing.assert_allclose(
    adapted.apply(variables, primary(adapters), x),
    x @ weight @ merged["dense"]["kernel"] + merged["dense"]["bias"],
    **CLOSE,
  )


def test_another_method_that_uses_a_weight_otherwise_is_refused():
  class Both(nn.Module):
    """Multiplies by a kernel, and in another method by its transpose."""

    def setup(self):
      self.w = self.param("w", nn.initializers.normal(), (5, 5))

    def __call__(self, x):
      return jnp.dot(x, self.w)

    def back(self, x):
      return jnp.einsum("bi,oi->bo", x, self.w)

  model, x = Both(), _normal(2, 5)
  adapted = adapt(model, SPEC, x, methods=("__call__", "back"))
  variables = model.init(KEY, x)
  adapters = adapted.init(KEY, variables)
  with pytest.raises(ValueError, match=r"contracts the axes .* weight w, but"):
    adapted.apply(variables, adapters, x, method="back")


def test_dropout_of_adapters_differs_between_scanned_layers():
  model, x, _ = CASES["scan"]
  variables = jax.tree.map(jnp.zeros_like, model.init(KEY, x))
  spec = LoraSpec(rank=5, alpha=5.0, auxiliary_rank=0, dropout=0.5)
  adapted = adapt(model, spec, x)
  # Each layer is then tanh(dropped x), and a zero stays.
  eye = jnp.broadcast_to(jnp.eye(5), (3, 5, 5))
  adapters = jax.tree.map(lambda _: eye, adapted.init(KEY, variables))
  x = jnp.ones((200, 5))
  y = adapted.apply(variables, adapters, x, rngs={"dropout": KEY})
  # One mask for all three layers would keep a half; 1000 draws, 5 sigma.
  np.testing.assert_allclose(np.mean(y != 0), 0.125, atol=0.053)


NOT_ADAPTED = {
  "an n-ary einsum": lambda x, w: jnp.einsum("bi,ij,jk->bk", x, w, w),
  "a weight on the left": lambda x, w: jnp.einsum("oi,bi->bo", w, x),
  "a jitted product": lambda x, w: x @ w,
  "a jitted helper": lambda x, w: jax.jit(jnp.dot)(x, w),
  "a grouped convolution": lambda x, w: jax.lax.conv_general_dilated(
    x[None],
    w.reshape(1, 5, 5)[:, :1],
    (1,),
    "SAME",
    dimension_numbers=("NWC", "WIO", "NWC"),
    feature_group_count=5,
  )[0],
}


@pytest.mark.parametrize("what", NOT_ADAPTED)
def test_is_left_alone_and_the_rest_adapted(what):
  model, x = Custom(NOT_ADAPTED[what]), _normal(2, 5)
  for _ in range(2):  # whatever JAX remembers of earlier traces
    adapted = adapt(model, SPEC, x)
    assert set(adapted.targets) == {"dense/kernel"}
  variables = model.init(KEY, x)
  adapters = _random_like(adapted.init(KEY, variables))
  np.testing.assert_allclose(
    jax.jit(adapted.apply)(variables, primary(adapters), x),
    model.apply(adapted.merge(variables, adapters), x),
    **CLOSE,
  )


def test_a_users_file_is_not_taken_for_jaxs(tmp_path):
  # JAX's own jitted functions are those of its file pjit.py.
  path = tmp_path / "model_pjit.py"
  path.write_text(
    "import jax.numpy as jnp\n\ndef product(x, w):\n  return jnp.dot(x, w)\n"
  )
  names = runpy.run_path(str(path))
  adapted = adapt(Custom(names["product"]), SPEC, jnp.ones((2, 5)))
  assert set(adapted.targets) == {"w", "dense/kernel"}


def test_an_adapted_models_repr_is_one_line(mlp):
  model, x, _ = mlp
  assert repr(adapt(model, SPEC, x)) == (
    "Adapted(2 weights: 'a/kernel', 'b/kernel'; rank=2, auxiliary_rank=3)"
  )
  assert repr(adapt(Transformer(), SPEC, TOKENS)) == (
    "Adapted(7 weights: 'head/kernel', 'layers_0_query/kernel', ...; rank=2, "
    "auxiliary_rank=3)"
  )


def test_adapting_leaves_no_trace_in_products_of_the_same_shape():
  x, w = _normal(3, 19), _normal(19, 19)
  model = Custom(lambda x, w: x @ w, (19, 19))
  adapted = adapt(model, SPEC, x)
  variables = model.init(KEY, x)
  adapters = _random_like(adapted.init(KEY, variables))
  adapted.apply(variables, adapters, x)
  np.testing.assert_allclose(x @ w, np.asarray(x) @ np.asarray(w), **CLOSE)


def test_a_tied_embedding_is_not_adapted():
  class Tied(nn.Module):
    """Looks up and multiplies by one table."""

    @nn.compact
    def __call__(self, tokens):
      embed = nn.Embed(7, 5, name="embed")
      return embed.attend(nn.Dense(5, name="dense")(embed(tokens)))

  assert set(adapt(Tied(), SPEC, TOKENS).targets) == {"dense/kernel"}
  message = _error(Tied(), TOKENS, LoraSpec(targets="embed"))
  assert message == (
    "targets='embed' match no module; these could be adapted: 'dense'."
  )


# Errors.


def test_a_target_or_extra_that_matches_nothing_lists_what_could(mlp):
  model, x, _ = mlp
  assert _error(model, x, LoraSpec(targets="q_proj")) == (
    "targets='q_proj' match no module; these could be adapted: 'a', 'b'."
  )
  assert _error(model, x, LoraSpec(extra="head")) == (
    "extra='head' matches no parameter; there are 'a/bias', 'a/kernel', "
    "'b/bias', 'b/kernel'."
  )
  model = nn.LayerNorm()
  assert "could be adapted: none." in _error(model, x)


def test_a_model_or_spec_of_another_kind_is_refused(mlp):
  model, x, _ = mlp
  assert _error(model.apply, x) == (
    "model is a flax.linen.Module or a flax.nnx.Module; got method."
  )
  assert "got type" in _error(Dense2, x)
  assert _error(model, x, {"rank": 2}) == "spec is a LoraSpec; got dict."


def test_variables_of_another_model_are_refused_by_name(mlp):
  model, x, variables = mlp
  adapted = adapt(model, SPEC, x)
  adapters = adapted.init(KEY, variables)
  wrong = jax.tree.map(lambda leaf: leaf[..., :2], variables)
  for call in (
    lambda v: adapted.init(KEY, v),
    lambda v: adapted.apply(v, adapters, x),
    lambda v: adapted.merge(v, adapters),
  ):
    with pytest.raises(ValueError, match="not those of the adapted") as caught:
      call(wrong)
    assert "a/kernel: (5, 2), expected (5, 4)" in str(caught.value)
    with pytest.raises(ValueError, match="b/bias: None, expected"):
      call({})


def test_adapters_of_another_shape_are_refused_by_name(mlp):
  model, x, variables = mlp
  adapted = adapt(model, SPEC, x)
  adapters = adapted.init(KEY, variables)
  other = adapt(model, LoraSpec(rank=4, alpha=6.0, auxiliary_rank=3), x)
  a = other.init(KEY, variables)
  for call in (adapted.apply, adapted.merge):
    args = (x,) if call == adapted.apply else ()
    with pytest.raises(ValueError, match="do not fit the model") as caught:
      call(variables, a, *args)
    assert "primary/a/kernel: ((5, 4), (4, 4), 1.5), expected ((5, 2)" in str(
      caught.value
    )
    lost = {**adapters, "primary": {"a": adapters["primary"]["a"]}}
    with pytest.raises(ValueError, match="primary/b/kernel: missing"):
      call(variables, lost, *args)
  more = {
    **adapters,
    "auxiliary": {**adapters["auxiliary"], "c": {"kernel": 1}},
  }
  with pytest.raises(ValueError, match="auxiliary/c/kernel: 1, expected noth"):
    adapted.check(more)
  with pytest.raises(ValueError, match=r"got \['main'\]"):
    adapted.check({"main": {}})


def test_a_quantised_base_is_refused_by_name():
  x = jnp.ones((2, 8))
  quantised = qwix.quantize_model(
    nn.Dense(4),
    qwix.PtqProvider([qwix.QuantizationRule(weight_qtype=jnp.int8)]),
  )
  variables = quantised.init(jax.random.key(0), x)
  adapted = adapt(quantised, LoraSpec(), x)
  with pytest.raises(
    ValueError,
    match=r"base_dtype=None, .* kernel: WithAux, expected floats",
  ):
    adapted.init(jax.random.key(1), variables)


def test_weights_of_numpy_are_adapted_too():
  x = _normal(2, 4)
  adapted = adapt(Dense2(), SPEC, x)
  variables = Dense2().init(KEY, x)
  adapters = jax.tree.map(jnp.ones_like, adapted.init(KEY, variables))
  np.testing.assert_allclose(
    adapted.apply(jax.tree.map(np.asarray, variables), adapters, x),
    adapted.apply(variables, adapters, x),
    **CLOSE,
  )
