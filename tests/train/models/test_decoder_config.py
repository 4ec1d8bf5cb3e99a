"""Sizes of decoders: from config.json, published ones, and what is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from train.models.decoder import model as decoder
from train.models.decoder.config import DecoderConfig
from train.models.decoder.rope import Linear, Llama3, Yarn
from train.models.decoder.sizes import PRESETS

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
SCALED = Llama3(8.0, 1.0, 4.0, 64)


def _read(**changes):
  return DecoderConfig.from_hf({**LLAMA, **changes})


def test_hugging_faces_keys_are_read():
  assert _read() == EXPECTED
  assert _read(head_dim=4).head_dim == 4
  assert _read(num_key_value_heads=None).num_kv_heads == 6
  assert _read(tie_word_embeddings=True).tied
  assert not _read().qkv_bias
  assert _read(model_type="qwen2", use_sliding_window=False).qkv_bias
  biased = _read(attention_bias=True, mlp_bias=True)
  assert biased.qkv_bias and biased.out_bias and biased.mlp_bias


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


def test_what_a_type_is_silent_about_is_as_transformers_has_it():
  theta = LLAMA["rope_theta"]
  silent = {key: LLAMA[key] for key in LLAMA if key != "rope_theta"}
  read = DecoderConfig.from_hf
  smollm3 = read({**silent, "model_type": "smollm3", "num_hidden_layers": 8})
  assert smollm3.tied and smollm3.rope_theta == 2e6
  assert smollm3.rotary == (True, True, True, False) * 2
  assert not smollm3.windows
  own = _read(model_type="smollm3", no_rope_layers=[0, 1], rope_theta=theta)
  assert own.rotary == (False, True) and own.rope_theta == theta
  assert read({**silent, "model_type": "qwen3"}).head_dim == 128
  assert read({**silent, "model_type": "mistral"}).rope_theta == 10000.0


def test_a_published_gemma_3_is_read_with_what_its_file_does_not_say():
  # As the one of 4B with images, whose file came before rope_parameters.
  scaling = {"factor": 8.0, "rope_type": "linear"}
  config = DecoderConfig.from_hf(
    {
      "model_type": "gemma3",
      "vision_config": {"model_type": "siglip_vision_model"},
      "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": scaling,
        "sliding_window": 1024,
      },
    }
  )
  assert config.vocab_size == 262208 and config.max_positions == 131072
  sizes = config.num_heads, config.num_kv_heads, config.head_dim
  assert sizes == (8, 4, 256)
  assert config.windows[:7] == (1024,) * 5 + (None, 1024)
  assert config.windows.count(None) == 5
  assert config.rope_theta == 1e6 and config.rope_scaling == Linear(8.0)
  assert config.local_rope_theta == 1e4
  assert config.tied and config.qk_norm and config.post_norms
  assert config.embed_scaled and config.norm_offset
  assert config.logit_softcap is None and config.query_scalar == 256


def test_a_published_gpt2_is_read_and_has_its_parameters():
  config = DecoderConfig.from_hf(
    {
      "model_type": "gpt2",
      "activation_function": "gelu_new",
      "n_ctx": 1024,
      "n_embd": 768,
      "n_head": 12,
      "n_layer": 12,
      "n_positions": 1024,
      "layer_norm_epsilon": 1e-05,
      "resid_pdrop": 0.1,
      "summary_type": "cls_index",
      "vocab_size": 50257,
    }
  )
  assert config.tied and config.learned_positions and not config.gated
  assert config == DecoderConfig.from_hf({"model_type": "gpt2"})
  shapes = jax.eval_shape(
    decoder.Decoder(config, scan=True).init,
    jax.random.key(0),
    jnp.zeros((1, 1), int),
  )
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
  assert count == 124_439_808


def test_published_qwens_with_images_are_those_without():
  # As Qwen2.5-VL-3B's file, which came before text_config; and as newer ones.
  sizes = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "max_window_layers": 70,
  }
  rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
  kind = {"model_type": "qwen2_5_vl", "tie_word_embeddings": True}
  text = {**sizes, "rope_scaling": rope, "model_type": "qwen2_5_vl_text"}
  flat = DecoderConfig.from_hf({**text, **kind, "vision_config": {}})
  assert flat == DecoderConfig.from_hf({**kind, "text_config": text})
  alone = DecoderConfig.from_hf(
    {**sizes, "model_type": "qwen2", "tie_word_embeddings": True}
  )
  assert dataclasses.replace(flat, model_type="qwen2") == alone
  assert flat.prefix == "model.language_model."


@pytest.mark.parametrize(
  ("changes", "windows"),
  [
    ({"model_type": "mistral", "sliding_window": 3}, (3, 3)),
    ({"model_type": "mistral", "sliding_window": None}, ()),
    # Qwen's folders have one that is not used.
    ({"model_type": "qwen3", "sliding_window": 3}, ()),
    (
      {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
      },
      (None, 3),
    ),
    (
      {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 3},
      (),
    ),
    (
      {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
      },
      (3, None),
    ),
    (
      {
        "model_type": "smollm3",
        "use_sliding_window": True,
        "sliding_window": 3,
        "no_rope_layer_interval": 2,
      },
      (None, 3),
    ),
    ({"model_type": "gemma"}, ()),
    ({"model_type": "gemma2", "sliding_window": 3}, (3, None)),
    ({"model_type": "gemma2"}, (4096, None)),
    (
      {
        "model_type": "gemma3_text",
        "sliding_window": 3,
        "sliding_window_pattern": 1,
      },
      (),
    ),
  ],
)
def test_windows_are_of_the_layers_that_transformers_gives_them(
  changes, windows
):
  assert _read(**changes).windows == windows


def test_every_kind_of_rotary_scaling_is_read():
  assert _read(rope_scaling={"type": "linear", "factor": 2}).rope_scaling == (
    Linear(2)
  )
  # It changes nothing up to max_position_embeddings, and more is refused.
  assert _read(rope_scaling={"type": "dynamic", "factor": 2}) == EXPECTED
  yarn = {"rope_type": "yarn", "original_max_position_embeddings": 7}
  amplitude = 0.1 * math.log(4) + 1
  assert _read(rope_scaling={**yarn, "factor": 4}).rope_scaling == (
    Yarn(4, 7, amplitude)
  )
  given = {**yarn, "factor": 4, "attention_factor": 0.5, "truncate": False}
  assert _read(rope_scaling=given).rope_scaling == Yarn(
    4, 7, 0.5, truncate=False
  )
  # DeepSeek's amplitude, and a factor that follows from the positions.
  deepseek = {**yarn, "mscale": 2, "mscale_all_dim": 1, "beta_fast": 16}
  found = _read(rope_scaling=deepseek, max_position_embeddings=28).rope_scaling
  assert found == Yarn(4, 7, (0.2 * math.log(4) + 1) / amplitude, beta_fast=16)


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
    ({"model_type": "bloom"}, "one of llama, mistral, .*, got 'bloom'"),
    ({"model_type": None}, "one of llama, .*, got None"),
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu'.* got 'gelu'"),
    ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
    ({"mlp_bias": "no"}, "mlp_bias must be true or false, got 'no'"),
    ({"layer_types": "full"}, "layer_types must be a list or null, got 'full'"),
    (
      {"layer_types": ["full_attention", "chunked_attention"]},
      "list of full_attention and sliding_attention.* got 'chunked_attention'",
    ),
    (
      {"layer_types": ["full_attention", "sliding_attention"]},
      "layer_types has 'sliding_attention', and .* llama has no sliding window",
    ),
    (
      {
        "model_type": "mistral",
        "sliding_window": 3,
        "layer_types": ["full_attention", "sliding_attention"],
      },
      "layer_types has 'full_attention', and every layer of a mistral",
    ),
    (
      {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["sliding_attention"],
      },
      "windows must have a value for each of the 2 layers, got 1",
    ),
    (
      {"model_type": "mistral", "sliding_window": 0},
      "sliding_window must be a positive integer, got 0",
    ),
    (
      {"model_type": "smollm3", "no_rope_layers": [1, 2]},
      r"no_rope_layers must be a list of 0 and 1, got \[1, 2\]",
    ),
    (
      {"model_type": "smollm3", "no_rope_layers": [1]},
      "no_rope_layers must have a value for each of the 2 layers, got 1",
    ),
    (
      {"model_type": "smollm3", "no_rope_layer_interval": 0},
      "no_rope_layer_interval must be a positive integer, got 0",
    ),
    (
      {
        "model_type": "mistral",
        "sliding_window": 3,
        "num_hidden_layers": 10**9,
      },
      "num_hidden_layers must be at most 10000, got 1000000000",
    ),
    (
      {"model_type": "gemma2", "num_hidden_layers": 10**9},
      "num_hidden_layers must be at most 10000, got 1000000000",
    ),
    (
      {"model_type": "gemma", "hidden_size": -5},
      "hidden_size must be a positive integer, got -5",
    ),
    (
      {"model_type": "gemma", "use_bidirectional_attention": True},
      "use_bidirectional_attention must be false",
    ),
    (
      {"model_type": "gemma", "hidden_act": "relu6"},
      "hidden_act must be one of .*, got 'relu6'",
    ),
    (
      {"model_type": "gemma2", "attn_logit_softcapping": 0},
      "attn_logit_softcapping must be a positive number, got 0",
    ),
    (
      {"model_type": "gemma2", "query_pre_attn_scalar": "256"},
      "query_pre_attn_scalar must be a positive number, got '256'",
    ),
    (
      {"model_type": "gemma3_text", "sliding_window_pattern": 0},
      "sliding_window_pattern must be a positive integer, got 0",
    ),
    (
      {"model_type": "gemma3_text", "rope_local_base_freq": -1},
      "rope_local_base_freq must be a positive number, got -1",
    ),
    (
      {
        "model_type": "gemma3_text",
        "rope_parameters": {"sliding_attention": {"rope_type": "linear"}},
      },
      "sliding_attention, must have the rope_type 'default', .* got 'linear'",
    ),
    (
      {"model_type": "gpt2", "n_embd": "768"},
      "n_embd must be a positive integer, got '768'",
    ),
    (
      {"model_type": "gpt2", "n_layer": 0},
      "n_layer must be a positive integer, got 0",
    ),
    (
      {"model_type": "gpt2", "n_inner": -1},
      "n_inner must be a positive integer, got -1",
    ),
    (
      {"model_type": "gpt2", "layer_norm_epsilon": None},
      "layer_norm_epsilon must be a positive number, got None",
    ),
    (
      {"model_type": "gpt2", "activation_function": "gelu_fast"},
      "activation_function must be one of",
    ),
    (
      {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
      "scale_attn_by_inverse_layer_idx must be false",
    ),
    (
      {"model_type": "qwen2_5_vl", "text_config": []},
      "text_config must be an object",
    ),
    (
      {"model_type": "gemma3", "text_config": 3},
      "text_config must be an object, got 3",
    ),
    (
      {"rope_scaling": {"rope_type": "longrope"}},
      "one of default, linear, dynamic, llama3, yarn, .* got 'longrope'",
    ),
    ({"rope_scaling": {"type": "linear"}}, "type 'linear' lack factor"),
    (
      {"rope_scaling": {"type": "dynamic", "factor": -1}},
      "factor of the rotary scaling must be a positive number, got -1",
    ),
    (
      {"rope_scaling": {"rope_type": "yarn", "factor": "4"}},
      "factor, mscale and .* must be numbers, got '4'",
    ),
    (
      {"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_slow": 64}},
      "beta_slow of the rotary scaling must be below beta_fast, got 64 and 32",
    ),
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
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
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
