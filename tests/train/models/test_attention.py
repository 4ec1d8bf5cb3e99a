"""Attention: every kernel against float64, and its program for a GPU."""

import functools
import re

import devices
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.data.objectives import NEXT_TOKEN
from train.devices import mesh as mesh_lib
from train.models import attention
from train.models.bert import model as bert
from train.models.decoder import config as decoder_config
from train.models.decoder import model as decoder
from train.run import assemble, lowering, step
from train.run import config as config_lib

HEADS, GROUPS, SIZE, LENGTH = 4, 2, 16, 21
# Rows of three segments, of two with padding after them, and of all padding
# but a token.
LENGTHS = np.array([[4, 10, 7], [9, 6, 0], [1, 0, 0]], np.int32)
ROWS = len(LENGTHS)
_STEP_LENGTH = 136  # nothing else of a step is
REAL = np.arange(LENGTH) < LENGTHS.sum(1, keepdims=True)


def _reference(q, k, v, lengths, causal=True, window=LENGTH):
  """A segment, a head and a query at a time, in float64."""
  y = np.zeros(q.shape)
  for row, head in np.ndindex(len(q), q.shape[2]):
    group = head * k.shape[2] // q.shape[2]
    stop = 0
    for count in lengths[row]:
      start, stop = stop, stop + count
      for i in range(start, stop):
        first = max(start, i + 1 - window) if causal else start
        to = slice(first, i + 1 if causal else stop)
        scores = k[row, to, group] @ q[row, i, head] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        y[row, i, head] = weights @ v[row, to, group] / weights.sum()
  return y


def _arrays(count, dtype=np.float64):
  random = np.random.default_rng(0)
  return [
    np.asarray(random.standard_normal((ROWS, LENGTH, heads, SIZE)), dtype)
    for heads in (HEADS, GROUPS, GROUPS, HEADS)[:count]
  ]


def _passes(seen, q, k, v, weights, real):
  """The output, and gradients of its weighted sum over real tokens."""
  real = real[..., None, None]

  def total(q, k, v):
    y = attention.attention(q, k, v, seen)
    return jnp.where(real, y * weights, 0.0).sum(), y

  found = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
  return found[0][1], found[1]


def _check_parity(seen, lengths, causal, window=LENGTH):
  q, k, v, weights = _arrays(4)
  real = np.arange(LENGTH) < lengths.sum(1, keepdims=True)
  single = [x.astype(np.float32) for x in (q, k, v, weights)]
  y, gradients = jax.jit(_passes)(seen, *single, real)
  want = _reference(q, k, v, lengths, causal, window)
  np.testing.assert_allclose(y[real], want[real], rtol=0, atol=1e-5)
  assert np.isfinite(y).all()
  # Along a line through the inputs, as the sum's central difference has it.
  random = np.random.default_rng(1)
  lines = [random.standard_normal(x.shape) for x in (q, k, v)]

  def total(distance):
    moved = [x + distance * u for x, u in zip((q, k, v), lines)]
    return (_reference(*moved, lengths, causal, window) * weights).sum()

  slope = (total(1e-5) - total(-1e-5)) / 2e-5
  found = sum(np.sum(g * u) for g, u in zip(gradients, lines, strict=True))
  np.testing.assert_allclose(found, slope, rtol=1e-4)


@pytest.fixture
def interpreted(monkeypatch):
  """Splash attention without a TPU."""
  make = attention.splash.make_splash_mha
  monkeypatch.setattr(
    attention.splash,
    "make_splash_mha",
    functools.partial(make, interpret=True),
  )


@pytest.mark.parametrize("kernel", ["matmul", "xla", "splash"])
def test_packed_rows_see_their_segment_s_past(kernel, interpreted):
  seen = attention.causal(kernel, LENGTH, LENGTHS)
  _check_parity(seen, LENGTHS, causal=True)


@pytest.mark.parametrize("kernel", ["matmul", "xla", "splash"])
def test_a_window_ends_before_the_segment_does(kernel, interpreted):
  seen = attention.causal(kernel, LENGTH, LENGTHS, window=4)
  _check_parity(seen, LENGTHS, causal=True, window=4)


