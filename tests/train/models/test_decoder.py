"""The decoder: parity with PyTorch, packing, and its variants' agreement."""

import dataclasses
import functools

import decoder_cases
from flax import linen as nn
import jax
from jax._src import ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest

import bilora_jax
from train.models.decoder import model as decoder
from train.models.decoder import weights as decoder_weights

TINY = decoder_cases.TINY
TOKENS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
# Two segments; and one, with padding after it.
LENGTHS = np.array([[3, 3], [4, 0]])
REAL = np.arange(6) < LENGTHS.sum(1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def _apply(model, *args, method=None):
  """One compiled program for all calls of one kind."""
  return model.apply(*args, method=method)


@pytest.fixture(scope="module")
def variables():
  return decoder_cases.random_variables(decoder.Decoder(TINY))


@pytest.fixture(scope="module")
def logits(variables):
  return _apply(decoder.Decoder(TINY), variables, TOKENS, None, LENGTHS)


@pytest.mark.parametrize(
  ("name", "scan"),
  [(name, False) for name in decoder_cases.NAMES]
  + [(name, True) for name in decoder_cases.SCANNED],
)
def test_packed_and_padded_rows_agree_with_pytorch_one_by_one(name, scan):
  config, tensors, rows, _ = decoder_cases.load(name)
  length = sum(len(tokens) for tokens, _ in rows)
  tokens = np.zeros((2, length), np.int32)
  lengths = np.zeros((2, len(rows) + 1), np.int32)
  # All rows behind each other; and one of them with padding after it.
  tokens[0] = np.concatenate([row for row, _ in rows])
  lengths[0, : len(rows)] = [len(row) for row, _ in rows]
  alone = slice(len(rows[1][0]))
  tokens[1, alone], lengths[1, 0] = rows[1][0], len(rows[1][0])
  model = decoder.Decoder(config, scan=scan)
  params = decoder_weights.params(config, tensors, scan=scan)
  got = _apply(model, {"params": params}, tokens, None, lengths)
  assert got.dtype == jnp.float32
  want = np.concatenate([logits for _, logits in rows])
  # Logits reach 6; float32 sums in another order differ by about 1e-5.
  np.testing.assert_allclose(got[0], want, rtol=0, atol=5e-5)
  np.testing.assert_allclose(got[1, alone], rows[1][1], rtol=0, atol=5e-5)
  assert np.isfinite(got).all()


def test_without_segments_a_row_is_one(variables):
  model = decoder.Decoder(TINY)
  plain = _apply(model, variables, TOKENS, None, None)
  one = _apply(model, variables, TOKENS, None, np.full((2, 1), 6))
  np.testing.assert_allclose(plain, one, rtol=0, atol=1e-6)


def test_only_distances_between_positions_matter(variables, logits):
  model = decoder.Decoder(TINY)
  positions = np.array([[7, 8, 9, 3, 4, 5], [2, 3, 4, 5, 0, 0]])
  got = _apply(model, variables, TOKENS, positions, LENGTHS)
  np.testing.assert_allclose(got[REAL], logits[REAL], rtol=0, atol=1e-5)


def test_hidden_and_head_are_the_two_halves_of_the_logits(variables, logits):
  model = decoder.Decoder(TINY)
  hidden = _apply(model, variables, TOKENS, None, LENGTHS, method="hidden")
  assert hidden.shape == (2, 6, TINY.hidden_size)
  got = _apply(model, variables, hidden[0, 2:4], method="head")
  np.testing.assert_allclose(got, logits[0, 2:4], rtol=0, atol=1e-6)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_xla_attention_is_the_same(variables, lengths):
  # On CPU, as the tests run, the default is the other one.
  want = _apply(decoder.Decoder(TINY), variables, TOKENS, None, lengths)
  fused = decoder.Decoder(TINY, attention="xla")
  got = _apply(fused, variables, TOKENS, None, lengths)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_bfloat16_stays_close_and_gives_float32_logits(variables, logits):
  low = jnp.bfloat16
  model = decoder.Decoder(TINY, dtype=low, param_dtype=low)
  own = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {jnp.dtype(low)}
  cast = jax.tree.map(lambda x: np.asarray(x, low), variables)
  hidden = functools.partial(model.apply, method="hidden")
  assert jax.eval_shape(hidden, cast, TOKENS).dtype == low
  got = _apply(model, cast, TOKENS, None, LENGTHS)
  assert got.dtype == jnp.float32
  # 8 bits of values of order 1, through two layers.
  np.testing.assert_allclose(got, logits, rtol=0.1, atol=0.1)
  # Not rounded to bfloat16 after the last product.
  assert (got != got.astype(low)).mean() > 0.5


# Adapters.


def _adapted(**kwargs):
  model = decoder.Decoder(dataclasses.replace(TINY, tied=False), **kwargs)
  spec = bilora_jax.LoraSpec(rank=2, auxiliary_rank=2, exclude="lm_head")
  return model, bilora_jax.adapt(model, spec, TOKENS)


def test_all_projections_are_found():
  names = {
    *(f"self_attn/{x}_proj/kernel" for x in "qkvo"),
    *(f"mlp/{x}_proj/kernel" for x in ("gate", "up", "down")),
  }
  _, adapted = _adapted()
  layers = ("layers_0", "layers_1")
  assert set(adapted.targets) == {f"{i}/{x}" for i in layers for x in names}
  _, adapted = _adapted(scan=True)
  assert set(adapted.targets) == {f"layers/{x}" for x in names}
  assert {shape[0] for shape in adapted.targets.values()} == {2}


@pytest.fixture(scope="module")
def unrolled():
  """Variables and adapters without scan, and the loss and its gradients."""
  model, adapted = _adapted()
  variables = decoder_cases.random_variables(model)
  rng = np.random.default_rng(1)
  adapters = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype),
    jax.eval_shape(adapted.init, jax.random.key(0), variables),
  )
  return variables, adapters, _loss_and_gradients(adapted, variables, adapters)


