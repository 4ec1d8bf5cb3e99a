"""Quantised bases: NumPy's own NF4, int8 and fp8, and products with them."""

import dataclasses
import json
from typing import Any, NamedTuple

import devices
from flax import linen as nn
from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import qwix

from bilora_jax import (
  LoraSpec,
  adapt,
  bilora,
  load_adapters,
  load_spec,
  primary,
  save_adapters,
)

KEY = jax.random.key(0)
SPEC = LoraSpec(rank=2, alpha=3.0, auxiliary_rank=3, exclude="head")
SCALE = 1.5
BASE_DTYPES = ("nf4", "int8", "fp8")
P = jax.sharding.PartitionSpec
# Dettmers et al., arXiv 2305.14314, Appendix E.
NF4 = np.array(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ]
)


class Layer(nn.Module):
  """One layer of `Net`'s scan."""

  @nn.compact
  def __call__(self, x, _):
    return nn.tanh(nn.Dense(64, name="dense")(x)), None


class Net(nn.Module):
  """Every kind of layer that has adapters, and a head that has none."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(100, name="a")(x)
    x = nn.DenseGeneral((2, 4), name="split")(nn.LayerNorm(name="norm")(x))
    x = nn.DenseGeneral(64, axis=(-2, -1), name="merge")(x)
    scan = nn.scan(
      nn.remat(Layer),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=3,
    )
    x = scan(name="layers")(x, None)[0]
    x = nn.Conv(6, (3,), name="conv")(x)
    x = nn.Einsum((2, 6, 5), "bti,hio->btho", name="einsum")(x)
    return nn.Dense(3, name="head")(x)


class Kernel(NamedTuple):
  """Tiles of 64 of a kernel, and how its layer multiplies."""

  tiles: tuple[int, ...]
  left: tuple[int, ...]
  right: tuple[int, ...]
  einsum: str


KERNELS = {
  "a/kernel": Kernel((64, 1), (128,), (100,), "ir,ro->io"),
  # 64 does not divide 100, and 50 does.
  "split/kernel": Kernel((50, 1, 1), (100,), (2, 4), "ir,rhd->ihd"),
  "merge/kernel": Kernel((2, 4, 1), (2, 4), (64,), "hdr,ro->hdo"),
  "layers/dense/kernel": Kernel((1, 64, 1), (64,), (64,), "lir,lro->lio"),
  "conv/kernel": Kernel((1, 64, 1), (3, 64), (6,), "wir,ro->wio"),
  "einsum/kernel": Kernel((1, 6, 1), (6,), (2, 5), "ir,rho->hio"),
}
X = np.random.default_rng(0).normal(size=(2, 3, 128)).astype(np.float32)


def _random_like(tree, seed=1):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype), tree
  )


def _flat(variables):
  return traverse_util.flatten_dict(variables["params"], sep="/")


def _with(variables, kernels):
  flat = {**_flat(variables), **kernels}
  return {**variables, "params": traverse_util.unflatten_dict(flat, sep="/")}


def _rounded(kernel, base_dtype, tiles):
  """What a kernel is after quantisation, by the definition, in float64."""
  kernel = np.asarray(kernel, np.float64)
  cut = sum(((n // t, t) for n, t in zip(kernel.shape, tiles)), ())
  blocks = kernel.reshape(cut)
  largest = np.abs(blocks).max(tuple(range(1, len(cut), 2)), keepdims=True)
  x = blocks / largest
  if base_dtype == "nf4":
    x = NF4[np.abs(x[..., None] - NF4).argmin(-1)]
  elif base_dtype == "int8":
    x = np.round(x * 127) / 127
  else:
    x = (x * 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) / 448
  return (x * largest).reshape(kernel.shape)


def _dense(variables, adapters, parts=("primary", "auxiliary")):
  """The model's variables at `W0 + scale * a @ b`, by JAX, differentiable."""
  new = {}
  for path, (_, left, right, einsum) in KERNELS.items():
    kernel = _flat(variables)[path]
    for part in parts:
      pair = traverse_util.flatten_dict(adapters[part], sep="/")[path]
      batch, rank = pair.a.shape[:-2], pair.a.shape[-1]
      kernel += SCALE * jnp.einsum(
        einsum,
        pair.a.reshape(*batch, *left, rank),
        pair.b.reshape(*batch, rank, *right),
      )
    new[path] = kernel
  return _with(variables, new)


