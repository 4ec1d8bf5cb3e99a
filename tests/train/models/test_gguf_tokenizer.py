"""Tokenizers out of GGUF metadata: words, bytes, special tokens, errors.

What is rebuilt is a byte-level BPE trained here by `tokenizers`.
"""

import json
import pathlib
import unicodedata

import hypothesis
from hypothesis import strategies as st
import pytest
import smollm2_reference
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from train.models.io import gguf_file, gguf_tokenizer, weights

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NORMAL, IS_CONTROL, IS_USERS, IS_UNUSED = 1, 3, 4, 5


@pytest.fixture(scope="module")
def trained():
  """A byte-level BPE of GPT-2's words, after digits, as SmolLM2's is."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=CONTROL,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator([smollm2_reference.TEXT], trainer)
  return tokenizer


@pytest.fixture(scope="module")
def metadata(trained):
  """The trained tokenizer as llama.cpp's converter would write it."""
  tokens = [trained.id_to_token(i) for i in range(trained.get_vocab_size())]
  return {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": [*tokens, "<tool>", "[PAD401]"],
    "token_type": [
      *(IS_CONTROL if token in CONTROL else NORMAL for token in tokens),
      IS_USERS,
      IS_UNUSED,
    ],
    "merges": [
      " ".join(pair) for pair in json.loads(trained.to_str())["model"]["merges"]
    ],
    "bos_token_id": 1,
    "eos_token_id": 2,
  }


def _tokenizer(metadata, vocab_size=402, **changes):
  """Rebuilt from the metadata with some keys changed, or, None, left out."""
  keys = {
    f"tokenizer.ggml.{key}": value
    for key, value in (metadata | changes).items()
    if value is not None
  }
  model = gguf_file.GgufModel(
    path=pathlib.Path("model.gguf"),
    config={"vocab_size": vocab_size},
    tensors={},
    metadata=keys,
    bos_id=1,
    eos_id=2,
    pad_id=None,
    chat_template=None,
  )
  return gguf_tokenizer.tokenizer(model)


def _pieces(metadata, pre, text):
  """The words that a text is cut into, before bytes become letters."""
  cut = _tokenizer(metadata, pre=pre).pre_tokenizer.pre_tokenize_str(text)
  return [text[start:end] for _, (start, end) in cut]


@pytest.mark.parametrize(
  "text",
  [smollm2_reference.TEXT, "", " \n\n\ta  b ", "x²½٣ 12345", "日本 🤗\r\n"],
)
def test_ids_are_those_of_the_tokenizer_that_was_written(
  trained, metadata, text
):
  rebuilt = _tokenizer(metadata)
  assert rebuilt.encode(text).ids == trained.encode(text).ids
  assert rebuilt.truncation is None and rebuilt.padding is None


@hypothesis.given(text=st.text(max_size=40))
@hypothesis.settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2"])
def test_a_text_comes_back_from_its_ids(metadata, pre, text):
  rebuilt = _tokenizer(metadata, pre=pre, add_bos_token=False)
  if pre == "qwen2":  # it normalises, as published
    text = unicodedata.normalize("NFC", text)
  assert rebuilt.decode(rebuilt.encode(text).ids) == text


@pytest.mark.parametrize(
  ("text", "smollm", "llama", "qwen"),
  [
    # Digits: each alone; at most three together; each alone.
    (
      "in 12345",
      ["in", " ", "1", "2", "3", "4", "5"],
      ["in", " ", "123", "45"],
      ["in", " ", "1", "2", "3", "4", "5"],
    ),
    # Contractions in capitals.
    ("WE'LL", ["WE", "'", "LL"], ["WE", "'LL"], ["WE", "'LL"]),
    ("we'll", ["we", "'ll"], ["we", "'ll"], ["we", "'ll"]),
    # A sign before a word; line ends after signs.
    ("(a b", ["(", "a", " b"], ["(a", " b"], ["(a", " b"]),
    ("a!\n\nb", ["a", "!", "\n", "\n", "b"], *[["a", "!\n\n", "b"]] * 2),
    # The last space goes with the word.
    ("a   b", *[["a", "  ", " b"]] * 3),
    ("a \n b", ["a", " \n", " b"], *[["a", " \n", " b"]] * 2),
  ],
)
def test_words_are_cut_by_the_published_rules(
  metadata, text, smollm, llama, qwen
):
  assert _pieces(metadata, "smollm", text) == smollm
  assert _pieces(metadata, "llama-bpe", text) == llama
  assert _pieces(metadata, "qwen2", text) == qwen