def _loss_and_gradients(adapted, variables, adapters):
  def loss(adapters):
    logits = adapted.apply(variables, adapters, TOKENS, None, LENGTHS)
    return (jax.nn.logsumexp(logits, -1) ** 2).mean()

  return jax.jit(jax.value_and_grad(loss))(adapters)


@pytest.mark.parametrize(
  ("scan", "remat"), [(False, "full"), (True, "none"), (True, "offload")]
)
def test_scan_and_remat_change_neither_loss_nor_gradients(
  unrolled, scan, remat
):
  variables, adapters, (want, gradients) = unrolled
  _, adapted = _adapted(scan=scan, remat=remat)
  if scan:
    variables = {"params": decoder_cases.stacked(variables["params"], 2)}
    adapters, gradients = (
      {part: decoder_cases.stacked(tree[part], 2) for part in tree}
      for tree in (adapters, gradients)
    )
  got, got_gradients = _loss_and_gradients(adapted, variables, adapters)
  assert max(np.abs(x).max() for x in jax.tree.leaves(gradients)) > 0.1
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  close(got, want)
  jax.tree.map(close, got_gradients, gradients)


def test_of_a_product_with_an_adapter_the_narrow_half_is_kept_alone():
  wide = {"hidden_size": 48, "num_heads": 12, "intermediate_size": 56}
  model = decoder.Decoder(dataclasses.replace(TINY, **wide), remat="base")
  spec = bilora_jax.LoraSpec(rank=1, auxiliary_rank=1, targets=".*gate_proj")
  adapted = bilora_jax.adapt(model, spec, TOKENS)
  variables = decoder_cases.random_variables(model)
  adapters = adapted.init(jax.random.key(0), variables)

  def total(adapters):
    return adapted.apply(variables, adapters, TOKENS).sum()

  shapes = [
    x.shape
    for x, source in ad_checkpoint.saved_residuals(total, adapters)
    if "dot_general" in source
  ]
  # In each layer x W of gate_proj and up_proj, and x A.
  assert shapes.count((TOKENS.size, 56)) == 2 * TINY.num_layers
  assert shapes.count((TOKENS.size, 2)) == TINY.num_layers