def _loss(output):
  return jnp.mean(jnp.sin(output))


class Run(NamedTuple):
  """A quantised model, and what it gives beside the dense one."""

  adapted: Any
  variables: Any
  quantised: Any
  rounded: Any
  adapters: Any
  got: Any
  wanted: Any


# fp8 differs from int8 in its rounding alone.
@pytest.fixture(scope="module", params=["nf4", "int8"])
def run(request):
  spec = dataclasses.replace(SPEC, base_dtype=request.param)
  model, adapted = Net(), adapt(Net(), spec, X)
  variables = _random_like(jax.eval_shape(model.init, KEY, X))
  quantised = jax.jit(adapted.quantize)(variables)
  rounded = _with(
    variables,
    {
      path: _rounded(_flat(variables)[path], request.param, kernel.tiles)
      for path, kernel in KERNELS.items()
    },
  )
  rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), rounded)
  shapes = jax.eval_shape(adapted.init, KEY, quantised)
  adapters = _random_like(shapes, seed=2)

  @jax.jit
  def both(quantised, rounded, adapters):
    def loss(adapters):
      output = adapted.apply(quantised, adapters, X)
      return _loss(output), output

    def dense_loss(adapters):
      output = model.apply(_dense(rounded, adapters), X)
      return _loss(output), output

    kept = primary(adapters)
    return (
      (
        jax.value_and_grad(loss, has_aux=True)(adapters),
        adapted.apply(quantised, kept, X),
        model.apply(adapted.merge(quantised, adapters), X),
      ),
      (
        jax.value_and_grad(dense_loss, has_aux=True)(adapters),
        model.apply(_dense(rounded, adapters, ("primary",)), X),
      ),
    )

  got, wanted = both(quantised, rounded, adapters)
  return Run(adapted, variables, quantised, rounded, adapters, got, wanted)


# What the kernels become.


def test_kernels_are_rounded_as_the_definitions_say(run):
  flat = _flat(run.quantised)
  for path, (tiles, *_) in KERNELS.items():
    array = flat[path]
    assert isinstance(array, qwix.QArray)
    assert array.scale_tile_shape == tiles
    assert array.scale.dtype == jnp.float32
    rounded = _flat(run.rounded)[path]
    np.testing.assert_allclose(
      qwix.dequantize(array),
      rounded,
      # Of one product in float32 each.
      rtol=1e-6,
      err_msg=path,
    )
    # Steps are 1/8 of the largest of a tile in nf4, fewer in the others.
    off = np.abs(rounded - _flat(run.variables)[path]).max()
    assert 0 < off < 0.16 * np.abs(rounded).max()


def test_fp8_is_the_tile_over_its_largest_times_448_rounded_to_e4m3():
  adapted = adapt(nn.Dense(24), LoraSpec(base_dtype="fp8"), jnp.ones((1, 128)))
  kernel = _random_like(jnp.zeros((128, 24)))
  array = adapted.quantize_leaf("kernel", kernel)
  assert array.qvalue.dtype == jnp.float8_e4m3fn
  np.testing.assert_allclose(
    qwix.dequantize(array), _rounded(kernel, "fp8", (64, 1)), rtol=1e-6
  )
  largest = np.abs(np.asarray(array.qvalue, np.float32)).max(0)
  np.testing.assert_array_equal(largest, 448)


def test_all_else_stays_as_it_is_to_the_bit(run):
  before, after = _flat(run.variables), _flat(run.quantised)
  assert set(after) - set(KERNELS) >= {"head/kernel", "norm/scale", "a/bias"}
  for path in set(after) - set(KERNELS):
    np.testing.assert_array_equal(after[path], before[path])


def test_the_zero_tile_stays_zero(run):
  array = run.adapted.quantize_leaf("a/kernel", jnp.zeros((128, 100)))
  assert not qwix.dequantize(array).any()