@pytest.mark.parametrize("window", [None, 140])
def test_devices_that_share_rows_see_what_one_does(window, interpreted):
  """Splash attention, of blocks, on the parts of rows."""
  length, mesh = 256, devices.mesh(rows=2, context=2)
  lengths = np.array([[150, 70], [256, 0]])
  real = np.arange(length) < lengths.sum(1, keepdims=True)
  random = np.random.default_rng(0)
  arrays = [
    random.standard_normal((2, length, heads, 8), np.float32)
    for heads in (2, 1, 1, 2)
  ]

  def passes(kernel):
    seen = attention.causal(kernel, length, lengths, window)
    return _passes(seen, *arrays, real)

  want = jax.jit(passes, static_argnums=0)("matmul")
  rules = (("batch", "rows"), ("length", "context"))
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    found = jax.jit(passes, static_argnums=0)("splash")
    assert attention.causal("splash", length).parts == 2
    # A part of 125 tokens is of no whole blocks.
    assert attention.causal("splash", 250).kernel == "xla"
    assert attention.causal("cudnn", 250).kernel == "xla"
    assert attention.causal("cudnn", 252).mask is not None
  np.testing.assert_allclose(found[0][real], want[0][real], rtol=0, atol=1e-5)
  for ours, theirs in zip(found[1], want[1], strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kernel", ["matmul", "cudnn", "splash"])
def test_a_window_as_long_as_the_row_changes_nothing(kernel):
  plain = attention.causal(kernel, LENGTH)
  wide = attention.causal(kernel, LENGTH, window=LENGTH)
  narrow = attention.causal(kernel, LENGTH, window=LENGTH - 1)
  assert wide.window is None
  if kernel == "matmul":
    np.testing.assert_array_equal(wide.mask, plain.mask)
    hidden = np.asarray(plain.mask) & ~np.asarray(narrow.mask)
    assert np.argwhere(hidden[0]).tolist() == [[LENGTH - 1, 0]]
  else:
    assert wide == plain
    assert narrow.window == LENGTH - 1


@pytest.mark.parametrize("kernel", ["matmul", "xla", "splash"])
def test_encoders_see_all_real_tokens(kernel, interpreted):
  seen = attention.real(kernel, REAL)
  _check_parity(seen, LENGTHS.sum(1, keepdims=True), causal=False)


@pytest.mark.parametrize("kernel", ["matmul", "xla", "cudnn", "splash"])
def test_rows_of_one_segment_need_nothing_but_the_causal_mask(kernel):
  plain = attention.causal(kernel, LENGTH)
  padded = attention.causal(kernel, LENGTH, LENGTHS.sum(1, keepdims=True))
  for seen in (plain, padded):
    assert seen.lengths is None
    assert seen.segment_ids is None
    if kernel in ("matmul", "xla"):
      np.testing.assert_array_equal(seen.mask, np.tri(LENGTH)[None])
    else:
      assert seen.causal
      assert seen.mask is None


def test_segments_have_ids_and_positions():
  np.testing.assert_array_equal(
    attention.ids(np.array([[2, 1, 0], [1, 1, 2]]), 4),
    [[1, 1, 2, 0], [1, 2, 3, 3]],
  )
  lengths = np.array([[2, 3, 0], [1, 1, 2]])
  found = attention.positions(lengths, (2, 6))
  np.testing.assert_array_equal(found, [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1]])
  for alone in (None, np.array([[4], [2]])):
    found = attention.positions(alone, (2, 6))
    np.testing.assert_array_equal(found, [np.arange(6)] * 2)


# The choice.


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is of the CPU")
def test_on_cpu_products_are_batched(monkeypatch):
  assert attention.chosen("auto", jnp.bfloat16, 64, 1024) == "matmul"
  assert attention.chosen("xla", jnp.bfloat16, 64, 1024) == "xla"
  # As on a GPU that is not NVIDIA's.
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert attention.chosen("auto", jnp.bfloat16, 64, 1024) == "xla"


