"""T5 against PyTorch's, on random small configurations; needs PyTorch."""

import functools
import json

import jax
import make_t5_references as references
import numpy as np
import pytest
import sentencepiece
import torch

from train.data import movie_reviews, objectives
from train.models.io import spiece, tensors
from train.models.t5 import config as t5_config
from train.models.t5 import generate as t5_generate
from train.models.t5 import label_words as t5_label_words
from train.models.t5 import model as t5
from train.models.t5 import weights as t5_weights

# Of each: width, width of a head, heads, inner width, layers of the encoder and
# of the decoder, buckets, and the distance from which on all share one.
_DRAWN = (
  (16, 6, 3, 20, 1, 2, 32, 128),
  (24, 8, 2, 30, 3, 1, 8, 20),
  (12, 12, 1, 40, 2, 2, 12, 9),
)
_KEYS = (
  "d_model",
  "d_kv",
  "num_heads",
  "d_ff",
  "num_layers",
  "num_decoder_layers",
  "relative_attention_num_buckets",
  "relative_attention_max_distance",
)
_RELEASES = (
  {"feed_forward_proj": "relu", "tie_word_embeddings": True},
  {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
)
# Logits of order 1; float32 sums in another order.
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


@pytest.fixture(
  scope="module",
  params=[(i, release) for i in range(len(_DRAWN)) for release in (0, 1)],
  ids=lambda x: f"{x[0]}-v1.{x[1]}",
)
def case(request, tmp_path_factory):
  """PyTorch's model, the folder it is saved in, and ours from there."""
  number, release = request.param
  changes = {**dict(zip(_KEYS, _DRAWN[number])), **_RELEASES[release]}
  theirs = references.model(number, **changes)
  folder = tmp_path_factory.mktemp("t5")
  references.save(theirs, folder, **changes)
  config = t5_config.T5Config.from_hf(
    json.loads((folder / "config.json").read_text())
  )
  scan = bool(number % 2)
  params = t5_weights.params(
    config, tensors.open_safetensors(folder), scan=scan
  )
  return theirs, t5.T5(config, scan=scan), {"params": params}


def _rows(seed=0):
  """Sources (3, 150) with their mask, and targets (3, 20)."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(2, 41, (3, 150)).astype(np.int32)
  lengths = np.array([150, 1, 23])
  mask = (np.arange(150) < lengths[:, None]).astype(np.int32)
  return tokens * mask, mask, rng.integers(2, 41, (3, 20)).astype(np.int32)


def _torch(x):
  return torch.tensor(np.asarray(x), dtype=torch.long)


def test_logits(case):
  theirs, model, variables = case
  tokens, mask, targets = _rows()
  with torch.no_grad():
    want = theirs(
      input_ids=_torch(tokens),
      attention_mask=_torch(mask),
      labels=_torch(targets),
    ).logits.numpy()
  close(jax.jit(model.apply)(variables, tokens, mask, targets), want)


def test_greedy_answers(case):
  theirs, model, variables = case
  tokens, mask, _ = _rows(1)
  apply = functools.partial(model.apply, variables)
  count = references.NEW_TOKENS
  got = np.asarray(t5_generate.greedy(model, apply, tokens, mask, count))
  for row, length, answer in zip(tokens, mask.sum(1), got):
    want = references.greedy(theirs, row[:length])
    np.testing.assert_array_equal(answer[: len(want)], want)
    assert (answer[len(want) :] == model.config.eos_id).all()


def test_the_loss_on_words_and_the_likeliest_of_them(case):
  theirs, model, variables = case
  tokens, mask, _ = _rows(2)
  words = ((5, 9, 30, 1), (12, 1), (5, 9, 1))
  labels = np.array([2, 0, 1], np.int32)
  # As a T5 is trained: padding of the labels' words has no part in the loss.
  padded = np.full((3, 4), -100)
  for row, word in zip(padded, words):
    row[: len(word)] = word
  with torch.no_grad():
    want = theirs(
      input_ids=_torch(tokens),
      attention_mask=_torch(mask),
      labels=_torch(padded[labels]),
    ).loss.item()
    scores = np.zeros((3, 3))
    for i in range(3):
      for j, word in enumerate(words):
        source = _torch(tokens[i, : mask[i].sum()])[None]
        loss = theirs(input_ids=source, labels=_torch(word)[None]).loss
        scores[i, j] = -loss.item() * len(word)
  ours = t5_label_words.T5LabelWords(model.config, scan=model.scan, words=words)
  objective = objectives.words(words)
  batch = {
    "tokens": tokens,
    "mask": mask,
    "token_types": np.zeros_like(tokens),
    "labels": labels,
  }
  told = jax.jit(ours.apply)(variables, *objective.inputs(batch))
  items = objective.items(told, batch)
  close((items.losses * items.weights).sum() / items.weights.sum(), want)
  np.testing.assert_array_equal(items.predictions, scores.argmax(1))
  right = scores[np.arange(3), labels]
  close(-items.losses * items.weights, right)


@pytest.mark.parametrize(
  ("count", "farthest"), [(32, 128), (32, 100), (64, 256), (8, 20), (16, 127)]
)
def test_buckets(count, farthest):
  config = t5_config.T5Config(
    *(9, 8, 1, 1, 1, 8, 8), num_buckets=count, max_distance=farthest
  )
  reach = references.REACH
  for both_ways in (True, False):
    want = references.buckets(count, farthest, both_ways)
    table = t5.buckets(config, both_ways)
    got = table[np.minimum(np.arange(reach + 1), farthest)]
    np.testing.assert_array_equal(got[::-1], want[: reach + 1])


def test_a_spiece_model_gives_the_tokens_that_sentencepiece_gives(tmp_path):
  texts = [row.sentence for row in movie_reviews.read()[::20]]
  (tmp_path / "texts").write_text("\n".join(texts))
  sentencepiece.SentencePieceTrainer.train(
    input=str(tmp_path / "texts"),
    model_prefix=str(tmp_path / "spiece"),
    vocab_size=500,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  theirs = sentencepiece.SentencePieceProcessor(
    model_file=str(tmp_path / spiece.FILE)
  )
  ours = spiece.load_tokenizer(tmp_path)
  assert ours.get_vocab_size() == 600
  assert ours.token_to_id("<extra_id_0>") == 599
  texts += [
    "",
    "  two  spaces ",
    "a\nb\tc",
    "\ufb01 \uff21 \u00bd",
    "\u65e5",
    "\u00a0x",
  ]
  same = [ours.encode(text).ids == [*theirs.encode(text), 1] for text in texts]
  # Of two ways to cut "....." with one score, either may come.
  assert np.mean(same) > 0.99
  assert all(same[-6:])
  assert ours.encode("a", "b").tokens[-1] == "</s>"
  assert ours.decode(theirs.encode("a good film")) == "a good film"


def test_a_spiece_model_that_cannot_be_read_is_named(tmp_path):
  (tmp_path / spiece.FILE).write_bytes(b"\xff\xff\xff")
  with pytest.raises(ValueError, match="not a SentencePiece model that can be"):
    spiece.load_tokenizer(tmp_path)