@pytest.mark.parametrize("base_dtype", BASE_DTYPES)
def test_codes_take_the_bytes_that_their_name_says(base_dtype):
  spec = LoraSpec(base_dtype=base_dtype)
  adapted = adapt(nn.Dense(96), spec, jnp.zeros((1, 256)))
  kernel = jax.ShapeDtypeStruct((256, 96), jnp.bfloat16)

  def quantise(kernel):
    return adapted.quantize_leaf("kernel", kernel)

  # What XLA sets aside, to which 4 bits are half a byte; `nbytes` of an array
  # of them on a CPU counts whole bytes. Behind it, pointers to three buffers.
  memory = jax.jit(quantise).lower(kernel).compile().memory_analysis()
  codes = 256 * 96 // (2 if base_dtype == "nf4" else 1)
  scales = 4 * 256 * 96 // 64
  assert 0 <= memory.output_size_in_bytes - codes - scales <= 32
  # No more than the kernel in float32, and none of Qwix's 8 bytes a weight.
  assert memory.temp_size_in_bytes <= 4 * 256 * 96 + 4096


def test_tiles_are_the_largest_that_fit():
  def form(shape, axis, tile_size):
    model = nn.DenseGeneral(3, axis=axis)
    spec = LoraSpec(base_dtype="int8", tile_size=tile_size)
    x = jnp.zeros((1, *shape))
    shapes = jax.eval_shape(model.init, KEY, x)
    new = jax.eval_shape(adapt(model, spec, x).quantize, shapes)
    return new["params"]["kernel"].scale_tile_shape[:-1]

  assert form((128,), -1, 32) == (32,)
  assert form((96,), -1, 64) == (48,)
  # A prime: by one, or all.
  assert form((101,), -1, 64) == (101,)
  assert form((128,), -1, None) == (128,)
  assert form((4, 32), (-2, -1), 64) == (2, 32)
  assert form((4, 128), (-2, -1), 64) == (1, 64)


# What the model gives.


def test_outputs_are_those_of_the_rounded_kernels_plus_the_products(run):
  ((_, both), _), one, merged = run.got
  ((_, both_dense), _), one_dense = run.wanted
  # Sums of some hundred float32 products of order 1, in another order.
  close = {"rtol": 1e-4, "atol": 1e-5}
  np.testing.assert_allclose(both, both_dense, **close)
  np.testing.assert_allclose(one, one_dense, **close)
  np.testing.assert_allclose(merged, one_dense, **close)
  assert np.abs(both - one).max() > 1e-2


def test_gradients_are_those_of_the_dense_model_and_only_of_adapters(run):
  (_, got), (_, wanted) = run.got[0], run.wanted[0]
  assert jax.tree.structure(got) == jax.tree.structure(run.adapters)
  for x, y in zip(*map(jax.tree.leaves, (got, wanted))):
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())
    assert np.abs(y).max() > 0


