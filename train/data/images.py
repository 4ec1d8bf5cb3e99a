"""Tasks of labelled images: their rows, few-shot draws, and batches."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import grain
import numpy as np
from sklearn import datasets

from . import batching, hashing
from .batching import Batch

# Digits have no published splits. The rows of the last are what is left.
_DIGITS_ROWS = {"train": 600, "validation": 400}


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
  """Images of one size with labels.

  Attributes:
    pixels: [rows, height, width] uint8, 0 for black and 255 for white.
    labels: [rows] int32.
  """

  pixels: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def take(self, rows: np.ndarray) -> "Images":
    """Returns these rows, in this order."""
    return Images(self.pixels[rows], self.labels[rows])


@dataclasses.dataclass(frozen=True)
class ImageTask:
  """A classification task over images.

  Attributes:
    name: what `--task` takes.
    labels: the classes' names; a label is an index into them.
    side: pixels along the side that a model is given, square.
    splits: reads all rows, by split.
    metrics: what is reported, the one to select by first.
  """

  name: str
  labels: tuple[str, ...]
  side: int
  splits: Callable[[], dict[str, Images]]
  metrics: tuple[str, ...] = ("accuracy",)


@functools.cache
def _digits() -> dict[str, Images]:
  """scikit-learn's 1,797 digits of 8 x 8 pixels, 600/400/797.

  They are the test rows of UCI's Optical Recognition of Handwritten Digits (E.
  Alpaydin and C. Kaynak, 1998, CC BY 4.0), of 13 writers, who are not told: a
  writer is in all splits. A row's split is by the hash of its number.
  """
  found: Any = datasets.load_digits()
  ink = np.round(found.images * (255 / 16)).astype(np.uint8)
  rows = Images(ink, found.target.astype(np.int32))
  order = np.array(
    sorted(range(len(rows)), key=lambda i: hashing.digest(f"digits {i}"))
  )
  ends = np.cumsum(list(_DIGITS_ROWS.values()))
  parts = np.split(order, ends)
  return {
    name: rows.take(part) for name, part in zip((*_DIGITS_ROWS, "test"), parts)
  }


_TASKS = (
  ImageTask(
    name="digits",
    labels=tuple("0123456789"),
    side=56,  # 4 x 4 patches of 14, one for 2 x 2 of the pixels there are
    splits=_digits,
  ),
)
_BY_NAME = {task.name: task for task in _TASKS}


def names() -> tuple[str, ...]:
  """Returns the names of all tasks of images."""
  return tuple(_BY_NAME)


def get(name: str) -> ImageTask:
  """Returns the task of that name.

  Raises:
    ValueError: if there is none.
  """
  if name not in _BY_NAME:
    raise ValueError(
      f"There is no task of images {name!r}; there is {', '.join(_BY_NAME)}."
    )
  return _BY_NAME[name]


def load(
  task: ImageTask, split: str, limit: int | None = None, seed: int = 0
) -> Images:
  """Returns the rows of a split of a task, in a fixed order.

  Args:
    task: the task.
    split: train, validation or test.
    limit: take this many rows only, chosen by `seed` alone; for one seed, a
      smaller choice is part of each larger one.
    seed: any integer.

  Raises:
    ValueError: if there is no such split, or fewer rows than `limit`.

  Examples:
    >>> rows = load(get("digits"), "train", limit=3)
    >>> rows.pixels.shape, rows.labels.shape
    ((3, 8, 8), (3,))
  """
  splits = task.splits()
  if split not in splits:
    raise ValueError(
      f"{task.name} has no split {split!r}; it has {', '.join(splits)}."
    )
  rows = splits[split]
  if limit is None:
    return rows
  batching.require_positive(limit=limit)
  if limit > len(rows):
    raise ValueError(
      f"limit is {limit}, but {task.name} has {len(rows)} rows in {split}."
    )
  places = sorted(range(len(rows)), key=lambda i: hashing.digest(f"{seed} {i}"))
  return rows.take(np.array(places[:limit]))


def train_batches(
  rows: Images,
  batch_size: int,
  seed: int,
  epochs: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
  """Returns an iterator over training batches, shuffled anew in each epoch.

  A batch is a function of the arguments and the step, as in
  `pipeline.train_batches`, where the arguments are explained.

  Returns:
    an iterator of dicts, with B = batch_size / process_count:
      images: [B, height, width] uint8.
      labels: [B] int32.

  Raises:
    ValueError: if the arguments do not fit each other or the rows.
  """
  return batching.train(
    lambda chosen, _: _batch(rows, chosen),
    _lengths(rows),
    batch_size,
    seed,
    epochs,
    process_index,
    process_count,
    _ONE_SIZE,
    group_by_length=0,
  )


def eval_batches(
  rows: Images,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
  """Returns an iterator that gives every row once, in order.

  The last batch is filled up with copies of its first row.

  Returns:
    an iterator of dicts as `train_batches` gives them, and in each
      weights: [B] float32, 1 on rows, 0 on copies.
      index: [B] int32, the row's place in `rows`; -1 on copies.

  Raises:
    ValueError: if the arguments do not fit each other or the rows.
  """

  def fill(chosen: np.ndarray, _: int, index: np.ndarray) -> Batch:
    return {
      **_batch(rows, chosen),
      "weights": (index >= 0).astype(np.float32),
      "index": index.astype(np.int32),
    }

  return batching.evaluate(
    fill, _lengths(rows), batch_size, process_index, process_count, _ONE_SIZE
  )


# To `batching`, an image is a row of one token.
_ONE_SIZE = (1,)


def _lengths(rows: Images) -> np.ndarray:
  return np.ones(len(rows), np.int64)


def _batch(rows: Images, chosen: np.ndarray) -> Batch:
  return {"images": rows.pixels[chosen], "labels": rows.labels[chosen]}
