"""`adapt` on NNX: the same outputs as dense weights summed by hand."""

import functools
import operator
from typing import Any, NamedTuple

from dense import outputs
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilora_jax import LoraSpec, adapt, bilora, primary

SPEC = LoraSpec(rank=2, alpha=3.0, auxiliary_rank=3)
SCALE = 1.5  # 3 / 2
# Sums of fewer than 100 float32 products of order 1, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KEY = jax.random.key(0)
RNGS = nnx.Rngs(0)


def _normal(*shape, seed=0):
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )


class Remat(nnx.Linear):
  """A layer whose method is rematerialised."""

  @nnx.remat
  def __call__(self, x):
    return super().__call__(x)


class Stack(nnx.Module):
  """Modules in a list, of which two are equal but for their weights."""

  def __init__(self):
    self.layers = nnx.List(
      [
        Remat(5, 5, rngs=RNGS),
        Remat(5, 5, rngs=RNGS),
        nnx.Linear(5, 3, rngs=RNGS),
      ]
    )

  def __call__(self, x):
    for layer in self.layers:
      x = jnp.tanh(layer(x))
    return x


class Case(NamedTuple):
  """A model, its input, and the equations of its weights.

  Of each kernel: the shape of `a` before the rank, that of `b` behind it, and
  the einsum of the two.
  """

  model: nnx.Module
  x: Any
  weights: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]]


PROJECTION = ((6,), (2, 4), "ir,rhd->ihd")
CASES = {
  "linear": Case(
    nnx.Linear(5, 4, rngs=RNGS),
    _normal(2, 5),
    {"kernel": ((5,), (4,), "ir,ro->io")},
  ),
  "linear_general": Case(
    nnx.LinearGeneral((5, 3), (2, 4), axis=(-2, -1), rngs=RNGS),
    _normal(2, 5, 3),
    {"kernel": ((5, 3), (2, 4), "ijr,rkl->ijkl")},
  ),
  "einsum": Case(
    nnx.Einsum("bi,hio->bho", (3, 5, 4), (3, 4), rngs=RNGS),
    _normal(2, 5),
    {"kernel": ((5,), (3, 4), "ir,rho->hio")},
  ),
  "conv": Case(
    nnx.Conv(4, 6, (3, 2), strides=2, rngs=RNGS),
    _normal(1, 6, 5, 4),
    {"kernel": ((3, 2, 4), (6,), "hwir,ro->hwio")},
  ),
  "attention": Case(
    nnx.MultiHeadAttention(2, 6, 8, decode=False, rngs=RNGS),
    _normal(1, 3, 6),
    {
      "query/kernel": PROJECTION,
      "key/kernel": PROJECTION,
      "value/kernel": PROJECTION,
      "out/kernel": ((2, 4), (6,), "hdr,ro->hdo"),
    },
  ),
  "list_and_remat": Case(
    Stack(),
    _normal(2, 5),
    {
      "layers/0/kernel": ((5,), (5,), "ir,ro->io"),
      "layers/1/kernel": ((5,), (5,), "ir,ro->io"),
      "layers/2/kernel": ((5,), (3,), "ir,ro->io"),
    },
  ),
}


