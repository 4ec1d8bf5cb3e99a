"""Packing: every token once, no target across segments, resumed exactly."""

import collections
import dataclasses
import itertools
import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from train.data import chat, packing

LENGTH = 12
BATCH = 4
BUCKETS = (4, 8, 12)
VOCABULARY = 50


def _sequences(count=40, seed=0, lengths=None) -> chat.Sequences:
  """Random tokens; the end of each sequence is learned."""
  generator = np.random.default_rng(seed)
  if lengths is None:
    lengths = generator.integers(2, LENGTH + 1, count)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  tokens = generator.integers(1, VOCABULARY, offsets[-1]).astype(np.int32)
  loss = np.zeros(len(tokens), bool)
  for start, stop in itertools.pairwise(offsets):
    loss[generator.integers(start + 1, stop) : stop] = True
  return chat.Sequences(tokens, loss, offsets)


def _unpacked(sequences, buckets=BUCKETS):
  unpacked = packing.unpacked(sequences, LENGTH)
  assert unpacked.buckets == (LENGTH,)
  return dataclasses.replace(unpacked, buckets=buckets)


def _both(sequences):
  return (
    packing.pack(sequences, LENGTH),
    _unpacked(sequences),
  )


SEQUENCES = _sequences()
BOTH = pytest.mark.parametrize(
  "packed", _both(SEQUENCES), ids=["packed", "unpacked"]
)


def _train(packed, **changes):
  arguments = {"batch_size": BATCH, "seed": 0, "epochs": 2, **changes}
  return packing.train_batches(packed, **arguments)


def _ids(batch):
  """Of each token the segment that it is in, from 1; 0 at padding."""
  ids = np.zeros_like(batch["tokens"])
  for row, lengths in zip(ids, batch["lengths"]):
    held = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    row[: len(held)] = held
  return ids


def _segments(batch):
  """(tokens, learned) of each segment, as far as its targets tell."""
  for row in range(len(batch["tokens"])):
    ids = _ids(batch)[row]
    for segment in range(1, ids.max() + 1):
      (here,) = np.nonzero(ids == segment)
      np.testing.assert_array_equal(np.diff(here), 1)
      np.testing.assert_array_equal(
        batch["positions"][row, here], np.arange(len(here))
      )
      weights = batch["weights"][row, here]
      learned = (False, *(weights[:-1] == 1).tolist())
      yield tuple(batch["tokens"][row, here].tolist()), learned


def _expected(sequences):
  return collections.Counter(
    (
      tuple(sequences.tokens[start:stop].tolist()),
      tuple(sequences.loss[start:stop].tolist()),
    )
    for start, stop in itertools.pairwise(sequences.offsets)
  )


@settings(max_examples=60, deadline=None)
@given(
  lengths=st.lists(st.integers(2, LENGTH), min_size=1, max_size=40),
  batch_size=st.sampled_from([1, 4]),
)
def test_batches_hold_every_conversation_once(lengths, batch_size):
  sequences = _sequences(lengths=lengths)
  for packed in _both(sequences):
    found = collections.Counter()
    rows = 0
    for batch in packing.eval_batches(packed, batch_size):
      real = min(batch_size, len(packed) - rows)
      copies = {name: value[real:] for name, value in batch.items()}
      assert not copies["weights"].any()
      assert copies["lengths"].any(axis=1).all()  # else NaN
      found.update(_segments({name: x[:real] for name, x in batch.items()}))
      rows += real
    assert rows == len(packed)
    assert found == _expected(sequences)


@BOTH
def test_shapes_padding_and_targets(packed):
  learned = 0
  for batch in packing.eval_batches(packed, BATCH, pad_id=99):
    tokens, segments = batch["tokens"], _ids(batch)
    width = tokens.shape[1]
    assert width in packed.buckets
    for name in ("tokens", "positions", "targets"):
      assert batch[name].shape == (BATCH, width)
      assert batch[name].dtype == np.int32
    most = np.diff(packed.offsets).max()
    assert batch["lengths"].shape == (BATCH, most)
    assert batch["lengths"].dtype == np.int32
    assert batch["weights"].shape == (BATCH, width)
    assert batch["weights"].dtype == np.float32
    padding = segments == 0
    assert (tokens[padding] == 99).all()
    assert not batch["positions"][padding].any()
    # A target is the next token of the same segment, or weighs nothing.
    same = (segments[:, 1:] == segments[:, :-1]) & ~padding[:, 1:]
    np.testing.assert_array_equal(
      batch["targets"][:, :-1][same], tokens[:, 1:][same]
    )
    last = np.pad(~same, ((0, 0), (0, 1)), constant_values=True)
    assert not batch["weights"][last].any()
    learned += batch["weights"].sum()
  assert learned == SEQUENCES.loss.sum()