@pytest.mark.parametrize(
  ("backend", "dtype", "size", "length", "kernel"),
  [
    ("gpu", "bfloat16", 64, 128, "cudnn"),
    ("gpu", "float16", 256, 128, "cudnn"),
    ("gpu", "float32", 64, 128, "xla"),
    ("gpu", "bfloat16", 36, 128, "xla"),
    ("gpu", "bfloat16", 264, 128, "xla"),
    ("gpu", "bfloat16", 64, 127, "xla"),
    ("tpu", "float32", 64, 512, "splash"),
    ("tpu", "float32", 64, 511, "xla"),
  ],
)
def test_the_choice_goes_by_backend_dtype_width_and_length(
  hopper, monkeypatch, backend, dtype, size, length, kernel
):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(attention, "_is_cuda", lambda: True)
  assert attention.chosen("auto", dtype, size, length) == kernel


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("flash", "float32", 64, 8), "must be one of auto, .* got 'flash'"),
    (("cudnn", "float32", 64, 8), "takes bfloat16 or float16, got float32"),
    (("cudnn", "bfloat16", 36, 8), "multiple of 8 and at most 128, got 36"),
    (("cudnn", "bfloat16", 256, 8), "multiple of 8 and at most 128, got 256"),
  ],
)
def test_what_cannot_be_chosen_is_told_in_a_sentence(arguments, message):
  with pytest.raises(ValueError, match=message):
    attention.chosen(*arguments)


# cuDNN, whose calls can be looked at where it is not.


@pytest.fixture
def hopper(monkeypatch):
  """What jax asks of a GPU and its library before it makes a call of cuDNN."""
  asked = {
    "check_cudnn_version": lambda: 91000,
    "check_compute_capability": lambda capability: True,
    "is_cuda_compute_capability_equal": lambda capability: False,
  }
  for name, answer in asked.items():
    monkeypatch.setattr(attention.cudnn, name, answer)


def _ragged(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, **more):
  """What jax's docstring says of offsets and lengths, segment by segment."""
  assert more["scale"] == SIZE**-0.5
  assert more["mask_type"] == attention.cudnn.MaskType.PADDING_CAUSAL
  y = np.full(q.shape, np.nan)  # what no segment holds is never written
  for row, i in np.ndindex(q_seqlen.shape):
    assert q_seqlen[row, i] == kv_seqlen[row, i]
    assert q_offsets[row, i] == kv_offsets[row, i]
    if q_seqlen[row, i] < 0:
      assert q_offsets[row, i] < 0
      continue
    start = q_offsets[row, i]
    at = slice(row, row + 1), slice(start, start + q_seqlen[row, i])
    one = np.array([[q_seqlen[row, i]]])
    y[at] = _reference(*(np.asarray(x[at]) for x in (q, k, v)), one)
  assert q_offsets.shape[1] == q_seqlen.shape[1] + 1
  return y


def test_cudnn_is_told_where_segments_are(hopper, monkeypatch):
  monkeypatch.setattr(attention.cudnn, "dot_product_attention", _ragged)
  q, k, v = _arrays(3)
  seen = attention.causal("cudnn", LENGTH, LENGTHS)
  found = attention.attention(q, k, v, seen)
  assert np.isfinite(found).all()  # padding is written too
  want = _reference(q, k, v, LENGTHS)
  np.testing.assert_allclose(found[REAL], want[REAL], rtol=0, atol=1e-6)


def _for_cuda(function, *arguments):
  """Calls of cuDNN, and the shapes with the length twice, of its program."""
  traced = function.trace(*arguments)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  calls = set(re.findall(r"custom_call @__cudnn\$(\w+)", text))
  shapes = set(re.findall(r"tensor<([\dx]+)x", text))
  return calls, {x for x in shapes if x.split("x").count(str(_STEP_LENGTH)) > 1}


