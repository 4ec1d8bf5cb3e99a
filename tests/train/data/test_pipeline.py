"""Batches: every row once, the same for all processes, resumed exactly."""

import json
import pathlib

from etils import epath
import grain
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from train.data import pipeline

BUCKETS = (4, 8, 12)
ROWS = 50
BATCH = 8


def _examples(rows: int = ROWS, longest: int = 12) -> pipeline.Examples:
  """Row i holds i + 1 in all its tokens, so that batches show their rows."""
  generator = np.random.default_rng(0)
  texts = [pipeline.Row(f"{i}", i % 3) for i in range(rows)]
  lengths = generator.integers(1, longest + 1, rows)

  def encode(texts, max_length):
    ids = [[int(text) + 1] * lengths[int(text)] for text in texts]
    return [(row, [0, *[1] * (len(row) - 1)]) for row in ids]

  return pipeline.tokenize(texts, encode, longest)


def _train(examples=None, **changes):
  arguments = {"batch_size": BATCH, "seed": 0, "buckets": BUCKETS, **changes}
  examples = _examples() if examples is None else examples
  return pipeline.train_batches(examples, **arguments)


def _rows(batch) -> list[int]:
  return (batch["tokens"][:, 0] - 1).tolist()


def _same(left, right) -> bool:
  return left.keys() == right.keys() and all(
    np.array_equal(left[key], right[key]) for key in left
  )


def test_tokenize_keeps_order_labels_and_types():
  examples = _examples()
  assert len(examples) == ROWS
  firsts = examples.tokens[examples.offsets[:-1]]
  np.testing.assert_array_equal(firsts, np.arange(ROWS) + 1)
  np.testing.assert_array_equal(examples.labels, np.arange(ROWS) % 3)
  assert examples.token_types.sum() == (examples.lengths - 1).sum()


@pytest.mark.parametrize(
  ("ids", "types"), [([], []), ([1, 2, 3], [0, 0, 0]), ([1, 2], [0])]
)
def test_tokens_that_cannot_be_right_are_refused(ids, types):
  rows = [pipeline.Row("a b c", 0)]
  with pytest.raises(ValueError, match=r"for 'a b c'; it must give .* 1 to 2"):
    pipeline.tokenize(rows, lambda texts, _: [(ids, types)], 2)


def test_a_row_lost_by_the_tokenizer_is_noticed():
  rows = [pipeline.Row("a", 0), pipeline.Row("b", 1)]
  with pytest.raises(ValueError, match="gave 1 rows for 2 texts"):
    pipeline.tokenize(rows, lambda texts, _: [([1], [0])], 2)


def test_no_rows_and_no_length_are_refused():
  with pytest.raises(ValueError, match="no rows to tokenize"):
    pipeline.tokenize([], lambda texts, _: [], 2)
  with pytest.raises(ValueError, match="max_length must be at least 1; got 0"):
    pipeline.tokenize([pipeline.Row("a", 0)], lambda texts, _: [], 0)


@pytest.mark.parametrize("group", [0, 3])
def test_a_batch_has_the_stated_shapes_and_pads_to_the_smallest_bucket(group):
  examples = _examples()
  for batch in _train(examples, epochs=2, pad_id=99, group_by_length=group):
    rows = _rows(batch)
    lengths = examples.lengths[rows]
    width = min(bucket for bucket in BUCKETS if bucket >= lengths.max())
    for name in ("tokens", "mask", "token_types"):
      assert batch[name].shape == (BATCH, width)
      assert batch[name].dtype == np.int32
    assert batch["labels"].dtype == np.int32
    np.testing.assert_array_equal(batch["labels"], np.array(rows) % 3)
    real = np.arange(width) < lengths[:, None]
    np.testing.assert_array_equal(batch["mask"], real)
    expected = np.where(real, np.array(rows)[:, None] + 1, 99)
    np.testing.assert_array_equal(batch["tokens"], expected)
    types = real & (np.arange(width) > 0)
    np.testing.assert_array_equal(batch["token_types"], types)


@pytest.mark.parametrize("group", [0, 1, 2, 4, 100])
def test_an_epoch_sees_every_row_once_but_for_the_remainder(group):
  batches = list(_train(epochs=3, group_by_length=group))
  steps = ROWS // BATCH
  assert len(batches) == 3 * steps
  for epoch in range(3):
    epoch_batches = batches[epoch * steps : (epoch + 1) * steps]
    rows = [row for batch in epoch_batches for row in _rows(batch)]
    assert len(set(rows)) == steps * BATCH


