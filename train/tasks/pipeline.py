"""From a task's rows to batches of tokens: load, tokenize, batch with Grain."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import os
from typing import NamedTuple

import grain
import numpy as np

from train.tasks import hashing, order
from train.tasks.task import Split, Task, Text

BUCKETS = (16, 32, 48, 64, 96, 128, 256)
"""The lengths a batch may be padded to: one compiled step for each."""

Batch = dict[str, np.ndarray]
Encode = Callable[
  [Sequence[Text], int], Sequence[tuple[Sequence[int], Sequence[int]]]
]

# The rows are in memory and a batch takes less time than handing it between
# threads; Grain advises no threads in that case.
_NO_THREADS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
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
    _require_positive(limit=limit)
  from train.tasks import prepare  # imports TFDS

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
  _require_positive(max_length=max_length)
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
  _check(examples, batch_size, process_index, process_count, buckets)
  if epochs is not None:
    _require_positive(epochs=epochs)
  if group_by_length < 0:
    raise ValueError(
      f"group_by_length must be 0 or a number of batches; got"
      f" {group_by_length}."
    )
  if len(examples) < batch_size:
    raise ValueError(
      f"There are {len(examples)} rows to train on, fewer than one batch of"
      f" {batch_size}."
    )
  lengths = examples.lengths
  part = _part(batch_size, process_index, process_count)
  steps = len(examples) // batch_size

  @functools.lru_cache(maxsize=1)
  def epoch_batches(epoch: int) -> np.ndarray:
    return order.batches(lengths, batch_size, group_by_length, seed, epoch)

  def pad(step: int, _: int) -> Batch:
    epoch, step_in_epoch = divmod(step, steps)
    rows = epoch_batches(epoch)[step_in_epoch]
    return _pad(examples, rows, part, buckets, pad_id)

  batches = grain.MapDataset.range(steps).repeat(epochs).map_with_index(pad)
  return iter(batches.to_iter_dataset(_NO_THREADS))


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
  _check(examples, batch_size, process_index, process_count, buckets)
  by_length = np.argsort(-examples.lengths, kind="stable")
  part = _part(batch_size, process_index, process_count)

  def pad(start: int) -> Batch:
    rows = by_length[start : start + batch_size]
    copies = batch_size - len(rows)
    index = np.pad(rows, (0, copies), constant_values=-1)
    rows = np.pad(rows, (0, copies), constant_values=rows[0])
    batch = _pad(examples, rows, part, buckets, pad_id)
    batch["weights"] = (index[part] >= 0).astype(np.float32)
    batch["index"] = index[part].astype(np.int32)
    return batch

  starts = grain.MapDataset.range(0, len(examples), batch_size)
  return iter(starts.map(pad).to_iter_dataset(_NO_THREADS))


def _pad(
  examples: Examples,
  rows: np.ndarray,
  part: slice,
  buckets: Sequence[int],
  pad_id: int,
) -> Batch:
  """Pads one process's part of a global batch to the global batch's length."""
  starts = examples.offsets[rows]
  lengths = examples.offsets[rows + 1] - starts
  width = next(bucket for bucket in buckets if bucket >= lengths.max())
  columns = np.arange(width)
  mask = columns < lengths[part, None]
  where = np.where(mask, starts[part, None] + columns, 0)
  return {
    "tokens": np.where(mask, examples.tokens[where], np.int32(pad_id)),
    "mask": mask.astype(np.int32),
    "token_types": np.where(mask, examples.token_types[where], np.int32(0)),
    "labels": examples.labels[rows[part]],
  }


def _part(batch_size: int, process_index: int, process_count: int) -> slice:
  rows = batch_size // process_count
  return slice(process_index * rows, (process_index + 1) * rows)


def _belongs(text: Text, split: Split, held_out: float) -> bool:
  if split.part == "all":
    return True
  texts = (text,) if isinstance(text, str) else text
  normal = "\n".join(hashing.normalise(text) for text in texts)
  return (hashing.share(normal) < held_out) == (split.part == "held_out")


def _check(
  examples: Examples,
  batch_size: int,
  process_index: int,
  process_count: int,
  buckets: Sequence[int],
) -> None:
  _require_positive(batch_size=batch_size, process_count=process_count)
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index must be from 0 to {process_count - 1}, as process_count"
      f" is {process_count}; got {process_index}."
    )
  if batch_size % process_count:
    raise ValueError(
      f"batch_size is {batch_size}, which {process_count} processes cannot"
      " share equally; it must be a multiple of process_count."
    )
  increasing = list(buckets) == sorted(set(buckets))
  if not buckets or not increasing or buckets[0] <= 0:
    raise ValueError(
      f"buckets must be positive lengths in increasing order; got {buckets}."
    )
  if not len(examples):
    raise ValueError("There are no rows to batch; at least one is needed.")
  longest = int(examples.lengths.max())
  if longest > buckets[-1]:
    raise ValueError(
      f"Row {int(examples.lengths.argmax())} has {longest} tokens, more than"
      f" the largest bucket, {buckets[-1]}; tokenize with a smaller max_length"
      " or give a larger bucket."
    )


def _require_positive(**values: int) -> None:
  for name, value in values.items():
    if value <= 0:
      raise ValueError(f"{name} must be at least 1; got {value}.")
