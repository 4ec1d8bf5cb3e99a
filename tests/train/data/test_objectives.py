"""Objectives: a T5's words, of unequal lengths, and smoothed labels."""

import jax
import numpy as np
import optax
import pytest

from train.data import objectives

# Three labels of 1, 3 and 2 tokens, over a vocabulary of 6; 1 ends a word.
WORDS = ((1,), (4, 2, 1), (5, 1))
LABELS = np.array([1, 0, 2, 1], np.int32)


def _log_probs(logits):
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _by_hand(logits):
  """The log-probability of each label's word, (B, 3)."""
  tokens = np.concatenate(WORDS)
  found = np.take_along_axis(_log_probs(logits), tokens[None, :, None], 2)
  return np.stack(
    [part.sum((1, 2)) for part in np.split(found, (1, 4), axis=1)], 1
  )


def _items(logits, labels):
  """What the objective makes of what it reads from logits, (B, M, V)."""
  objective = objectives.words(WORDS)
  filler = np.zeros((len(labels), 1), np.int32)
  batch = {
    **dict.fromkeys(("tokens", "mask", "token_types"), filler),
    "labels": labels,
  }
  return objective.items(objective.inputs(batch)[-1](logits), batch)


def test_words_are_compared_by_their_whole_probability():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(4, 6, 6)).astype(np.float32)
  items = _items(logits, LABELS)
  scores = _by_hand(logits)
  np.testing.assert_array_equal(items.predictions, scores.argmax(1))
  np.testing.assert_array_equal(items.right, scores.argmax(1) == LABELS)
  # The loss of a batch is the mean over the right words' tokens.
  right = scores[np.arange(4), LABELS]
  np.testing.assert_allclose(
    (items.losses * items.weights).sum() / items.weights.sum(),
    -right.sum() / (3 + 1 + 2 + 3),
    rtol=1e-5,
  )
  np.testing.assert_array_equal(items.weights, [3, 1, 2, 3])
  np.testing.assert_array_equal(
    objectives.words(WORDS).weights({"labels": LABELS}), items.weights
  )


def test_a_long_word_that_is_sure_beats_a_short_one_that_is_not():
  logits = np.zeros((1, 6, 6), np.float32)
  # Each token of the long word has almost all of the probability.
  for place, token in zip((1, 2, 3), WORDS[1]):
    logits[0, place, token] = 9.0
  items = _items(logits, LABELS[:1])
  assert items.predictions.tolist() == [1]
  # And of words of nothing but chance, the shortest is the likeliest.
  items = _items(0 * logits, LABELS[:1])
  assert items.predictions.tolist() == [0]


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_smoothed_labels_are_those_of_optax(share):
  logits = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
  batch = {"labels": LABELS}
  plain = objectives.CLASSIFICATION.items(logits, batch)
  items = objectives.smoothed(objectives.CLASSIFICATION, share).items(
    logits, batch
  )
  labels = optax.smooth_labels(jax.nn.one_hot(LABELS, 3), share)
  np.testing.assert_allclose(
    items.losses, optax.softmax_cross_entropy(logits, labels), rtol=1e-5
  )
  assert np.max(np.abs(items.losses - plain.losses)) > 0.01
  np.testing.assert_array_equal(items.predictions, plain.predictions)