@pytest.mark.parametrize("group", [0, 2])
def test_epochs_are_reshuffled_and_leave_out_other_rows(group):
  batches = [_rows(b) for b in _train(epochs=3, group_by_length=group)]
  epochs = np.reshape(batches, (3, -1)).tolist()
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  assert len({frozenset(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("group", [0, 2])
def test_batches_depend_on_the_seed_alone(group):
  first, again, other = (
    [_rows(b) for b in _train(epochs=2, seed=seed, group_by_length=group)]
    for seed in (3, 3, 4)
  )
  assert first == again
  assert first != other


def test_the_next_seed_is_not_the_next_epoch():
  def epochs(seed):
    batches = [_rows(b) for b in _train(epochs=2, seed=seed)]
    return batches[:6], batches[6:]

  assert epochs(0)[1] != epochs(1)[0]


def test_the_order_of_a_seed_is_the_same_in_every_version():
  # Numbers seen once; a change breaks the resuming of older runs.
  assert _rows(next(_train())) == [12, 22, 6, 7, 2, 47, 49, 44]
  grouped = next(_train(group_by_length=2))
  assert _rows(grouped) == [3, 24, 39, 35, 13, 15, 30, 25]


def test_without_epochs_it_never_ends():
  iterator = _train()
  last = [next(iterator) for _ in range(60)][-1]
  assert _same(last, list(_train(epochs=10))[-1])


@pytest.mark.parametrize("group", [0, 2])
def test_resuming_anywhere_equals_going_on(group):
  whole = list(_train(epochs=2, group_by_length=group))
  iterator = _train(epochs=2, group_by_length=group)
  for step in range(len(whole) + 1):
    state = json.loads(json.dumps(iterator.get_state()))
    assert state == {"next_index": step}
    resumed = _train(epochs=2, group_by_length=group)
    resumed.set_state(state)
    rest = list(resumed)
    assert len(rest) == len(whole) - step
    assert all(_same(a, b) for a, b in zip(rest, whole[step:]))
    if step < len(whole):
      next(iterator)


def test_grains_checkpoint_handler_saves_the_iterator(tmp_path: pathlib.Path):
  iterator = _train(epochs=1)
  next(iterator)
  handler = grain.checkpoint.CheckpointHandler()
  handler.save(epath.Path(tmp_path), item=iterator)
  restored = handler.restore(epath.Path(tmp_path), item=_train(epochs=1))
  assert _same(next(restored), next(iterator))


@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_part_each_global_batch_at_one_length(group, count):
  whole = list(_train(epochs=2, group_by_length=group))
  parts = [
    list(
      _train(
        epochs=2,
        group_by_length=group,
        process_index=index,
        process_count=count,
      )
    )
    for index in range(count)
  ]
  for step, batch in enumerate(whole):
    joined = {
      name: np.concatenate([part[step][name] for part in parts])
      for name in batch
    }
    assert _same(joined, batch)


def test_grouping_by_length_pads_less():
  def padded(group):
    batches = _train(_examples(400), epochs=1, group_by_length=group)
    return sum(batch["tokens"].size for batch in batches)

  assert padded(10) < 0.8 * padded(0)


def test_grouped_batches_do_not_come_in_order_of_length():
  batches = _train(_examples(400), epochs=1, group_by_length=50)
  widths = [batch["tokens"].shape[1] for batch in batches]
  assert widths != sorted(widths)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), batch=st.sampled_from([1, 2, 4, 6, 16]))
def test_evaluation_sees_every_row_once_at_weight_one(rows, batch):
  examples = _examples(rows)
  seen = []
  for part in pipeline.eval_batches(examples, batch, buckets=BUCKETS):
    assert part["tokens"].shape[0] == batch
    assert part["mask"].any(axis=1).all()  # a row of padding alone gives NaN
    real = part["weights"] == 1
    np.testing.assert_array_equal(part["weights"], real)
    np.testing.assert_array_equal(part["index"] >= 0, real)
    found = part["index"][real]
    np.testing.assert_array_equal(part["tokens"][real, 0] - 1, found)
    np.testing.assert_array_equal(part["labels"][real], found % 3)
    seen.extend(found.tolist())
  assert sorted(seen) == list(range(rows))


def test_evaluation_goes_from_long_to_short():
  parts = list(pipeline.eval_batches(_examples(), BATCH, BUCKETS))
  widths = [batch["tokens"].shape for batch in parts]
  assert widths == sorted(widths, reverse=True)
  assert parts[0]["weights"].dtype == np.float32
  assert parts[0]["index"].dtype == np.int32


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"process_count": 0}, "process_count must be at least 1; got 0"),
    (
      {"process_index": 2, "process_count": 2},
      "process_index must be from 0 to 1, as process_count is 2; got 2",
    ),
    (
      {"process_count": 3},
      "batch_size is 8, which 3 processes cannot share equally",
    ),
    ({"batch_size": 64}, "50 rows to train on, fewer than one batch of 64"),
    ({"epochs": 0}, "epochs must be at least 1; got 0"),
    ({"group_by_length": -1}, "group_by_length must be 0 or a number"),
  ],
)
def test_training_that_cannot_start_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    _train(**changes)


@pytest.mark.parametrize("batches", [_train, None])
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
    ({"buckets": (8, 4)}, "buckets must be positive lengths in increasing"),
    ({"buckets": (0, 12)}, "buckets must be positive lengths in increasing"),
    (
      {"buckets": (4, 8)},
      "has 12 tokens, more than the largest bucket, 8; tokenize with a smaller",
    ),
  ],
)
def test_arguments_that_do_not_fit_are_refused(batches, changes, message):
  def evaluate(**changes):
    arguments = {"batch_size": BATCH, "buckets": BUCKETS, **changes}
    return pipeline.eval_batches(_examples(), **arguments)

  with pytest.raises(ValueError, match=message):
    (batches or evaluate)(**changes)


@pytest.mark.parametrize(
  ("longest", "larger"),
  [
    (256, ()),
    (257, (320,)),
    (427, (384, 448)),
    (1024, (384, 512, 768, 1024)),
    (8192, (512, 1024, 2048, 4096, 8192)),
  ],
)
def test_lengths_follow_the_rows_and_are_few(longest, larger):
  assert pipeline.lengths_for(longest) == (*pipeline.BUCKETS, *larger)


def test_rows_beyond_the_buckets_of_short_ones_are_batched():
  examples = _examples(20, longest=427)
  longest = int(examples.lengths.max())
  for batch in (
    *_train(examples, epochs=1, buckets=()),
    *pipeline.eval_batches(examples, BATCH),
  ):
    width = batch["tokens"].shape[1]
    assert width <= 427  # a model may have no position beyond --max-length
    assert batch["mask"].sum(1).max() <= width
  first = next(iter(pipeline.eval_batches(examples, BATCH)))
  assert longest <= first["tokens"].shape[1] < longest + 64