def test_scanned_layers_draw_their_own_dropout():
  model = decoder.Decoder(TINY, scan=True)
  spec = bilora_jax.LoraSpec(rank=2, targets=".*up_proj", dropout=0.5)
  adapted = bilora_jax.adapt(model, spec, TOKENS)
  variables = decoder_cases.random_variables(model)
  shapes = jax.eval_shape(adapted.init, jax.random.key(0), variables)
  adapters = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)

  def total(adapters):
    rngs = {"dropout": jax.random.key(0)}
    return adapted.apply(variables, adapters, TOKENS[:1, :1], rngs=rngs).sum()

  gradients = jax.jit(jax.grad(total))(adapters)
  pair = gradients["primary"]["layers"]["mlp"]["up_proj"]["kernel"]
  # Of the one token, a feature that is dropped gives its row no gradient.
  dropped = (np.asarray(pair.a) == 0).all(-1)
  assert dropped.shape == (2, TINY.hidden_size)
  assert dropped.any(1).all() and not dropped.all(1).any()
  assert (dropped[0] != dropped[1]).any()


# On a mesh.


def test_logical_axes_fit_every_parameter():
  config = dataclasses.replace(
    TINY, tied=False, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True
  )
  names = {"embed", "heads", "kv_heads", "mlp", "vocab"}
  for scan in (False, True):
    model = decoder.Decoder(config, scan=scan)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    axes = decoder.logical_axes(shapes)
    assert axes["params"] == decoder.logical_axes(shapes["params"])
    leaves = jax.tree.leaves(axes, is_leaf=lambda x: not isinstance(x, dict))
    for spec, leaf in zip(leaves, jax.tree.leaves(shapes), strict=True):
      assert len(spec) == leaf.ndim
      named = [name for name in spec if name is not None]
      assert set(named) <= names and len(set(named)) == len(named)
      # Only the norms, of which scanned layers have two, are left whole.
      assert named or leaf.size <= 2 * config.hidden_size


def test_a_mesh_gives_the_logits_of_one_device():
  config = dataclasses.replace(TINY, vocab_size=16, tied=False, qkv_bias=True)
  model = decoder.Decoder(config, scan=True)
  variables = decoder_cases.random_variables(model)
  want = _apply(model, variables, TOKENS, None, LENGTHS)
  mesh = jax.make_mesh((2, 4), ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)
  rules = (
    *((name, "x") for name in ("batch", "embed", "vocab")),
    *((name, "y") for name in ("heads", "kv_heads", "mlp")),
  )
  axes = decoder.logical_axes(variables)
  shardings = nn.logical_to_mesh_sharding(axes, mesh, rules)
  placed = jax.device_put(variables, shardings)
  query = placed["params"]["layers"]["self_attn"]["q_proj"]["kernel"]
  assert query.sharding.shard_shape(query.shape) == (2, 4, 4)
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  tokens, lengths = jax.device_put((TOKENS, LENGTHS), rows)
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    got = _apply(model, placed, tokens, None, lengths)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


# Errors.


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ((TOKENS[0],), r"tokens must be \(batch, length\), got \(6,\)"),
    ((TOKENS, TOKENS[:1]), r"positions must have the shape of tokens, \(2, 6"),
    ((TOKENS, None, LENGTHS[:1]), r"lengths must be .* of 2 rows.*\(1, 2\)"),
    ((np.ones((1, 17), int),), "at most 16 long.* got 17"),
  ],
)
def test_wrong_shapes_are_named(args, message):
  model = decoder.Decoder(TINY)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: model.init(jax.random.key(0), *args))


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"remat": "all"}, "remat must be one of none, .*offload, got 'all'"),
    ({"attention": "flash"}, "attention must be one of .* got 'flash'"),
  ],
)
def test_unknown_choices_are_named(kwargs, message):
  model = decoder.Decoder(TINY, **kwargs)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), TOKENS)


def test_layers_with_different_windows_are_not_scanned():
  config = dataclasses.replace(TINY, windows=(None, 3))
  model = decoder.Decoder(config, scan=True)
  with pytest.raises(ValueError, match="llama differ in their sliding windows"):
    jax.eval_shape(model.init, jax.random.key(0), TOKENS)
