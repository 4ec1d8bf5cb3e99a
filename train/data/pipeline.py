"""From a task's rows to batches of tokens: load, tokenize, batch with Grain."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
from typing import Any, NamedTuple

import grain
import numpy as np

from . import batching, hashing
from .batching import Batch
from .task import Split, Task, Text

BUCKETS = (16, 32, 48, 64, 96, 128, 256)
"""The lengths that a batch of short rows may be padded to.

Each length needs a compiled step. `lengths_for` adds those of longer rows.
"""
_GROWTH, _LARGER = 1.5, 5

Encode = Callable[
  [Sequence[Text], int], Sequence[tuple[Sequence[int], Sequence[int]]]
]

_ROWS_AT_A_TIME = 1024


class Row(NamedTuple):
  """A text or a pair of texts, and the index of a label or a value."""

  text: Text
  label: int | float


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
  """Tokenized rows, joined end to end.

  Attributes:
    tokens: [total] int32, the token ids of all rows.
    token_types: [total] int32, 0 in the first text of a pair, 1 in the second.
    offsets: [rows + 1] int64; row i is `tokens[offsets[i]:offsets[i + 1]]`.
    labels: [rows] int32, or float32 for a regression.
    max_length: the most tokens that a row may have; None if unknown.
  """

  tokens: np.ndarray
  token_types: np.ndarray
  offsets: np.ndarray
  labels: np.ndarray
  max_length: int | None = None

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def lengths(self) -> np.ndarray:
    """[rows] int64, the number of tokens of each row."""
    return np.diff(self.offsets)


def lengths_for(longest: int, max_length: int | None = None) -> tuple[int, ...]:
  """Returns the lengths that batches may be padded to.

  These are `BUCKETS` and, for longer rows, at most five further lengths. Each
  further length is about 1.5 times the one before, or more if five lengths
  would not reach the longest row.

  Args:
    longest: tokens of the longest row.
    max_length: an upper limit of the further lengths, at least `longest`; None:
      no limit.
  """
  last = BUCKETS[-1]
  if longest <= last:
    return BUCKETS
  steps = int(np.ceil(np.log(longest / last) / np.log(_GROWTH)))
  steps = min(steps, _LARGER)
  larger = [
    int(np.ceil(last * (longest / last) ** (step / steps) / 64 - 1e-6)) * 64
    for step in range(1, steps + 1)
  ]
  return (*BUCKETS, *sorted({min(x, max_length or x) for x in larger}))


def drawn(
  task: Task,
  split: str,
  data_dir: str | os.PathLike[str] | None = None,
  limit: int | None = None,
  seed: int = 0,
) -> list[Mapping[str, Any]]:
  """Returns the rows of a split of a task as its source has them.

  Args:
    task: the task, with a source.
    split: one of the task's splits.
    data_dir: the folder of prepared datasets; the user's cache if None.
    limit: the most rows to return; None: all. `seed` alone decides which rows.
      For one seed, a smaller choice is part of each larger choice.
    seed: any integer.

  Raises:
    ValueError: if the task has no such split, or a row has an invalid label.
    RuntimeError: if the dataset cannot be prepared (see `prepare.open_stored`).
  """
  chosen, source = task.split(split), task.source
  assert source is not None, task.name
  if limit is not None:
    batching.require_positive(limit=limit)
  stored = source.read(chosen.stored, os.fspath(data_dir) if data_dir else None)
  places = list(range(len(stored)))
  if limit is not None:
    places.sort(
      key=lambda i: hashing.digest(f"{seed} {source.number(chosen.stored, i)}")
    )
  rows = []
  for i in places:
    if len(rows) == limit:
      break
    row = stored[i]
    if task.labels and row[task.label] not in range(len(task.labels)):
      raise ValueError(
        f"{source.where(chosen.stored, i)}: {task.label} is"
        f" {row[task.label]!r}; it must be the number of one of the"
        f" {len(task.labels)} labels of {task.name}, from 0."
      )
    if chosen.part == "all" or _belongs(task.text(row), chosen, task.held_out):
      rows.append(row)
  return rows


def load(
  task: Task,
  split: str,
  data_dir: str | os.PathLike[str] | None = None,
  limit: int | None = None,
  seed: int = 0,
) -> list[Row]:
  """Returns the texts and labels of a split of a task, in a fixed order.

  The arguments and errors are those of `drawn`.
  """
  return labelled(task, drawn(task, split, data_dir, limit, seed))


def labelled(task: Task, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
  """Returns the texts and labels of rows; a missing label becomes 0."""
  number = float if task.kind == "regression" else int
  return [Row(task.text(row), number(row.get(task.label, 0))) for row in rows]


def tokenize(rows: Sequence[Row], encode: Encode, max_length: int) -> Examples:
  """Tokenizes all rows once.

  Args:
    rows: at least one row.
    encode: (texts, max_length) -> (token ids, token types) of each text.
    max_length: the most tokens that a row may have.

  Raises:
    ValueError: if there are no rows, or if `encode` returns a wrong number of
      rows, or a row without tokens or with more than `max_length`.
  """
  batching.require_positive(max_length=max_length)
  if not rows:
    raise ValueError("There are no rows to tokenize; at least one is needed.")
  tokens, types, lengths = [], [], []
  for start in range(0, len(rows), _ROWS_AT_A_TIME):
    texts = [row.text for row in rows[start : start + _ROWS_AT_A_TIME]]
    encoded = encode(texts, max_length)
    if len(encoded) != len(texts):
      raise ValueError(
        f"The tokenizer gave {len(encoded)} rows for {len(texts)} texts; it"
        " must give one for each."
      )
    for text, (ids, kinds) in zip(texts, encoded):
      if not 0 < len(ids) <= max_length or len(kinds) != len(ids):
        raise ValueError(
          f"The tokenizer gave {len(ids)} tokens and {len(kinds)} token types "
          f"for {text!r}; it must give the same number of both, from 1 to "
          f"{max_length}."
        )
      tokens.append(np.asarray(ids, np.int32))
      types.append(np.asarray(kinds, np.int32))
      lengths.append(len(ids))
  return Examples(
    tokens=np.concatenate(tokens),
    token_types=np.concatenate(types),
    offsets=np.concatenate([[0], np.cumsum(lengths)]),
    labels=labels_of([row.label for row in rows]),
    max_length=max_length,
  )


def labels_of(values: Sequence[int | float]) -> np.ndarray:
  """Returns labels, [rows] int32 for classes, or float32 for a regression."""
  found = np.asarray(values)
  return found.astype(np.float32 if found.dtype.kind == "f" else np.int32)


def train_batches(
  examples: Examples,
  batch_size: int,
  seed: int,
  epochs: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
  buckets: Sequence[int] = (),
  pad_id: int = 0,
  group_by_length: int = 0,
) -> grain.DatasetIterator[Batch]:
  """Returns an iterator over training batches, shuffled anew in each epoch.

  A batch is a function of the arguments and the step, so the iterator's state
  is the number of steps. `get_state()` returns `{"next_index": step}`, and
  `set_state` resumes there. Grain's Orbax handler saves the state as JSON.

  Args:
    examples: the training rows.
    batch_size: rows of the global batch. Rows that fill no batch are left out
      of their epoch.
    seed: any integer.
    epochs: the number of epochs; None: endless.
    process_index: which of the equal parts of each global batch to return.
    process_count: the number of parts.
    buckets: the allowed lengths, increasing; by default `lengths_for`. A batch
      has the smallest length that holds the longest row of the global batch, so
      all processes have the same.
    pad_id: the token id beyond a row's end.
    group_by_length: if n > 1, the shuffled rows are taken in groups of n
      batches. Each group is sorted by length and cut into batches, and the
      batches are shuffled. Batches then have less padding and are less random.

  Returns:
    an iterator of dicts, with B = batch_size / process_count and L a bucket:
      tokens: [B, L] int32.
      mask: [B, L] int32, 1 on tokens, 0 on padding.
      token_types: [B, L] int32.
      labels: [B] int32, or float32 for a regression.

  Raises:
    ValueError: if the arguments do not fit each other or the rows.
  """

  def fill(rows: np.ndarray, width: int) -> Batch:
    return _pad(examples, rows, width, pad_id)

  return batching.train(
    fill,
    examples.lengths,
    batch_size,
    seed,
    epochs,
    process_index,
    process_count,
    buckets or buckets_of(examples),
    group_by_length,
  )


def eval_batches(
  examples: Examples,
  batch_size: int,
  buckets: Sequence[int] = (),
  pad_id: int = 0,
) -> grain.DatasetIterator[Batch]:
  """Returns an iterator that gives every row once, the longest rows first.

  Sorted rows need the least padding. The last batch is filled with copies of
  its first row, with weight 0.

  Args:
    examples: the rows, at least one.
    batch_size: rows of a batch.
    buckets: see `train_batches`.
    pad_id: the token id beyond a row's end.

  Returns:
    an iterator of dicts with the arrays of `train_batches`, and with
      weights: [B] float32, 1 for rows, 0 for copies.
      index: [B] int32, the row's place in `examples`; -1 for copies.

  Raises:
    ValueError: if the arguments do not fit each other or the rows.
  """

  def fill(rows: np.ndarray, width: int, index: np.ndarray) -> Batch:
    batch = _pad(examples, rows, width, pad_id)
    batch["weights"] = (index >= 0).astype(np.float32)
    batch["index"] = index.astype(np.int32)
    return batch

  lengths = buckets or buckets_of(examples)
  return batching.evaluate(fill, examples.lengths, batch_size, lengths)


def buckets_of(examples: Examples) -> tuple[int, ...]:
  """The lengths that batches of these rows may be padded to."""
  return lengths_for(int(examples.lengths.max()), examples.max_length)


def _pad(
  examples: Examples, rows: np.ndarray, width: int, pad_id: int
) -> Batch:
  """Returns the batch of some rows, padded to a width."""
  where = examples.offsets[rows, None] + np.arange(width)
  mask = where < examples.offsets[rows + 1, None]
  where = np.where(mask, where, 0)
  return {
    "tokens": np.where(mask, examples.tokens[where], np.int32(pad_id)),
    "mask": mask.astype(np.int32),
    "token_types": np.where(mask, examples.token_types[where], np.int32(0)),
    "labels": examples.labels[rows],
  }


def _belongs(text: Text, split: Split, held_out: float) -> bool:
  joined = hashing.joined((text,) if isinstance(text, str) else text)
  return (hashing.share(joined) < held_out) == (split.part == "held_out")
