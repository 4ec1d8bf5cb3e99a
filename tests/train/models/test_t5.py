"""T5: parity with PyTorch, answers in one row, and its variants' agreement."""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import t5_cases

import bilora_jax
from train.models.t5 import generate as t5_generate
from train.models.t5 import label_words as t5_label_words
from train.models.t5 import model as t5
from train.models.t5 import weights as t5_weights

TINY = t5_cases.TINY
TOKENS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
TARGETS = np.array([[2, 7, 1, 8], [3, 1, 4, 1]])


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def _apply(model, *args, method=None):
  """One compiled program for all calls of one kind."""
  return model.apply(*args, method=method)


@pytest.fixture(scope="module")
def variables():
  return t5_cases.random_variables(t5.T5(TINY))


@functools.cache
def _loaded(name, scan=False):
  config, tensors, rows, _ = t5_cases.load(name)
  params = t5_weights.params(config, tensors, scan=scan)
  return t5.T5(config, scan=scan), {"params": params}, rows


def test_buckets_are_those_of_pytorch():
  reach = 200
  of_keys = t5_cases.load("t5_v1_0").buckets
  config = dataclasses.replace(TINY, num_buckets=32, max_distance=128)
  for both_ways, want in zip((True, False), of_keys):
    table = t5.buckets(config, both_ways)
    behind = table[np.minimum(np.arange(reach + 1), 128)]
    np.testing.assert_array_equal(behind[::-1], want[: reach + 1])
    ahead = 16 + behind[1:] if both_ways else 0
    np.testing.assert_array_equal(want[reach + 1 :], ahead)


@pytest.mark.parametrize(
  ("name", "scan"), [("t5_v1_0", False), ("t5_v1_1", True), ("mt5", False)]
)
def test_padded_rows_agree_with_pytorch_one_by_one(name, scan):
  model, variables, rows = _loaded(name, scan)
  tokens, mask = t5_cases.padded([row.source for row in rows])
  targets, _ = t5_cases.padded([row.target for row in rows])
  got = _apply(model, variables, tokens, mask, targets)
  assert got.dtype == jnp.float32
  assert np.isfinite(got).all()
  for logits, row in zip(got, rows):
    # Logits reach 5; float32 sums in another order differ by about 2e-5.
    np.testing.assert_allclose(
      logits[: len(row.target)], row.logits, rtol=0, atol=1e-4
    )


def _greedy(model, variables, rows, count=12):
  # Padding in front is padding, too: only distances matter.
  tokens, mask = (x[:, ::-1] for x in t5_cases.padded([x[::-1] for x in rows]))
  apply = functools.partial(model.apply, variables)
  return np.asarray(t5_generate.greedy(model, apply, tokens, mask, count))


@pytest.mark.parametrize(
  ("name", "scan"), [("t5_v1_0", False), ("t5_v1_1", True), ("mt5", False)]
)
def test_greedy_answers_are_those_of_pytorch_and_stay_ended(name, scan):
  model, variables, rows = _loaded(name, scan)
  got = _greedy(model, variables, [row.source for row in rows])
  for row, answer in zip(rows, got):
    length = len(row.greedy)
    np.testing.assert_array_equal(answer[:length], row.greedy)
    assert (answer[length:] == model.config.eos_id).all()


@pytest.mark.parametrize(
  ("tokens", "mask", "count", "message"),
  [
    (TOKENS[0], MASK[0], 4, r"\(batch, length\), got \(6,\)"),
    (TOKENS, MASK[:, 1:], 4, r"the shape of tokens, \(2, 6\)"),
    (TOKENS, MASK - MASK[1:], 4, "row 1 is all padding"),
    (TOKENS, MASK, 0, "at least 1, got 0"),
  ],
)
def test_what_cannot_be_answered_is_refused(tokens, mask, count, message):
  with pytest.raises(ValueError, match=message):
    t5_generate.greedy(t5.T5(TINY), lambda *_: None, tokens, mask, count)


def test_answers_in_one_row_are_those_of_each_alone(variables):
  words = ((3, 4, 5, 1), (6, 1), (3, 4, 1))
  model = t5_label_words.T5LabelWords(TINY, words=words)
  got = _apply(model, variables, TOKENS, MASK, None)
  assert got.shape == (2, 9, TINY.vocab_size)
  # Padding at their end changes nothing before it.
  targets, real = t5_cases.padded([np.array(word) for word in words])
  want = _apply(
    t5.T5(TINY),
    variables,
    np.repeat(TOKENS, 3, 0),
    np.repeat(MASK, 3, 0),
    np.tile(targets, (2, 1)),
  ).reshape(2, 3, 4, -1)
  np.testing.assert_allclose(got, want[:, real > 0], rtol=0, atol=1e-5)