@pytest.mark.parametrize("segments", [1, 5])
def test_a_step_for_cuda_calls_cudnn_and_keeps_no_square(hopper, segments):
  sizes = decoder_config.DecoderConfig(
    vocab_size=48,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=40,
    max_positions=_STEP_LENGTH,
  )
  model = decoder.Decoder(
    sizes, "bfloat16", remat="full", scan=True, attention="cudnn"
  )
  batch = lowering.next_token_batch(2, _STEP_LENGTH)
  batch["lengths"] = jax.ShapeDtypeStruct((2, segments), jnp.int32)
  inputs = NEXT_TOKEN.inputs(batch)
  config = config_lib.build({"method": "bilora", "targets": ".*_proj"})
  method = assemble.method_of(config, model, inputs, 10, NEXT_TOKEN)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  variables, state = lowering.abstract(
    config, method, mesh_lib.Layout(), shapes, decoder.logical_axes(shapes)
  )
  calls, square = _for_cuda(
    step.make_train_step(method, NEXT_TOKEN), variables, state, batch
  )
  assert calls == {"fmhaSoftmax", "fmhaSoftmaxBackward"}
  assert not square


def test_an_encoder_for_cuda_calls_cudnn_and_keeps_no_square(
  hopper, monkeypatch
):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(attention, "_is_cuda", lambda: True)
  sizes = bert.BertConfig(
    vocab_size=48,
    hidden_size=32,
    num_layers=1,
    num_heads=4,
    intermediate_size=40,
  )
  model = bert.BertClassifier(sizes, num_classes=2, dtype=jnp.bfloat16)
  tokens = jax.ShapeDtypeStruct((2, _STEP_LENGTH), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
  calls, square = _for_cuda(jax.jit(model.apply), variables, tokens, tokens)
  assert calls == {"fmhaSoftmax"}
  assert not square


@pytest.mark.parametrize(
  ("kernel", "is_hopper", "calls"),
  [
    ("cudnn", False, {"fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"}),
    ("xla", True, set()),
  ],
)
def test_before_hopper_and_without_kernels_packed_rows_have_a_mask(
  hopper, monkeypatch, kernel, is_hopper, calls
):
  monkeypatch.setattr(attention, "_is_hopper", lambda: is_hopper)
  q, k = (
    jax.ShapeDtypeStruct((2, _STEP_LENGTH, heads, 8), jnp.bfloat16)
    for heads in (HEADS, GROUPS)
  )

  def total(q, k, v, lengths):
    seen = attention.causal(kernel, _STEP_LENGTH, lengths)
    return attention.attention(q, k, v, seen).astype(jnp.float32).sum()

  found, square = _for_cuda(
    jax.jit(jax.grad(total, (0, 1, 2))),
    *(q, k, k, jax.ShapeDtypeStruct((2, 5), jnp.int32)),
  )
  assert found == calls
  assert square


def test_cudnn_takes_no_mask_of_an_odd_length(monkeypatch):
  monkeypatch.setattr(attention, "_is_hopper", lambda: False)
  assert attention.causal("cudnn", 21, LENGTHS).kernel == "xla"
  assert attention.causal("cudnn", 22, LENGTHS).kernel == "cudnn"


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("case", ["causal", "packed", "real"])
def test_cudnn_agrees_with_float64(case):
  lengths = LENGTHS if case == "packed" else LENGTHS.sum(1, keepdims=True)
  q, k, v, weights = (np.asarray(x, jnp.bfloat16) for x in _arrays(4))
  if case == "real":
    seen = attention.real("cudnn", REAL)
  else:
    seen = attention.causal("cudnn", LENGTH, lengths)
  y, gradients = jax.jit(_passes)(seen, q, k, v, weights, REAL)
  wide = [np.float32(x) for x in (q, k, v, weights)]
  want = _reference(*wide[:3], lengths, causal=case != "real")
  # bfloat16 keeps 8 bits of a value of order 1.
  np.testing.assert_allclose(
    np.float32(y)[REAL], want[REAL], rtol=0, atol=2**-8
  )
  matmul = attention.causal("matmul", LENGTH, lengths)
  if case == "real":
    matmul = attention.real("matmul", REAL)
  with jax.default_matmul_precision("highest"):
    _, exact = jax.jit(_passes)(matmul, *wide, REAL)
  for x, want in zip(gradients, exact, strict=True):
    error = np.abs(np.float32(x) - want).max() / np.abs(want).max()
    assert error < 2e-2