def _random_like(tree, seed=1):
  rng = np.random.default_rng(seed)

  def draw(leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    return jnp.asarray(rng.normal(size=leaf.shape) * 0.4, leaf.dtype)

  return jax.tree.map(draw, tree)


def _pair(tree, path):
  for key in path.split("/"):
    tree = tree[key]
  return tree


def _plain(model, variables, *args, **kwargs):
  return nnx.merge(nnx.graphdef(model), variables)(*args, **kwargs)


def _dense(variables, adapters, weights, parts):
  """`W0` plus the products of some parts, by the equations of each layer."""
  flat = dict(nnx.to_flat_state(variables))
  for path, (left, right, einsum) in weights.items():
    keys = tuple(int(k) if k.isdigit() else k for k in path.split("/"))
    kernel = np.asarray(flat[keys][...], np.float64)
    for part in parts:
      pair = _pair(adapters[part], path)
      a, b = np.asarray(pair.a, np.float64), np.asarray(pair.b, np.float64)
      kernel = kernel + SCALE * np.einsum(
        einsum, a.reshape(*left, -1), b.reshape(-1, *right)
      )
    flat[keys] = flat[keys].replace(jnp.asarray(kernel, jnp.float32))
  return nnx.from_flat_state(list(flat.items()))


@pytest.fixture(scope="module", params=CASES)
def run(request):
  model, x, weights = CASES[request.param]
  adapted = adapt(model, SPEC, x)
  assert set(adapted.targets) == set(weights)
  variables = _random_like(nnx.state(model))
  adapters = _random_like(jax.eval_shape(adapted.init, KEY, variables), seed=2)
  summed = functools.partial(_dense, variables, adapters, weights)
  return outputs(
    adapted, functools.partial(_plain, model), variables, adapters, summed, x
  )


def test_apply_is_the_model_at_w0_plus_primary_plus_auxiliary(run):
  np.testing.assert_allclose(run.both, run.both_dense, **CLOSE)
  assert np.abs(run.both - run.primary).max() > 1e-2


def test_apply_of_the_primary_is_the_model_at_w0_plus_primary(run):
  np.testing.assert_allclose(run.primary, run.primary_dense, **CLOSE)
  assert np.abs(run.primary - run.plain).max() > 1e-2


def test_the_merged_model_is_the_model_at_w0_plus_primary(run):
  np.testing.assert_allclose(run.merged, run.primary_dense, **CLOSE)


@pytest.mark.parametrize("wrap", [nnx.remat, nnx.jit])
def test_specs_that_differ_only_in_alpha_do_not_share_traces(wrap):
  class Layer(nnx.Linear):
    """Its method's trace is kept by JAX."""

    @wrap
    def __call__(self, x):
      return super().__call__(x)

  class Model(nnx.Module):
    """Two equal layers."""

    def __init__(self):
      self.a, self.b = (
        Layer(5, 5, use_bias=False, rngs=RNGS) for _ in range(2)
      )

    def __call__(self, x):
      return self.b(self.a(x))

  model, x = Model(), _normal(2, 5)
  variables = nnx.state(model)
  for alpha in (2.0, 4.0):
    adapted = adapt(model, LoraSpec(rank=2, alpha=alpha), x)
    adapters = primary(_random_like(adapted.init(KEY, variables)))
    np.testing.assert_allclose(
      adapted.apply(variables, adapters, x),
      _plain(model, adapted.merge(variables, adapters), x),
      **CLOSE,
    )


class Full(nnx.Module):
  """Running statistics, dropout, a tied table and a second method."""

  def __init__(self, dtype=jnp.float32):
    self.body = nnx.Linear(5, 4, param_dtype=dtype, rngs=RNGS)
    self.norm = nnx.BatchNorm(4, rngs=RNGS)
    self.drop = nnx.Dropout(0.5, rngs=RNGS)
    self.table = nnx.Embed(3, 4, rngs=RNGS)

  def encode(self, x):
    return self.body(x)

  def __call__(self, x, train=False):
    y = self.norm(self.encode(x), use_running_average=not train)
    return self.table.attend(self.drop(y, deterministic=not train))


@pytest.fixture(scope="module")
def full():
  model, x = Full(), _normal(4, 5)
  adapted = adapt(model, LoraSpec(rank=2, alpha=3.0, extra="norm/.*"), x)
  variables = nnx.state(model)
  return (
    model,
    adapted,
    variables,
    _random_like(adapted.init(KEY, variables)),
    x,
  )


def test_a_tied_table_is_left_alone(full):
  assert set(full[1].targets) == {"body/kernel"}


def test_state_comes_back_where_mutable_and_the_given_stays(full):
  model, adapted, variables, adapters, x = full
  before = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
  _, after = adapted.apply(variables, adapters, x, train=True, mutable=True)
  assert jax.tree.structure(after) == jax.tree.structure(variables)
  merged = adapted.merge(variables, adapters)
  assert jax.tree.structure(merged) == jax.tree.structure(variables)
  pair = adapters["primary"]["body"]["kernel"]
  other = adapters["auxiliary"]["body"]["kernel"]
  hidden = x @ (
    variables["body"]["kernel"][...]
    + SCALE * (pair.a @ pair.b + other.a @ other.b)
  )
  # BatchNorm's momentum is 0.99, and it starts at zero.
  np.testing.assert_allclose(
    after["norm"]["mean"][...], 0.01 * hidden.mean(0), **CLOSE
  )
  # Parameters are the optimizer's business.
  for name in ("scale", "bias"):
    np.testing.assert_array_equal(
      after["norm"][name][...], variables["norm"][name][...]
    )
  jax.tree.map(
    np.testing.assert_array_equal, before, nnx.state(model, nnx.BatchStat)
  )


def test_apply_and_merge_use_extra(full):
  model, adapted, variables, adapters, x = full
  assert set(adapters["extra"]["norm"]) == {"scale", "bias"}
  merged = adapted.merge(variables, adapters)
  for name in ("scale", "bias"):
    np.testing.assert_array_equal(
      merged["norm"][name][...], adapters["extra"]["norm"][name]
    )
  np.testing.assert_allclose(
    adapted.apply(variables, primary(adapters), x),
    _plain(model, merged, x),
    **CLOSE,
  )


def test_one_other_method_can_have_the_adapters(full):
  model, _, variables, _, x = full
  adapted = adapt(model, SPEC, x, methods=("encode",))
  adapters = _random_like(adapted.init(KEY, variables))
  outputs = [
    adapted.apply(variables, adapters, x, method=method)
    for method in (None, "encode", Full.encode)
  ]
  pair = adapters["primary"]["body"]["kernel"].join(
    adapters["auxiliary"]["body"]["kernel"]
  )
  body = variables["body"]
  wanted = x @ (body["kernel"][...] + pair.weight()) + body["bias"][...]
  for output in outputs:
    np.testing.assert_allclose(output, wanted, **CLOSE)
  with pytest.raises(ValueError, match="in the method 'encode'; got '__call"):
    adapted.apply(variables, adapters, x, method="__call__")
  with pytest.raises(ValueError, match="one method of an NNX model"):
    adapt(model, SPEC, x, methods=("encode", "__call__"))


def test_dropout_of_adapters_is_on_only_with_a_dropout_rng():
  model, x, _ = CASES["linear"]
  variables = nnx.state(model)
  apart = adapt(model, SPEC, x)
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


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_bfloat16_model_keeps_its_dtypes_and_adapters_float32(dtype):
  model = Full(jnp.bfloat16)
  x = jnp.ones((2, 5), jnp.bfloat16)
  adapted = adapt(model, LoraSpec(dtype=dtype), x, methods=("encode",))
  variables = nnx.state(model)
  adapters = adapted.init(KEY, variables)
  assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {
    jnp.dtype("float32")
  }
  shape = jax.eval_shape(adapted.apply, variables, adapters, x)
  assert shape.dtype == jnp.bfloat16
  merged = adapted.merge(variables, adapters)
  assert merged["body"]["kernel"].dtype == jnp.bfloat16


def test_merge_sums_in_float32_and_casts_once():
  model = nnx.Linear(32, 64, param_dtype=jnp.bfloat16, rngs=RNGS)
  variables = nnx.state(model)
  adapted = adapt(model, LoraSpec(rank=2, alpha=2.0), jnp.ones((1, 32)))
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
  kernel = np.asarray(variables["kernel"][...])
  product = np.asarray(pair.a) @ np.asarray(pair.b)
  once = (kernel.astype(np.float32) + product).astype(jnp.bfloat16)
  merged = adapted.merge(variables, adapters)["kernel"][...]
  np.testing.assert_array_equal(merged, once)
  assert (once != kernel + product.astype(jnp.bfloat16)).any()


def test_partition_specs_follow_the_kernels_and_never_split_the_rank():
  model = nnx.Linear(
    5,
    4,
    kernel_init=nnx.with_partitioning(
      nnx.initializers.ones, ("embed", "mlp"), eager_sharding=False
    ),
    rngs=RNGS,
  )
  variables = nnx.state(model)
  adapted = adapt(model, SPEC, jnp.ones((2, 5)))
  adapters = adapted.init(KEY, variables)
  specs = adapted.partition_specs(variables, adapters)
  spec = jax.sharding.PartitionSpec
  for part in ("primary", "auxiliary"):
    pair = specs[part]["kernel"]
    assert (pair.a, pair.b) == (spec("embed", None), spec(None, "mlp"))


def test_the_given_model_is_not_changed(full):
  model, _, _, _, x = full
  before = nnx.graphdef(model)
  adapted = adapt(model, SPEC, x)
  variables = nnx.state(model)
  adapted.apply(variables, adapted.init(KEY, variables), x)
  assert nnx.graphdef(model) == before


class Scanned(nnx.Module):
  """Stacked layers under `nnx.scan`, beside a layer outside of it."""

  def __init__(self):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
      return nnx.Linear(5, 5, rngs=rngs)

    self.layers = stack(nnx.Rngs(0))
    self.head = nnx.Linear(5, 3, rngs=RNGS)

  def __call__(self, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
      return jnp.tanh(layer(x))

    return self.head(forward(x, self.layers))


class Unrolled(nnx.Module):
  """The same layers, one after the other."""

  def __init__(self):
    self.layers = nnx.List([nnx.Linear(5, 5, rngs=RNGS) for _ in range(3)])
    self.head = nnx.Linear(5, 3, rngs=RNGS)

  def __call__(self, x):
    for layer in self.layers:
      x = jnp.tanh(layer(x))
    return self.head(x)


@pytest.mark.parametrize(
  "changed", [{}, {"dora": True}, {"base_dtype": "int8"}], ids=str
)
def test_a_scanned_model_is_the_unrolled_one(changed):
  spec = LoraSpec(rank=2, alpha=3.0, auxiliary_rank=3, **changed)
  x = _normal(2, 5)
  scanned, unrolled = adapt(Scanned(), spec, x), adapt(Unrolled(), spec, x)
  assert scanned.targets == {"layers/kernel": (3, 5, 5), "head/kernel": (5, 3)}
  state = _random_like(nnx.state(Scanned()))
  flat = nnx.to_pure_dict(state)
  one_by_one = nnx.state(Unrolled())
  nnx.replace_by_pure_dict(
    one_by_one, {**flat, "layers": _apart(flat["layers"])}
  )
  if spec.base_dtype:
    state, one_by_one = scanned.quantize(state), unrolled.quantize(one_by_one)
  adapters = _random_like(scanned.init(KEY, state))
  others = {
    part: {
      **tree,
      "layers": {str(i): x for i, x in _apart(tree["layers"]).items()},
    }
    for part, tree in adapters.items()
  }

  def loss(adapted, state, adapters):
    return jnp.sum(adapted.apply(state, adapters, x) ** 2)

  stacked, grads = jax.value_and_grad(loss, 2)(scanned, state, adapters)
  wanted, apart = jax.value_and_grad(loss, 2)(unrolled, one_by_one, others)
  np.testing.assert_allclose(stacked, wanted, **CLOSE)
  pair, pairs = grads["auxiliary"]["layers"], apart["auxiliary"]["layers"]
  for i, one in _apart(pair).items():
    for got, want in zip(*map(jax.tree.leaves, (one, pairs[str(i)]))):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def _apart(tree):
  return {i: jax.tree.map(operator.itemgetter(i), tree) for i in range(3)}


def test_weights_that_are_mapped_over_are_adapted():
  class Experts(nnx.Module):
    """Stacked weights under `nnx.vmap`."""

    def __init__(self):
      @nnx.split_rngs(splits=3)
      @nnx.vmap
      def stack(rngs):
        return nnx.Linear(5, 4, rngs=rngs)

      self.experts = stack(nnx.Rngs(0))

    def __call__(self, x):
      run = nnx.vmap(lambda expert, x: expert(x), in_axes=(0, None))
      return run(self.experts, x)

  model, x = Experts(), _normal(2, 5)
  adapted = adapt(model, SPEC, x)
  assert adapted.targets == {"experts/kernel": (3, 5, 4)}
  variables = nnx.state(model)
  adapters = _random_like(adapted.init(KEY, variables))
  np.testing.assert_allclose(
    adapted.apply(variables, primary(adapters), x),
    _plain(model, adapted.merge(variables, adapters), x),
    **CLOSE,
  )


@pytest.mark.parametrize("host", ["to_nnx", "to_linen", "rnn"])
def test_bridges_and_recurrent_layers_are_adapted(host):
  x = _normal(2, 3, 5)
  if host == "to_nnx":
    model = nnx.bridge.ToNNX(nn.Dense(4), rngs=nnx.Rngs(0)).lazy_init(x)
    variables, plain = nnx.state(model), functools.partial(_plain, model)
  elif host == "rnn":
    model = nnx.RNN(nnx.SimpleCell(5, 4, rngs=RNGS), rngs=nnx.Rngs(0))
    variables, plain = nnx.state(model), functools.partial(_plain, model)
  else:
    model = nnx.bridge.to_linen(nnx.Linear, 5, 4)
    variables, plain = model.init(KEY, x), model.apply
  adapted = adapt(model, SPEC, x)
  adapters = _random_like(adapted.init(KEY, variables))
  merged = adapted.merge(variables, adapters)
  if host != "to_linen":
    adapted = adapted.eval()
  got = adapted.apply(variables, primary(adapters), x)
  np.testing.assert_allclose(got, plain(merged, x), **CLOSE)
  assert np.abs(got - plain(variables, x)).max() > 1e-2


def test_parameters_themselves_are_operands_too():
  class Raw(nnx.Module):
    """Products of parameters, not of their values."""

    def __init__(self):
      self.w, self.v = nnx.Param(_normal(5, 4)), nnx.Param(_normal(4, 3))

    def __call__(self, x):
      return jnp.dot(jnp.einsum("bi,io->bo", x, self.w), self.v)

  model, x = Raw(), _normal(2, 5)
  adapted = adapt(model, SPEC, x)
  assert set(adapted.targets) == {"w", "v"}
  variables = nnx.state(model)
  adapters = _random_like(adapted.init(KEY, variables))
  np.testing.assert_allclose(
    adapted.apply(variables, primary(adapters), x),
    _plain(model, adapted.merge(variables, adapters), x),
    **CLOSE,
  )


# Training and evaluation.


class Noisy(nnx.Module):
  """Dropout and running statistics, switched by `train` and `eval`."""

  def __init__(self):
    self.body = nnx.Linear(5, 6, rngs=RNGS)
    self.norm = nnx.BatchNorm(6, momentum=0.8, rngs=RNGS)
    self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=0))
    self.head = nnx.Linear(6, 3, rngs=RNGS)

  def __call__(self, x):
    return self.head(self.drop(jnp.tanh(self.norm(self.body(x)))))


