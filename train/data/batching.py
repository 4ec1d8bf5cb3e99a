"""Batches as functions of the step: their rows, order and length."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import grain
import numpy as np

from . import order

Batch = dict[str, np.ndarray]

# The rows are in memory. To make a batch takes less time than to pass it
# between threads, and Grain advises no threads in that case.
_NO_THREADS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def train(
  fill: Callable[[np.ndarray, int], Batch],
  lengths: np.ndarray,
  batch_size: int,
  seed: int,
  epochs: int | None,
  process_index: int,
  process_count: int,
  buckets: Sequence[int],
  group_by_length: int,
) -> grain.DatasetIterator[Batch]:
  """Returns an iterator over training batches, shuffled anew in each epoch.

  A batch is a function of the arguments and the step, so the iterator's state
  is the number of steps. `get_state()` returns `{"next_index": step}`, and
  `set_state` resumes there. Grain's Orbax handler saves the state as JSON.

  Args:
    fill: (rows of this process, length) -> their batch.
    lengths: [rows], the number of tokens of each row.
    batch_size: rows of the global batch. Rows that fill no batch are left out
      of their epoch.
    seed: any integer.
    epochs: the number of epochs; None: endless.
    process_index: which of the equal parts of each global batch to return.
    process_count: the number of parts.
    buckets: the allowed lengths, increasing. A batch has the smallest length
      that holds the longest row of the global batch, so all processes have the
      same.
    group_by_length: if n > 1, the shuffled rows are taken in groups of n
      batches. Each group is sorted by length and cut into batches, and the
      batches are shuffled. Batches then have less padding and are less random.

  Raises:
    ValueError: if the arguments do not fit each other or the rows.
  """
  _check(lengths, batch_size, process_index, process_count, buckets)
  if epochs is not None:
    require_positive(epochs=epochs)
  if group_by_length < 0:
    raise ValueError(
      f"group_by_length must be 0 or a number of batches; got"
      f" {group_by_length}."
    )
  if len(lengths) < batch_size:
    raise ValueError(
      f"There are {len(lengths)} rows to train on, fewer than one batch of"
      f" {batch_size}."
    )
  part = _part(batch_size, process_index, process_count)
  steps = len(lengths) // batch_size

  @functools.lru_cache(maxsize=1)
  def epoch_batches(epoch: int) -> np.ndarray:
    return order.batches(lengths, batch_size, group_by_length, seed, epoch)

  def batch(step: int, _: int) -> Batch:
    epoch, step_in_epoch = divmod(step, steps)
    rows = epoch_batches(epoch)[step_in_epoch]
    return fill(rows[part], _bucket(lengths[rows], buckets))

  batches = grain.MapDataset.range(steps).repeat(epochs).map_with_index(batch)
  return iter(batches.to_iter_dataset(_NO_THREADS))


class Visited:
  """Training batches, each repeated several times."""

  def __init__(self, batches: grain.DatasetIterator[Batch], visits: int):
    """Makes an iterator with a state that can be saved and restored.

    Args:
      batches: the batches, each once.
      visits: how often each batch is returned.
    """
    self._batches, self._visits = batches, visits
    self._batch: Batch = {}
    self._left = 0
    self._before: Any = None

  def __next__(self) -> Batch:
    if not self._left:
      self._before = self._batches.get_state()
      self._batch, self._left = next(self._batches), self._visits
    self._left -= 1
    return self._batch

  def get_state(self) -> dict[str, Any]:
    """Returns Grain's state, with the number of visits left if it is not 0."""
    if not self._left:
      return self._batches.get_state()
    return {**self._before, "visits_left": self._left}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues where `get_state` was called."""
    left = state.get("visits_left", 0)
    self._batches.set_state(
      {name: x for name, x in state.items() if name != "visits_left"}
    )
    self._left = 0
    if left:
      next(self)
      self._left = left


def evaluate(
  fill: Callable[[np.ndarray, int, np.ndarray], Batch],
  lengths: np.ndarray,
  batch_size: int,
  buckets: Sequence[int],
) -> grain.DatasetIterator[Batch]:
  """Returns an iterator that gives every row once, the longest rows first.

  Sorted rows need the least padding. The last batch is filled with copies of
  its first row.

  Args:
    fill: (rows, length, index) -> their batch. The index of a copy is -1; that
      of any other row is its place in `lengths`.
    lengths: [rows], the number of tokens of each row, at least one.
    batch_size: rows of a batch.
    buckets: the allowed lengths, increasing (see `train`).

  Raises:
    ValueError: if the arguments do not fit each other or the rows.
  """
  _check(lengths, batch_size, 0, 1, buckets)
  by_length = np.argsort(-lengths, kind="stable")

  def batch(start: int) -> Batch:
    rows = by_length[start : start + batch_size]
    copies = batch_size - len(rows)
    index = np.pad(rows, (0, copies), constant_values=-1)
    rows = np.pad(rows, (0, copies), constant_values=rows[0])
    return fill(rows, _bucket(lengths[rows], buckets), index)

  starts = grain.MapDataset.range(0, len(lengths), batch_size)
  return iter(starts.map(batch).to_iter_dataset(_NO_THREADS))


def require_positive(**values: int) -> None:
  """Refuses a value below 1; the message has its name."""
  for name, value in values.items():
    if value <= 0:
      raise ValueError(f"{name} must be at least 1; got {value}.")


def _bucket(lengths: np.ndarray, buckets: Sequence[int]) -> int:
  return next(bucket for bucket in buckets if bucket >= lengths.max())


def _part(batch_size: int, process_index: int, process_count: int) -> slice:
  rows = batch_size // process_count
  return slice(process_index * rows, (process_index + 1) * rows)


def _check(
  lengths: np.ndarray,
  batch_size: int,
  process_index: int,
  process_count: int,
  buckets: Sequence[int],
) -> None:
  require_positive(batch_size=batch_size, process_count=process_count)
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
  if not len(lengths):
    raise ValueError("There are no rows to batch; at least one is needed.")
  longest = int(lengths.max())
  if longest > buckets[-1]:
    raise ValueError(
      f"Row {int(lengths.argmax())} has {longest} tokens, more than the largest"
      f" bucket, {buckets[-1]}; tokenize with a smaller max_length or give a"
      " larger bucket."
    )
