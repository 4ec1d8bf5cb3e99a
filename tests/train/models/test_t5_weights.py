"""A T5's configuration and weights: as published, as saved again, refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as st_numpy
import t5_cases

from train.models.io import weights
from train.models.t5 import config as t5_config
from train.models.t5 import model as t5
from train.models.t5 import weights as t5_weights

BASE = {
  "model_type": "t5",
  "vocab_size": 32128,
  "d_model": 768,
  "d_kv": 64,
  "d_ff": 3072,
  "num_layers": 12,
  "num_heads": 12,
}
# The second is v1.1 as transformers 5 writes it, whose head may be tied.
V1_1 = {**BASE, "feed_forward_proj": "gated-gelu"}


def test_what_is_not_said_is_as_in_the_first_release():
  config = t5_config.T5Config.from_hf(BASE)
  assert config.num_decoder_layers == 12
  assert (config.feed_forward, config.tied, config.scaled) == (
    "relu",
    True,
    True,
  )
  assert (config.num_buckets, config.max_distance) == (32, 128)
  assert (config.pad_id, config.eos_id) == (0, 1)


@pytest.mark.parametrize(
  "keys",
  [
    {"tie_word_embeddings": False},
    {"tie_word_embeddings": True, "scale_decoder_outputs": False},
  ],
)
def test_a_head_of_its_own_is_not_scaled(keys):
  config = t5_config.T5Config.from_hf({**V1_1, **keys})
  assert not config.scaled
  head = {"lm_head.weight": np.zeros((1, 1))}
  found, notes = t5_weights.with_own_head(config, head)
  assert not found.tied and not notes
  # The first release's is the embedding, even where it is saved twice.
  first = t5_config.T5Config.from_hf(BASE)
  same = {**head, "shared.weight": np.zeros((1, 1))}
  assert t5_weights.with_own_head(first, same) == (first, ())
  other = {**head, "shared.weight": np.ones((1, 1))}
  found, (note,) = t5_weights.with_own_head(first, other)
  assert not found.tied and found.scaled
  assert "lm_head.weight is not the embedding" in note


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "bert"}, "model_type must be one of t5, mt5, got 'bert'"),
    ({"d_kv": 0}, "d_kv must be a positive integer, got 0"),
    ({"num_heads": True}, "num_heads must be a positive integer, got True"),
    ({"layer_norm_epsilon": 0.0}, "must be a positive number, got 0.0"),
    ({"feed_forward_proj": "gated-silu"}, "relu, gated-gelu, got 'gated-silu'"),
    ({"relative_attention_num_buckets": 6}, "a multiple of 4, got 6"),
    ({"relative_attention_max_distance": 16}, "32 buckets, got 16"),
    ({"decoder_start_token_id": 5}, "must be pad_token_id.* got 5 and 0"),
    ({"eos_token_id": 32128}, r"eos_id must be an integer in \[0, 32128\)"),
    ({"is_encoder_decoder": False}, "must be true.* got False"),
  ],
)
def test_what_is_not_implemented_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    t5_config.T5Config.from_hf({**BASE, **changes})


def test_a_key_that_is_missing_is_named():
  with pytest.raises(ValueError, match="lacks d_kv, d_ff"):
    t5_config.T5Config.from_hf(
      {k: v for k, v in BASE.items() if k not in ("d_kv", "d_ff")}
    )


def _tensors(name, **changes):
  """All of a case, with some changed; None leaves one out."""
  found = dict(t5_cases.load(name).tensors)
  for key, value in changes.items():
    key = key.replace("__", ".")
    found.pop(key, None)
    if value is not None:
      found[key] = value
  return found


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", t5_cases.NAMES)
def test_parameters_are_those_that_the_model_makes(name, scan):
  config = t5_cases.load(name).config
  model = t5.T5(config, scan=scan)
  one = jnp.zeros((1, 1), int)
  shapes = jax.eval_shape(model.init, jax.random.key(0), one, one, one)
  got = t5_weights.params(config, _tensors(name), scan=scan)
  want = jax.tree.map(lambda x: (x.shape, x.dtype), shapes["params"])
  assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == want


def test_kernels_are_transposed_and_scanned_ones_stacked():
  plain = st_numpy.load_file(t5_cases.DATA / "t5_v1_1" / "model.safetensors")
  config = t5_cases.load("t5_v1_1").config
  found = t5_weights.params(config, _tensors("t5_v1_1"))
  key = "decoder.block.2.layer.1.EncDecAttention.o.weight"
  np.testing.assert_array_equal(
    found["decoder"]["layers_2"]["cross_attention"]["o"]["kernel"],
    plain[key].T,
  )
  scanned = t5_weights.params(config, _tensors("t5_v1_1"), scan=True)
  jax.tree.map(np.testing.assert_array_equal, t5_cases.stacked(found), scanned)


def test_one_table_may_go_by_several_names_and_old_leftovers_are_let_be():
  name = "t5_v1_0"
  config, tensors, _, _ = t5_cases.load(name)
  table = tensors["shared.weight"]
  leftover = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias"
  want = t5_weights.params(config, _tensors(name))
  for changes in (
    {
      "encoder.embed_tokens.weight": table,
      "decoder.embed_tokens.weight": table,
      "lm_head.weight": table,
      f"{leftover}.weight": np.zeros((8, 2)),
    },
    {"shared.weight": None, "encoder.embed_tokens.weight": table},
  ):
    got = t5_weights.params(config, _tensors(name, **changes))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("t5_v1_0", {"shared.weight": None}, "shared.weight is missing"),
    (
      "t5_v1_0",
      {"decoder.embed_tokens.weight": np.zeros((2, 2))},
      "decoder.embed_tokens.weight is not shared.weight",
    ),
    ("t5_v1_1", {"lm_head.weight": None}, "lm_head.weight is missing"),
    (
      "t5_v1_0",
      {"encoder.final_layer_norm.weight": np.ones(23)},
      r"encoder.final_layer_norm.weight has shape \(23,\), expected \(24,\)",
    ),
    (
      "t5_v1_0",
      {"encoder.block.2.layer.0.SelfAttention.q.weight": np.ones((2, 2))},
      "encoder.block.2.layer.0.SelfAttention.q.weight has no place in it",
    ),
  ],
)
def test_tensors_that_do_not_fit_are_named(name, changes, message):
  config = t5_cases.load(name).config
  with pytest.raises(weights.WeightsError, match=message):
    t5_weights.params(
      config, _tensors(name, **changes), place=lambda *_: pytest.fail()
    )


def test_a_configuration_of_another_depth_is_refused():
  config = t5_cases.load("t5_v1_1").config
  one = dataclasses.replace(config, num_decoder_layers=1)
  with pytest.raises(weights.WeightsError, match=r"decoder\.block\.1.*no plac"):
    t5_weights.params(one, _tensors("t5_v1_1"))


def test_config_files_of_the_references_say_what_they_are():
  for name, release in (("t5_v1_0", True), ("t5_v1_1", False)):
    text = (t5_cases.DATA / name / "config.json").read_text()
    config = t5_config.T5Config.from_hf(json.loads(text))
    assert config.tied is config.scaled is release


def test_an_mt5_is_never_scaled_whatever_its_file_says_of_its_head():
  # As published, as transformers 5 writes it, and silent.
  for said in (
    {"tie_word_embeddings": False},
    {"tie_word_embeddings": True},
    {},
  ):
    config = t5_config.T5Config.from_hf({**BASE, "model_type": "mt5", **said})
    assert not config.scaled
    head = {"lm_head.weight": np.zeros((1, 1))}
    assert not t5_weights.with_own_head(config, head)[0].tied