def test_a_source_is_read_once_whatever_the_number_of_words(variables):
  model = t5_label_words.T5LabelWords(TINY, words=((3, 1), (4, 1), (5, 6, 1)))
  rows = []

  def note(call, args, kwargs, context):
    stack, _, layer = "/".join(context.module.path).partition("/")
    if layer == "layers_0" and context.method_name == "__call__":
      rows.append((stack, len(args[0])))
    return call(*args, **kwargs)

  with nn.intercept_methods(note):
    jax.eval_shape(model.apply, variables, TOKENS, MASK)
  # Two sources of 6 tokens, and for each all 7 tokens of the words.
  assert rows == [("encoder", 12), ("decoder", 14)]


def test_bfloat16_is_what_is_computed_in_and_logits_are_float32():
  low = jnp.bfloat16
  model = t5.T5(TINY, dtype=low, param_dtype=low)
  inputs = (TOKENS, MASK, TARGETS)
  own = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {jnp.dtype(low)}
  encode = functools.partial(model.apply, method="encode")
  assert jax.eval_shape(encode, own, TOKENS, MASK).dtype == low
  assert jax.eval_shape(model.apply, own, *inputs).dtype == jnp.float32


# Adapters.


def _adapted(**kwargs):
  model = t5.T5(TINY, **kwargs)
  spec = bilora_jax.LoraSpec(rank=2, auxiliary_rank=2, exclude="lm_head")
  return bilora_jax.adapt(model, spec, TOKENS, MASK, TARGETS)


def _names(tied):
  """Of all linear weights but the head's, in each layer of each stack."""
  up = ("wi",) if tied else ("wi_0", "wi_1")
  own = [f"self_attention/{x}" for x in "qkvo"]
  own += [f"feed_forward/{x}" for x in (*up, "wo")]
  across = [f"cross_attention/{x}" for x in "qkvo"]
  return {"encoder": own, "decoder": [*own, *across]}


@pytest.mark.parametrize(("tied", "scan"), [(False, True), (True, False)])
def test_every_linear_layer_gets_adapters(tied, scan):
  feed_forward = "relu" if tied else "gated-gelu"
  config = dataclasses.replace(
    TINY, tied=tied, scaled=tied, feed_forward=feed_forward
  )
  spec = bilora_jax.LoraSpec(rank=2, exclude=None if tied else "lm_head")
  model = t5.T5(config, scan=scan)
  adapted = bilora_jax.adapt(model, spec, TOKENS, MASK, TARGETS)
  assert set(adapted.targets) == {
    f"{stack}/{layer}/{name}/kernel"
    for stack, names in _names(tied).items()
    for layer in (("layers",) if scan else _layers(config, stack))
    for name in names
  }


def _layers(config, stack):
  own = stack == "encoder"
  count = config.num_layers if own else config.num_decoder_layers
  return [f"layers_{i}" for i in range(count)]


def _loss_and_gradients(adapted, variables, adapters):
  def loss(adapters):
    logits = adapted.apply(variables, adapters, TOKENS, MASK, TARGETS)
    return (jax.nn.logsumexp(logits, -1) ** 2).mean()

  return jax.jit(jax.value_and_grad(loss))(adapters)


def test_scan_and_remat_change_neither_loss_nor_gradients(variables):
  adapted = _adapted()
  rng = np.random.default_rng(1)
  adapters = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype),
    jax.eval_shape(adapted.init, jax.random.key(0), variables),
  )
  want, gradients = _loss_and_gradients(adapted, variables, adapters)
  assert max(np.abs(x).max() for x in jax.tree.leaves(gradients)) > 0.1
  whole = {"params": t5_cases.stacked(variables["params"])}
  adapters, gradients = (
    {part: t5_cases.stacked(tree[part]) for part in tree}
    for tree in (adapters, gradients)
  )
  adapted = _adapted(scan=True, remat="dots")
  got, got_gradients = _loss_and_gradients(adapted, whole, adapters)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  close(got, want)
  jax.tree.map(close, got_gradients, gradients)


# On a mesh, and refusals.


@pytest.mark.parametrize("scan", [False, True])
def test_logical_axes_fit_every_parameter(scan):
  model = t5.T5(TINY, scan=scan)
  inputs = (TOKENS, MASK, TARGETS)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  axes = t5.logical_axes(shapes)
  found = set()
  for spec, leaf in zip(
    jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)),
    jax.tree.leaves(shapes),
  ):
    assert len(spec) == leaf.ndim
    found |= set(spec)
  assert found == {None, "embed", "heads", "mlp", "vocab"}


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ((TOKENS[0], MASK[0], TARGETS), r"\(batch, length\), got \(6,\)"),
    ((TOKENS, MASK[:1], TARGETS), r"the shape of tokens, \(2, 6\)"),
    ((TOKENS, MASK, TARGETS[:1]), "inputs must be .* of 2 rows"),
  ],
)
def test_wrong_shapes_are_named(args, message):
  model = t5.T5(TINY)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: model.init(jax.random.key(0), *args))