def test_qwen2_alone_joins_accents_to_their_letters(metadata):
  joined, apart = "caf\u00e9", "cafe\u0301"
  for pre, same in (("smollm", False), ("llama-bpe", False), ("qwen2", True)):
    rebuilt = _tokenizer(metadata, pre=pre)
    assert (rebuilt.encode(joined).ids == rebuilt.encode(apart).ids) == same


def test_llama3_takes_a_word_that_is_a_token_without_merges(metadata):
  changes = {"merges": [], "add_bos_token": False}
  word = next(
    token
    for token in metadata["tokens"]
    if token.isascii() and token.isalpha() and len(token) > 2
  )
  whole = _tokenizer(metadata, pre="llama-bpe", **changes).encode(word)
  assert whole.tokens == [word]
  apart = _tokenizer(metadata, pre="qwen2", **changes).encode(word)
  assert apart.tokens == list(word)


def test_control_tokens_are_one_token_anywhere_and_not_decoded(metadata):
  rebuilt = _tokenizer(metadata)
  text = "a<|im_start|>user\nhi<|im_end|><|endoftext|>b"
  ids = rebuilt.encode(text).ids
  for token in CONTROL:
    assert ids.count(metadata["tokens"].index(token)) == 1
  assert rebuilt.decode(ids) == "auser\nhib"
  assert rebuilt.decode(ids, skip_special_tokens=False) == text


def test_user_defined_tokens_are_one_token_and_decoded(metadata):
  rebuilt = _tokenizer(metadata)
  ids = rebuilt.encode("x<tool>y").ids
  assert len(ids) == 3 and ids[1] == metadata["tokens"].index("<tool>")
  assert rebuilt.decode(ids) == "x<tool>y"


def test_unused_tokens_are_not_in_the_vocabulary(metadata):
  rebuilt = _tokenizer(metadata)
  assert rebuilt.token_to_id("[PAD401]") is None
  assert rebuilt.decode(rebuilt.encode("[PAD401]").ids) == "[PAD401]"


@pytest.mark.parametrize(
  ("pre", "bos", "eos", "expected"),
  [
    ("smollm", None, None, "a"),
    ("smollm", False, False, "a"),
    ("smollm", True, None, "1a"),
    ("smollm", True, True, "1a2"),
    ("qwen2", None, True, "a2"),
    ("llama-bpe", None, None, "1a"),
    ("llama-bpe", False, None, "a"),
  ],
)
def test_a_text_begins_and_ends_as_the_file_says(
  metadata, pre, bos, eos, expected
):
  rebuilt = _tokenizer(metadata, pre=pre, add_bos_token=bos, add_eos_token=eos)
  ends = {"1": 1, "2": 2, "a": rebuilt.token_to_id("a")}
  one = [ends[part] for part in expected]
  assert rebuilt.encode("a").ids == one
  pair = rebuilt.encode("a", "a")
  assert pair.ids == one * 2
  if len(one) > 1:
    assert pair.type_ids == [0] * len(one) + [1] * len(one)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model": "llama"}, "must be 'gpt2', byte-level BPE, got 'llama'"),
    ({"model": None}, "got None"),
    ({"pre": "gemma4"}, "one of smollm, llama-bpe, qwen2, got 'gemma4'"),
    (
      {"pre": None, "merges": None},
      r"lacks tokenizer\.ggml\.pre, tokenizer\.ggml\.merges",
    ),
    ({"token_type": [NORMAL]}, "402 tokens, 1 types"),
    ({"vocab_size": 401}, "402 tokens, 402 types .* and 401 embeddings"),
    ({"merges": ["a b c"]}, "not a BPE tokenizer"),
    ({"merges": ["a no-such-token"]}, "not a BPE tokenizer"),
    ({"add_bos_token": True, "bos_token_id": 402}, "bos_token_id .* got 402"),
    ({"add_eos_token": True, "eos_token_id": None}, "eos_token_id .* got None"),
  ],
)
def test_a_tokenizer_of_another_kind_or_broken_is_named(
  metadata, changes, message
):
  with pytest.raises(weights.WeightsError, match=rf"^model\.gguf: .*{message}"):
    _tokenizer(metadata, **changes)