def test_merged_kernels_are_floats_in_the_models_own_dtype():
  model = nn.Dense(4, param_dtype=jnp.bfloat16)
  x = jnp.ones((1, 8))
  adapted = adapt(model, LoraSpec(rank=1, base_dtype="int8"), x)
  # Loaded in another dtype than the model's.
  variables = {"params": {"kernel": _random_like(jnp.zeros((8, 4)))}}
  variables["params"]["bias"] = jnp.zeros(4)
  quantised = adapted.quantize(variables)
  adapters = _random_like(adapted.init(KEY, quantised))
  merged = jax.jit(adapted.merge)(quantised, adapters)["params"]
  assert (merged["kernel"].dtype, merged["bias"].dtype) == (
    jnp.bfloat16,
    jnp.float32,
  )
  pair = adapters["primary"]["kernel"]
  kernel = qwix.dequantize(quantised["params"]["kernel"])
  wanted = kernel + 16 * np.asarray(pair.a) @ np.asarray(pair.b)
  np.testing.assert_array_equal(merged["kernel"], wanted.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
def test_layers_compute_in_the_dtype_that_they_compute_in_without(dtype):
  model = nn.Dense(4, dtype=dtype, use_bias=False)
  x = _random_like(jnp.zeros((3, 8), jnp.bfloat16))
  adapted = adapt(model, LoraSpec(rank=1, base_dtype="int8"), x)
  variables = _random_like(jax.eval_shape(model.init, KEY, x))
  quantised = adapted.quantize(variables)
  adapters = adapted.init(KEY, quantised)
  rounded = qwix.dequantize(quantised["params"]["kernel"])
  got = adapted.apply(quantised, adapters, x)
  wanted = model.apply({"params": {"kernel": rounded}}, x)
  assert got.dtype == wanted.dtype
  np.testing.assert_array_equal(got, wanted)


# What is kept and computed in training.


def _kept_for_the_backward_pass(spec):
  """Floats of a kernel's size that a forward pass leaves behind."""
  adapted = adapt(Net(), spec, X)
  variables = jax.eval_shape(Net().init, KEY, X)
  if spec.base_dtype:
    variables = jax.eval_shape(adapted.quantize, variables)
  adapters = jax.eval_shape(adapted.init, KEY, variables)

  def forward(variables, adapters):
    return jax.vjp(lambda a: adapted.apply(variables, a, X), adapters)[1]

  kept = jax.tree.leaves(jax.eval_shape(forward, variables, adapters))
  kernels = {adapted.targets[path] for path in KERNELS}
  return {
    x.shape for x in kept if x.shape in kernels and x.dtype.itemsize > 1
  } | {x.shape for x in kept if x.dtype.itemsize > 1 and x.size > 128 * 100}


def test_no_float_kernel_is_kept_for_the_backward_pass():
  # That of `a` is not needed: no gradient goes to the input.
  assert len(_kept_for_the_backward_pass(SPEC)) >= len(KERNELS) - 1
  spec = dataclasses.replace(SPEC, base_dtype="nf4")
  assert not _kept_for_the_backward_pass(spec)


def test_no_gradient_of_a_kernels_shape_is_computed():
  def products(base_dtype, train_the_base):
    model = nn.Sequential([nn.Dense(37), nn.tanh, nn.Dense(23)])
    x = jnp.ones((2, 11))
    spec = LoraSpec(rank=2, auxiliary_rank=2, base_dtype=base_dtype)
    adapted = adapt(model, spec, x)
    variables = jax.eval_shape(model.init, KEY, x)
    if base_dtype:
      variables = jax.eval_shape(adapted.quantize, variables)
    adapters = jax.eval_shape(adapted.init, KEY, variables)

    def loss(adapters, variables):
      return _loss(adapted.apply(variables, adapters, x))

    gradient = jax.grad(loss, (0, 1) if train_the_base else 0)
    text = jax.jit(gradient).lower(adapters, variables).as_text()
    lines = [line for line in text.splitlines() if "dot_general" in line]
    assert lines
    return [
      x for x in lines if "-> tensor<37x23x" in x or "-> tensor<23x37x" in x
    ]

  assert products(None, train_the_base=True)
  assert not products("nf4", train_the_base=False)


def test_bi_lora_trains_on_a_quantised_base_and_stays_in_its_ball():
  model, rho = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(4)]), 0.05
  x, y = (_random_like(jnp.zeros((32, n)), seed=n) for n in (64, 4))
  spec = LoraSpec(rank=2, auxiliary_rank=2, base_dtype="nf4")
  adapted = adapt(model, spec, x)
  variables = _random_like(jax.eval_shape(model.init, KEY, x))
  quantised = adapted.quantize(variables, donate=True)
  adapters = adapted.init(KEY, quantised)
  tx = bilora(optax.adam(1e-2), rho=rho)

  def loss_fn(adapters):
    return jnp.mean((adapted.apply(quantised, adapters, x) - y) ** 2)

  def step(carry, _):
    adapters, state = carry
    loss, grads = jax.value_and_grad(loss_fn)(adapters)
    updates, state = tx.update(grads, state, adapters)
    adapters = optax.apply_updates(adapters, updates)
    pairs = adapters["auxiliary"]
    weights = [x["kernel"].weight() for x in pairs.values()]
    return (adapters, state), (loss, optax.tree.norm(weights))

  _, (losses, norms) = jax.jit(
    lambda carry: jax.lax.scan(step, carry, length=20)
  )((adapters, tx.init(adapters)))
  assert losses[-1] < 0.7 * losses[0]
  # To rounding, of a norm taken from the product and not from the factors.
  assert (norms <= rho * (1 + 1e-5)).all()
  assert norms[-1] > 0.5 * rho