class LinenNoisy(nn.Module):
  """The same in Linen."""

  @nn.compact
  def __call__(self, x, key, train):
    x = nn.Dense(6, name="body")(x)
    x = nn.BatchNorm(not train, momentum=0.8, name="norm")(x)
    # Of each key NNX makes its first stream's, and of that the first key.
    key = jax.random.fold_in(jax.random.fold_in(key, 0), 0)
    x = nn.Dropout(0.5, deterministic=not train)(jnp.tanh(x), rng=key)
    return nn.Dense(3, name="head")(x)


@pytest.fixture(scope="module")
def noisy():
  model, x = Noisy(), _normal(8, 5)
  adapted = adapt(model, SPEC, x)
  variables = nnx.state(model)
  return adapted, variables, adapted.init(KEY, variables), x


def test_dropout_and_batch_norm_train_as_in_linen(noisy):
  adapted, variables, adapters, x = noisy
  y = _normal(8, 3, seed=5)
  model = LinenNoisy()
  linen = adapt(model, SPEC, x, KEY, train=True)
  pure = nnx.to_pure_dict(variables)
  params = {k: pure[k] for k in ("body", "head")}
  params["norm"] = {k: pure["norm"][k] for k in ("scale", "bias")}
  stats = {k: pure["norm"][k] for k in ("mean", "var")}
  others = {"params": params, "batch_stats": {"norm": stats}}
  tx = bilora(optax.adam(0.05), rho=0.5)

  def nnx_loss(adapters, variables, key):
    output, variables = adapted.train().apply(
      variables, adapters, x, rngs={"dropout": key}, mutable=True
    )
    return jnp.mean((output - y) ** 2), variables

  def linen_loss(adapters, variables, key):
    output, changed = linen.apply(
      variables, adapters, x, key, train=True, mutable=["batch_stats"]
    )
    return jnp.mean((output - y) ** 2), {**variables, **changed}

  def trained(loss, variables):
    @jax.jit
    def step(adapters, state, variables, key):
      gradient = jax.value_and_grad(loss, has_aux=True)
      (value, variables), grads = gradient(adapters, variables, key)
      updates, state = tx.update(grads, state, adapters)
      return optax.apply_updates(adapters, updates), state, variables, value

    ours, state, losses = adapters, tx.init(adapters), []
    for i in range(20):
      ours, state, variables, value = step(
        ours, state, variables, jax.random.key(i)
      )
      losses.append(value)
    return np.asarray(losses), ours, variables

  losses, ours, variables = trained(nnx_loss, variables)
  wanted, theirs, others = trained(linen_loss, others)
  np.testing.assert_allclose(losses, wanted, rtol=1e-5)
  for got, want in zip(*map(jax.tree.leaves, (ours, theirs))):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  for name in stats:
    np.testing.assert_allclose(
      variables["norm"][name][...],
      others["batch_stats"]["norm"][name],
      rtol=1e-5,
      atol=1e-5,
    )
  np.testing.assert_allclose(
    adapted.eval().apply(variables, primary(ours), x),
    linen.apply(others, primary(theirs), x, KEY, train=False),
    rtol=1e-5,
    atol=1e-5,
  )
  # Noise that is on, and new in each step, is seen in the losses.
  assert np.abs(np.diff(losses)).min() > 0


