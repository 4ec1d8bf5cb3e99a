"""Sizes of decoders: from config.json, published ones, and what is refused."""

import math

import jax
import jax.numpy as jnp
import pytest

from train.models.decoder import model as decoder
from train.models.decoder.config import PRESETS, DecoderConfig, RopeScaling

LLAMA = {
  "model_type": "llama",
  "vocab_size": 11,
  "hidden_size": 12,
  "num_hidden_layers": 2,
  "num_attention_heads": 6,
  "num_key_value_heads": 3,
  "intermediate_size": 20,
  "max_position_embeddings": 7,
  "rms_norm_eps": 1e-6,
  "rope_theta": 300.0,
  "hidden_act": "silu",
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}
EXPECTED = DecoderConfig(
  vocab_size=11,
  hidden_size=12,
  num_layers=2,
  num_heads=6,
  num_kv_heads=3,
  head_dim=2,
  intermediate_size=20,
  max_positions=7,
  rms_norm_eps=1e-6,
  rope_theta=300.0,
)
SCALED = RopeScaling(8.0, 1.0, 4.0, 64)


def _read(**changes):
  return DecoderConfig.from_hf({**LLAMA, **changes})


def test_hugging_faces_keys_are_read():
  assert _read() == EXPECTED
  assert _read(head_dim=4).head_dim == 4
  assert _read(num_key_value_heads=None).num_kv_heads == 6
  assert _read(tie_word_embeddings=True).tied
  assert not _read().qkv_bias
  assert _read(model_type="qwen2", use_sliding_window=False).qkv_bias


def test_rotary_parameters_of_both_generations_are_the_same():
  old = _read(rope_scaling=LLAMA3)
  new = {key: LLAMA[key] for key in LLAMA if key != "rope_theta"}
  new["rope_parameters"] = {**LLAMA3, "rope_theta": 300.0}
  assert old == DecoderConfig.from_hf(new)
  assert old.rope_scaling == SCALED and old.rope_theta == 300.0
  new["rope_parameters"] = {"rope_type": "default", "rope_theta": 300.0}
  assert DecoderConfig.from_hf(new) == EXPECTED
  # What transformers wrote before rope_type, and where nothing is said.
  assert _read(rope_scaling={**LLAMA3, "type": "llama3"}) == old
  del new["rope_parameters"]
  assert DecoderConfig.from_hf(new).rope_theta == 10000.0


@pytest.mark.parametrize(
  ("name", "count"),
  [
    ("llama2-7b", 6_738_415_616),
    ("llama3.1-8b", 8_030_261_248),
    ("qwen2.5-0.5b", 494_032_768),
    ("qwen2.5-7b", 7_615_616_512),
    ("qwen2.5-14b", 14_770_033_664),
    ("smollm2-135m", 134_515_008),
  ],
)
def test_presets_have_as_many_parameters_as_the_published_models(name, count):
  model = decoder.Decoder(PRESETS[name], scan=True)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "mistral"}, "one of llama, qwen2, got 'mistral'"),
    ({"model_type": None}, "one of llama, qwen2, got None"),
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu'.* got 'gelu'"),
    ({"attention_bias": True}, "attention_bias must be False.* got True"),
    ({"mlp_bias": True}, "mlp_bias must be False.* got True"),
    ({"use_sliding_window": True}, "use_sliding_window must be False"),
    (
      {"layer_types": ["full_attention", "sliding_attention"]},
      "layer_types must be a list, of 'full_attention' .*'sliding_attention'",
    ),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type must be.* got 'yarn'"),
    ({"rope_scaling": {"type": "linear"}}, "rope_type must be.* got 'linear'"),
    ({"rope_scaling": [8.0]}, r"must be an object or null, got \[8.0\]"),
    (
      {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
      "lack low_freq_factor, high_freq_factor, original_max",
    ),
    (
      {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
      "low_freq_factor .* must be below high_freq_factor, got 4.0 and 4.0",
    ),
    (
      {"rope_scaling": {**LLAMA3, "factor": "8"}},
      "factor of the rotary scaling must be a positive number, got '8'",
    ),
    (
      {"rope_parameters": {"partial_rotary_factor": 0.5}},
      "partial_rotary_factor must be 1.0",
    ),
    ({"rope_theta": 0}, "rope_theta must be a positive number, got 0"),
    ({"rms_norm_eps": None}, "rms_norm_eps must be a positive number"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer"),
    ({"hidden_size": "12"}, "hidden_size must be a positive integer"),
    ({"hidden_size": 13}, "multiple of num_attention_heads .*13 and 6"),
    ({"num_key_value_heads": 4}, "multiple of num_key_value_heads, got 6 and"),
    ({"head_dim": 3}, "head_dim must be even.* got 3"),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    _read(**changes)


def test_missing_keys_are_named_together():
  short = {
    key: LLAMA[key] for key in LLAMA if key not in ("vocab_size", "hidden_size")
  }
  with pytest.raises(ValueError, match=r"llama .* lacks vocab_size, hidden_"):
    DecoderConfig.from_hf(short)
