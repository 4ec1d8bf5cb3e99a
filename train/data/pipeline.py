"""From a task's rows to batches of tokens: load, tokenize, batch with Grain."""

from collections.abc import Callable, Sequence
import dataclasses
import os
from typing import NamedTuple

import grain
import numpy as np

from . import batching, hashing
from .batching import Batch
from .task import Split, Task, Text

BUCKETS = (16, 32, 48, 64, 96, 128, 256)
"""The lengths a batch may be padded to: one compiled step for each."""

Encode = Callable[
  [Sequence[Text], int], Sequence[tuple[Sequence[int], Sequence[int]]]
]

_ROWS_AT_A_TIME = 1024


class Row(NamedTuple):
  """A text, or a pair of texts, and the index of its label."""

  text: Text
  label: int


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
  """Tokenized rows, end to end.

  Attributes:
    tokens: [total] int32, token ids of all rows.
    token_types: [total] int32, 0 in the first text of a pair, 1 in the second.
    offsets: [rows + 1] int64; row i is `tokens[offsets[i]:offsets[i + 1]]`.
    labels: [rows] int32.
  """

  tokens: np.ndarray
  token_types: np.ndarray
  offsets: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def lengths(self) -> np.ndarray:
    """[rows] int64, the number of tokens of each row."""
    return np.diff(self.offsets)


def load(
  task: Task,
  split: str,
  data_dir: str | os.PathLike[str] | None = None,
  limit: int | None = None,
  seed: int = 0,
) -> list[Row]:
  """Returns the rows of a split of a task, in memory, in a fixed order.

  Args:
    task: the task.
    split: one of the task's splits.
    data_dir: the folder of prepared datasets; the user's cache if None.
    limit: take this many rows only, chosen by `seed` alone; for one seed, a
      smaller choice is part of each larger one.
    seed: any integer.

  Raises:
    ValueError: if there is no such split, or fewer rows than `limit`.
    RuntimeError: if the dataset cannot be had (see `prepare.open_stored`).
  """
  chosen = task.split(split)
  if limit is not None:
    batching.require_positive(limit=limit)
  from . import prepare

  stored = prepare.open_stored(task, chosen.stored, data_dir)
  places = list(range(len(stored)))
  if limit is not None:
    places.sort(key=lambda i: hashing.digest(f"{seed} {i}"))
  rows = []
  for i in places:
    if len(rows) == limit:
      break
    fields = stored[i]
    row = Row(task.text(fields), int(fields["label"]))
    if _belongs(row.text, chosen, task.held_out):
      rows.append(row)
  if limit is not None and len(rows) < limit:
    raise ValueError(
      f"limit is {limit}, but {task.name} has {len(rows)} rows in {split}."
    )
  return rows


def tokenize(rows: Sequence[Row], encode: Encode, max_length: int) -> Examples:
  """Tokenizes all rows once.

  Args:
    rows: at least one.
    encode: texts, max_length -> (token ids, token types) of each text.
    max_length: the most tokens a row may have.

  Raises:
    ValueError: if there are no rows, or `encode` does not return as many as it
      is given, or returns no token or more than `max_length` for one.
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
          f"The tokenizer gave {len(ids)} tokens and {len(kinds)} token types"
          f" for {text!r}; it must give as many of both, from 1 to"
          f" {max_length}."
        )
      tokens.append(np.asarray(ids, np.int32))
      types.append(np.asarray(kinds, np.int32))
      lengths.append(len(ids))
  return Examples(
    tokens=np.concatenate(tokens),
    token_types=np.concatenate(types),
    offsets=np.concatenate([[0], np.cumsum(lengths)]),
    labels=np.asarray([row.label for row in rows], np.int32),
  )


def train_batches(
  examples: Examples,
  batch_size: int,
  seed: int,
  epochs: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
  buckets: Sequence[int] = BUCKETS,
  pad_id: int = 0,
  group_by_length: int = 0,
) -> grain.DatasetIterator[Batch]:
  """Returns an iterator over training batches, shuffled anew in each epoch.

  A batch is a function of the arguments and the step, so that the iterator's
  state is the number of steps taken: `get_state()` is `{"next_index": step}`,
  `set_state` resumes there, and Grain's Orbax handler saves it as JSON.

  Args:
    examples: the training rows.
    batch_size: rows of the global batch. Rows that fill no batch are left out
      of their epoch.
    seed: any integer.
    epochs: how many; without end if None.
    process_index: which equal part of each global batch is wanted.
    process_count: how many parts there are.
    buckets: the lengths allowed, increasing. A batch has the smallest that
      holds the longest row of the global batch, the same in all processes.
    pad_id: the token id beyond a row's end.
    group_by_length: if n > 1, rows are sorted by length within each n batches'
      worth of shuffled rows before they are cut into batches, and the batches
      are shuffled: less padding for less random batches.

  Returns:
    an iterator of dicts, with B = batch_size / process_count and L a bucket:
      tokens: [B, L] int32.
      mask: [B, L] int32, 1 on tokens, 0 on padding.
      token_types: [B, L] int32.
      labels: [B] int32.

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
    buckets,
    group_by_length,
  )


def eval_batches(
  examples: Examples,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  buckets: Sequence[int] = BUCKETS,
  pad_id: int = 0,
) -> grain.DatasetIterator[Batch]:
  """Returns an iterator that gives every row once, the longest rows first.

  Sorted rows need the least padding. The last batch is filled up with copies of
  its first row, of weight 0.

  Args:
    examples: the rows, at least one.
    batch_size: rows of the global batch.
    process_index: which equal part of each global batch is wanted.
    process_count: how many parts there are.
    buckets: the lengths allowed, increasing (see `train_batches`).
    pad_id: the token id beyond a row's end.

  Returns:
    an iterator of dicts as `train_batches` gives them, and in each
      weights: [B] float32, 1 on rows, 0 on copies.
      index: [B] int32, the row's place in `examples`; -1 on copies.

  Raises:
    ValueError: if the arguments do not fit each other or the rows.
  """

  def fill(rows: np.ndarray, width: int, index: np.ndarray) -> Batch:
    batch = _pad(examples, rows, width, pad_id)
    batch["weights"] = (index >= 0).astype(np.float32)
    batch["index"] = index.astype(np.int32)
    return batch

  return batching.evaluate(
    fill,
    examples.lengths,
    batch_size,
    process_index,
    process_count,
    buckets,
  )


def _pad(
  examples: Examples, rows: np.ndarray, width: int, pad_id: int
) -> Batch:
  """Writes rows out, padded to a width."""
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
  if split.part == "all":
    return True
  texts = (text,) if isinstance(text, str) else text
  normal = "\n".join(hashing.normalise(text) for text in texts)
  return (hashing.share(normal) < held_out) == (split.part == "held_out")