def _loss(batch) -> tuple[float, float]:
  """A causal model's weighted loss: each token sees its segment's past."""
  generator = np.random.default_rng(1)
  embed = generator.normal(size=(VOCABULARY + 1, 6))
  place = generator.normal(size=(LENGTH, 6))
  head = generator.normal(size=(6, VOCABULARY))
  segments = _ids(batch)
  x = embed[batch["tokens"]] + place[batch["positions"]]
  sees = segments[:, :, None] == segments[:, None, :]
  scores = np.where(sees, x @ x.swapaxes(1, 2), -np.inf)
  width = segments.shape[1]
  scores = np.where(np.tri(width, dtype=bool), scores, -np.inf)
  attention = np.exp(scores - scores.max(-1, keepdims=True))
  attention /= attention.sum(-1, keepdims=True)
  logits = np.tanh(attention @ x) @ head
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  losses = -np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
  return (losses * batch["weights"]).sum(), batch["weights"].sum()


def test_the_loss_of_packed_rows_is_that_of_conversations_alone():
  totals = [
    np.sum([_loss(batch) for batch in packing.eval_batches(rows, BATCH)], 0)
    for rows in _both(SEQUENCES)
  ]
  np.testing.assert_allclose(*totals, rtol=1e-12)  # float64 sums


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, LENGTH), min_size=1, max_size=60))
def test_no_two_rows_would_fit_in_one(lengths):
  packed = packing.pack(_sequences(lengths=lengths), LENGTH)
  assert packed.lengths.sum() == sum(lengths)
  assert packed.lengths.max() <= LENGTH
  fullness = np.sort(packed.lengths)
  assert len(packed) == 1 or fullness[:2].sum() > LENGTH


def test_sequences_that_fill_a_row_together_find_each_other():
  first = np.random.default_rng(2).integers(2, LENGTH - 1, 1000)
  sequences = _sequences(lengths=np.concatenate([first, LENGTH - first]))
  assert len(packing.pack(sequences, LENGTH)) == len(first)


@BOTH
def test_every_epoch_has_the_same_steps_and_no_row_twice(packed):
  batches = list(_train(packed, epochs=3))
  steps = len(packed) // BATCH
  assert len(batches) == 3 * steps
  epochs = [
    [
      s
      for batch in batches[i * steps : (i + 1) * steps]
      for s in _segments(batch)
    ]
    for i in range(3)
  ]
  assert epochs[0] != epochs[1] != epochs[2]
  for epoch in epochs:
    assert not collections.Counter(epoch) - _expected(SEQUENCES)


@BOTH
def test_batches_depend_on_the_seed_alone(packed):
  first, again, other = (
    [list(_segments(batch)) for batch in _train(packed, seed=seed)]
    for seed in (3, 3, 4)
  )
  assert first == again
  assert first != other


@BOTH
def test_resuming_anywhere_equals_going_on(packed):
  whole = list(_train(packed))
  iterator = _train(packed)
  for step in range(len(whole)):
    state = json.loads(json.dumps(iterator.get_state()))
    assert state == {"next_index": step}
    resumed = _train(packed)
    resumed.set_state(state)
    for batch, expected in zip(resumed, whole[step:], strict=True):
      for name in expected:
        np.testing.assert_array_equal(batch[name], expected[name])
    next(iterator)


@BOTH
def test_processes_part_each_global_batch(packed):
  whole = list(_train(packed))
  parts = [
    list(_train(packed, process_index=i, process_count=2)) for i in range(2)
  ]
  assert len(parts[0]) == len(parts[1]) == len(whole)
  for batch, *of_processes in zip(whole, *parts):
    for name in batch:
      joined = np.concatenate([part[name] for part in of_processes])
      np.testing.assert_array_equal(joined, batch[name])


def test_unpacked_rows_may_be_grouped_by_length():
  unpacked = _unpacked(_sequences(400))

  def padded(group):
    batches = _train(unpacked, epochs=1, group_by_length=group)
    return sum(batch["tokens"].size for batch in batches)

  assert padded(10) < 0.9 * padded(0)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
    ({"batch_size": 64}, "40 rows to train on, fewer than one batch of 64"),
    ({"epochs": 0}, "epochs must be at least 1; got 0"),
    ({"process_count": 3}, "which 3 processes cannot share equally"),
  ],
)
def test_training_that_cannot_start_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    _train(_unpacked(SEQUENCES), **changes)


def test_sequences_that_fit_no_row_are_refused():
  with pytest.raises(ValueError, match="has 12 tokens, more than the 11 of a"):
    packing.pack(SEQUENCES, 11)
  with pytest.raises(ValueError, match="12 tokens, more than the largest"):
    packing.eval_batches(_unpacked(SEQUENCES, (4, 11)), BATCH)


def test_unpacked_rows_are_padded_to_lengths_that_are_there():
  def widths(lengths, max_length):
    rows = packing.unpacked(_sequences(lengths=np.array(lengths)), max_length)
    batches = packing.eval_batches(rows, 1)
    return [batch["tokens"].shape[1] for batch in batches]

  assert widths([300, 40, 9], 1024) == [320, 48, 16]
  assert widths([200, 150], 200) == [200, 200]