# Meshes, loading, metadata.


AXES = {
  "params": {
    "layers_0": {"kernel": P("fsdp", None), "bias": P()},
    "layers_2": {"kernel": P(None, "fsdp"), "bias": P()},
  }
}


def test_fsdp_over_eight_devices_is_as_on_one_device():
  model = nn.Sequential([nn.Dense(128), nn.tanh, nn.Dense(16)])
  x = _random_like(jnp.zeros((8, 512)))
  spec = LoraSpec(rank=2, auxiliary_rank=2, base_dtype="nf4")
  adapted = adapt(model, spec, x)
  variables = _random_like(jax.eval_shape(model.init, KEY, x))
  one = adapted.quantize(variables)
  mesh = devices.mesh(fsdp=8)

  def put(tree, axes):
    return jax.tree.map(
      lambda spec, leaf: jax.device_put(
        leaf, jax.sharding.NamedSharding(mesh, spec)
      ),
      axes,
      tree,
      is_leaf=lambda node: isinstance(node, P),
    )

  eight = adapted.quantize(put(variables, AXES))
  # 8 tiles of 64 along the input of the first, 2 along that of the second.
  axes = adapted.quantized_axes(AXES)
  assert axes["params"]["layers_0"]["kernel"].scale == P("fsdp", None)
  assert axes["params"]["layers_2"]["kernel"].scale == P(None, "fsdp")
  placed = jax.tree.map(lambda leaf: leaf.sharding.spec, eight)
  jax.tree.map(
    lambda spec, got: np.testing.assert_array_equal(tuple(spec), tuple(got)),
    axes,
    placed,
    is_leaf=lambda node: isinstance(node, P),
  )
  shards = eight["params"]["layers_0"]["kernel"].qvalue.addressable_shards
  assert {shard.data.shape for shard in shards} == {(64, 128)}
  jax.tree.map(np.testing.assert_array_equal, one, eight)

  adapters = _random_like(jax.eval_shape(adapted.init, KEY, one), seed=3)

  @jax.jit
  def gradient(variables, adapters, x):
    return jax.value_and_grad(
      lambda adapters: _loss(adapted.apply(variables, adapters, x))
    )(adapters)

  wanted = gradient(one, adapters, x)
  got = gradient(
    eight,
    put(adapters, jax.tree.map(lambda _: P(), adapters)),
    jax.device_put(x, jax.sharding.NamedSharding(mesh, P("fsdp"))),
  )
  # Sums over eight devices, in another order.
  for a, b in zip(*map(jax.tree.leaves, (got, wanted))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_no_device_gathers_a_kernel_to_quantise_or_read_it():
  adapted = adapt(nn.Dense(64), LoraSpec(base_dtype="nf4"), jnp.ones((1, 128)))
  mesh = devices.mesh(fsdp=2, tensor=4)
  sharding = jax.sharding.NamedSharding(mesh, P("fsdp", "tensor"))
  kernel = jax.device_put(np.ones((128, 64), np.float32), sharding)
  array = adapted.quantize_leaf("kernel", kernel)
  adapters = adapted.init(
    KEY, {"params": {"kernel": array, "bias": jnp.ones(64)}}
  )

  def merged(array, adapters):
    variables = {"params": {"kernel": array, "bias": jnp.ones(64)}}
    return adapted.merge(variables, adapters)["params"]["kernel"]

  for function, args in (
    (lambda x: adapted.quantize_leaf("kernel", x), (kernel,)),
    (merged, (array, adapters)),
  ):
    shardings = jax.tree.map(
      lambda _: sharding, jax.eval_shape(function, *args)
    )
    compiled = jax.jit(function, out_shardings=shardings).lower(*args).compile()
    assert "all-gather" not in compiled.as_text()


def test_scales_that_a_mesh_does_not_divide_are_whole_along_that_axis():
  adapted = adapt(nn.Dense(24), LoraSpec(base_dtype="int8"), jnp.ones((1, 128)))
  sharding = jax.sharding.NamedSharding(devices.mesh(fsdp=8), P("fsdp"))
  kernel = jax.device_put(np.ones((128, 24), np.float32), sharding)
  array = adapted.quantize_leaf("kernel", kernel)
  assert array.scale.shape == (2, 24)
  assert array.scale.sharding.is_fully_replicated
  assert array.qvalue.sharding == sharding


def test_donated_kernels_are_deleted_and_nothing_else():
  model = nn.Dense(4)
  adapted = adapt(model, LoraSpec(base_dtype="nf4"), jnp.ones((1, 8)))
  params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
  quantised = adapted.quantize({"params": params}, donate=True)["params"]
  assert params["kernel"].is_deleted()
  assert quantised["bias"] is params["bias"]
  assert not params["bias"].is_deleted()
  variables = {"params": quantised}
  adapters = adapted.init(KEY, variables)
  want = adapted.merge(variables, adapters)["params"]
  got = adapted.merge(variables, adapters, donate=True)["params"]
  np.testing.assert_array_equal(got["kernel"], want["kernel"])
  assert quantised["kernel"].qvalue.is_deleted()
  assert quantised["kernel"].scale.is_deleted()
  assert not got["bias"].is_deleted()


def test_one_leaf_at_a_time_is_as_all_at_once(run):
  flat = {
    path: run.adapted.quantize_leaf(path, leaf)
    for path, leaf in _flat(run.variables).items()
  }
  jax.tree.map(np.testing.assert_array_equal, flat, _flat(run.quantised))


class Named(nn.Module):
  """Two layers whose axes have names."""

  @nn.compact
  def __call__(self, x):
    init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    x = nn.Dense(4, kernel_init=init, name="one")(x)
    return nn.Dense(3, kernel_init=init, name="two")(x)


def test_axes_keep_their_names_and_scales_follow():
  model, x = Named(), jnp.ones((2, 128))
  adapted = adapt(model, LoraSpec(base_dtype="nf4", targets="one"), x)
  variables = jax.jit(model.init)(KEY, x)
  quantised = jax.jit(adapted.quantize)(variables)
  named = nn.get_partition_spec(quantised)
  assert named == adapted.quantized_axes(nn.get_partition_spec(variables))
  kernel = named["params"]["one"]["kernel"]
  assert (kernel.qvalue, kernel.scale) == (P("embed", "mlp"),) * 2
  assert named["params"]["two"]["kernel"] == P("embed", "mlp")

  adapters = adapted.init(KEY, quantised)
  specs = adapted.partition_specs(quantised, adapters)
  assert specs == adapted.partition_specs(variables, adapters)
  assert specs["primary"]["one"]["kernel"].a == P("embed", None)
  plain = adapted.merge(nn.unbox(quantised), adapters)
  np.testing.assert_array_equal(
    adapted.apply(quantised, adapters, x), model.apply(plain, x)
  )
  merged = adapted.merge(quantised, adapters)
  assert jax.tree.structure(merged) == jax.tree.structure(variables)


def test_boxes_that_know_their_mesh_do_not_split_what_it_does_not_divide():
  box = nn.Partitioned(jnp.ones((128, 4)), ("fsdp", None), devices.mesh(fsdp=8))
  variables = {"params": {"kernel": box, "bias": jnp.ones(4)}}
  model, x = nn.Dense(4), jnp.ones((2, 128))
  adapted = adapt(model, LoraSpec(base_dtype="int8"), x)
  quantised = adapted.quantize(variables)
  assert quantised["params"]["kernel"].scale.value.shape == (2, 4)
  got = jax.jit(adapted.apply)(quantised, adapted.init(KEY, quantised), x)
  # The largest of a tile is met exactly.
  np.testing.assert_allclose(got, np.full((2, 4), 129.0), rtol=1e-6)


# NNX.


class Model(nnx.Module):
  """A layer of one input axis, one of two, and a convolution."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    names = nnx.with_partitioning(
      nnx.initializers.normal(), ("embed", "mlp"), eager_sharding=False
    )
    self.a = nnx.Linear(128, 8, kernel_init=names, rngs=rngs)
    self.split = nnx.LinearGeneral(8, (2, 3), rngs=rngs)
    self.merge = nnx.LinearGeneral((2, 3), 6, axis=(-2, -1), rngs=rngs)
    self.conv = nnx.Conv(6, 3, (2,), rngs=rngs)
    self.norm = nnx.BatchNorm(3, rngs=rngs)

  def __call__(self, x):
    x = nnx.tanh(self.merge(self.split(self.a(x))))
    return self.norm(nnx.remat(lambda conv, x: conv(x))(self.conv, x))


def test_nnx_gives_what_its_rounded_kernels_give():
  model = Model()
  spec = LoraSpec(rank=2, auxiliary_rank=2, base_dtype="nf4")
  adapted = adapt(model, spec, X)
  graphdef, variables = nnx.split(model)
  variables = _random_like(variables)
  quantised = adapted.quantize(variables)
  adapters = _random_like(jax.eval_shape(adapted.init, KEY, quantised), seed=2)
  tiles = {"a": (64, 1), "split": (8, 1, 1), "merge": (2, 3, 1)}
  tiles["conv"] = (2, 6, 1)
  rounded = jax.tree.map(lambda x: x, variables)
  for name, sizes in tiles.items():
    kernel = variables[name]["kernel"].get_value()
    product = 0.0
    for part in adapters.values():
      product += np.reshape(part[name]["kernel"].weight(), kernel.shape)
    dense = _rounded(kernel, "nf4", sizes) + product
    rounded[name]["kernel"].set_value(jnp.asarray(dense, jnp.float32))

  @jax.jit
  def call(quantised, rounded, adapters):
    def loss(adapters):
      output, changed = adapted.apply(quantised, adapters, X, mutable=True)
      return _loss(output), (output, changed)

    return (
      jax.grad(loss, has_aux=True)(adapters),
      nnx.merge(graphdef, rounded)(X),
      adapted.apply(quantised, primary(adapters), X, mutable=True)[0],
      nnx.merge(graphdef, adapted.merge(quantised, adapters))(X),
    )

  results = call(quantised, rounded, adapters)
  (gradient, (got, changed)), wanted, one, merged = results
  close = {"rtol": 1e-4, "atol": 1e-5}
  np.testing.assert_allclose(got, wanted, **close)
  np.testing.assert_allclose(merged, one, **close)
  assert np.isfinite(got).all() and np.abs(got - one).max() > 1e-2
  assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(gradient))
  assert jax.tree.structure(changed) == jax.tree.structure(quantised)
  axes = adapted.quantized_axes(nnx.get_partition_spec(variables))
  array = axes["a"]["kernel"].get_value()
  assert (array.qvalue, array.scale) == (P("embed", "mlp"),) * 2


# Files.


def test_files_carry_the_form_of_the_base_and_adapters_fit_any(tmp_path, run):
  save_adapters(tmp_path, run.adapted, run.adapters)
  spec = load_spec(tmp_path)
  assert spec == run.adapted.spec
  plain = dataclasses.replace(spec, base_dtype=None, tile_size=32)
  for chosen in (spec, plain):
    loaded = load_adapters(tmp_path, adapt(Net(), chosen, X))
    jax.tree.map(np.testing.assert_array_equal, loaded, run.adapters)


def test_files_from_before_there_was_a_form_still_load(tmp_path):
  adapted = adapt(nn.Dense(2), LoraSpec(rank=1), jnp.ones((1, 4)))
  shapes = {"params": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
  save_adapters(tmp_path, adapted, adapted.init(KEY, shapes))
  path = tmp_path / "adapters.safetensors"
  config = json.loads((tmp_path / "adapters.json").read_text())
  new = json.dumps(config, indent=2)
  for name in ("base_dtype", "tile_size"):
    del config["spec"][name]
  old = json.dumps(config, indent=2)
  (tmp_path / "adapters.json").write_text(old)
  arrays = path.read_bytes()
  # The header is of a stated length, and JSON in JSON.
  size = int.from_bytes(arrays[:8], "little")
  header = arrays[8 : 8 + size].decode()
  assert json.dumps(new)[1:-1] in header
  header = header.replace(json.dumps(new)[1:-1], json.dumps(old)[1:-1]).encode()
  path.write_bytes(
    len(header).to_bytes(8, "little") + header + arrays[8 + size :]
  )
  assert load_spec(tmp_path) == LoraSpec(rank=1)
  load_adapters(tmp_path, adapted)


# What is refused.


class Squared(nn.Module):
  """A layer that does more with its kernel than multiply by it."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.ones, (x.shape[-1], 3))
    return jnp.dot(x, kernel) + jnp.sum(jnp.square(kernel))


class Twins(nnx.Module):
  """Two weights of one shape in one module."""

  def __init__(self):
    self.gate, self.up = (nnx.Param(jnp.ones((4, 3))) for _ in range(2))

  def __call__(self, x):
    return jnp.dot(x, self.gate[...]) * jnp.dot(x, self.up[...])


def _refused(call, *args, **kwargs):
  with pytest.raises(ValueError) as caught:
    call(*args, **kwargs)
  return str(caught.value)


def test_what_cannot_be_is_refused_in_sentences():
  x = jnp.ones((1, 8))
  plain, nf4, int8 = (
    adapt(nn.Dense(4), LoraSpec(rank=1, base_dtype=name), x)
    for name in (None, "nf4", "int8")
  )
  floats = {"params": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
  codes = nf4.quantize(floats)
  adapters = plain.init(KEY, floats)

  message = _refused(plain.quantize, floats)
  assert "base_dtype=None, with which kernels stay floats" in message
  message = _refused(plain.apply, codes, adapters, x)
  assert "base_dtype=None" in message
  assert "kernel: nf4 in tiles of 8x1, expected floats" in message
  message = _refused(nf4.apply, floats, adapters, x)
  assert "base_dtype='nf4'" in message
  assert "kernel: floats, expected nf4 in tiles of 8x1" in message
  message = _refused(int8.merge, codes, adapters)
  assert "kernel: nf4 in tiles of 8x1, expected int8 in tiles of 8x1" in message
  assert "kernel: nf4 in tiles of 8x1, expected floats" in _refused(
    nf4.quantize, codes
  )
  wide = {"params": {**codes["params"], "bias": jnp.ones(5)}}
  assert "bias: (5,), expected (4,)" in _refused(nf4.init, KEY, wide)

  message = _refused(nf4.quantize_leaf, "kernels", jnp.ones((8, 4)))
  assert (
    "kernels is not a parameter of the model, which has 'bias', 'k" in message
  )
  message = _refused(nf4.quantize_leaf, "kernel", jnp.ones((4, 8)))
  assert message == "kernel has the shape (8, 4); got (4, 8)."


def test_a_kernel_that_is_not_only_multiplied_by_is_refused():
  spec = LoraSpec(rank=1, base_dtype="int8", targets="|.+")
  message = _refused(adapt, Squared(), spec, jnp.ones((1, 4)))
  assert "the weight kernel cannot be adapted: it is used not only" in message
  assert "but also in square." in message


def test_two_weights_of_one_shape_in_a_module_keep_apart():
  x = jnp.ones((1, 4))
  model = Twins()
  adapted = adapt(model, LoraSpec(rank=1, base_dtype="int8"), x)
  variables = nnx.state(model)
  # Absolute maxima of 127 are whole steps of int8: nothing is rounded.
  gate, up = jnp.full((4, 3), 127.0), jnp.full((4, 3), -127.0)
  variables = nnx.State({"gate": nnx.Param(gate), "up": nnx.Param(up)})
  quantised = adapted.quantize(variables)
  adapters = adapted.init(KEY, quantised)
  pair = adapters["primary"]["up"]
  adapters["primary"]["up"] = type(pair)(pair.a, pair.b + 1.0, pair.scale)
  changed = up + adapters["primary"]["up"].weight()
  np.testing.assert_allclose(
    adapted.apply(quantised, adapters, x), (x @ gate) * (x @ changed), rtol=1e-5
  )