def test_training_draws_by_the_key_and_evaluation_does_not(noisy):
  adapted, variables, adapters, x = noisy
  adapters = _random_like(adapters)

  def run(adapted, i):
    rngs = {"dropout": jax.random.key(i)}
    return adapted.apply(variables, adapters, x, rngs=rngs, mutable=True)[0]

  first, again, other = (run(adapted.train(), i) for i in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()
  np.testing.assert_array_equal(
    run(adapted.eval(), 0), adapted.eval().apply(variables, adapters, x)
  )
  np.testing.assert_array_equal(run(adapted.eval().train(), 0), first)


def test_random_numbers_or_state_that_would_be_lost_are_refused(noisy):
  adapted, variables, adapters, x = noisy
  with pytest.raises(ValueError, match=r"Pass rngs={'dropout': key} to train"):
    adapted.apply(variables, adapters, x)
  rngs = {"dropout": KEY}
  with pytest.raises(
    ValueError, match=r"norm/mean, norm/var\), which would be"
  ):
    adapted.apply(variables, adapters, x, rngs=rngs)
  with pytest.raises(ValueError, match=r"keys for \['noise'\]; the streams"):
    adapted.apply(variables, adapters, x, rngs={"noise": KEY})
  with pytest.raises(ValueError, match="train=False"):
    adapt(nn.Dense(3), SPEC, x).eval()


def test_the_model_itself_is_refused_as_variables(noisy):
  adapted, _, adapters, x = noisy
  for call in (
    lambda: adapted.init(KEY, Noisy()),
    lambda: adapted.apply(Noisy(), adapters, x),
    lambda: adapted.merge(Noisy(), adapters),
  ):
    with pytest.raises(ValueError, match=r"nnx.state\(model\); got the model"):
      call()


def test_an_input_of_a_wrong_shape_has_jax_s_own_error():
  with pytest.raises(TypeError, match=r"got \(6,\) and \(5,\)"):
    adapt(Scanned(), SPEC, jnp.ones((2, 6)))


def test_variables_of_another_model_are_refused_by_name():
  model, x, _ = CASES["linear"]
  adapted = adapt(model, SPEC, x)
  adapters = adapted.init(KEY, nnx.state(model))
  other = nnx.state(nnx.Linear(5, 3, rngs=RNGS))
  for call in (
    lambda: adapted.init(KEY, other),
    lambda: adapted.apply(other, adapters, x),
    lambda: adapted.merge(other, adapters),
  ):
    with pytest.raises(
      ValueError, match=r"kernel: \(5, 3\), expected \(5, 4\)"
    ):
      call()


def test_weights_of_numpy_are_adapted_too():
  model, x = nnx.Linear(4, 3, rngs=RNGS), _normal(2, 4)
  adapted = adapt(nnx.Sequential(model), SPEC, x)
  state = nnx.state(nnx.Sequential(model))
  adapters = jax.tree.map(jnp.ones_like, adapted.init(KEY, state))
  np.testing.assert_allclose(
    adapted.apply(jax.tree.map(np.asarray, state), adapters, x),
    adapted.apply(state, adapters, x),
    **CLOSE,
  )
