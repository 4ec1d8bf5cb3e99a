"""Labelled images: reads rows, and makes batches of them."""

from collections.abc import Mapping, Sequence
import dataclasses
import io
import os
from typing import Any

import grain
import numpy as np

from .. import checked
from ..errors import UsageError
from . import batching, pipeline
from .batching import Batch
from .task import Task


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
  """Images of one size with labels.

  Attributes:
    pixels: [rows, height, width] uint8, from 0 for black to 255 for white; or
      [rows, height, width, 3] uint8 with red, green and blue.
    labels: [rows] int32, or float32 for a regression.
  """

  pixels: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)


def load(
  task: Task,
  split: str,
  data_dir: str | os.PathLike[str] | None = None,
  limit: int | None = None,
  seed: int = 0,
  side: int = 0,
) -> Images:
  """Returns the rows of a split of a task, in a fixed order.

  The arguments and errors are those of `pipeline.drawn`, and `side` is that of
  `decoded`.

  Examples:
    >>> from train.data import registry
    >>> rows = load(registry.get("digits"), "train", limit=3)
    >>> rows.pixels.shape, rows.labels.shape
    ((3, 8, 8), (3,))
  """
  rows = pipeline.drawn(task, split, data_dir, limit, seed)
  return decoded(task, rows, side)


def decoded(
  task: Task, rows: Sequence[Mapping[str, Any]], side: int = 0
) -> Images:
  """Returns rows with their images as arrays, all in memory.

  Image files may have any size and shape. They are read as red, green and
  blue, turned as their EXIF orientation says, and resized to a square by
  Pillow's bicubic filter. Arrays are not changed.

  Args:
    task: the task of the rows; a row without a label gets the label 0.
    rows: at least one row.
    side: the side of the square, in pixels.

  Raises:
    UsageError: if an image cannot be read (the message names the file), or if
      the arrays have different shapes.
  """
  pixels = [
    image if isinstance(image, np.ndarray) else _read(image, side)
    for image in (row[task.image] for row in rows)
  ]
  shapes = sorted({image.shape for image in pixels})
  if len(shapes) > 1:
    raise UsageError(
      f"The images of {task.name} have the shapes {shapes[:8]}; arrays must be"
      " of one shape."
    )
  labels = [row.get(task.label, 0) for row in rows]
  return Images(np.stack(pixels), pipeline.labels_of(labels))


def _read(image: str | bytes, side: int) -> np.ndarray:
  """Returns the pixels of a file or of its bytes, [side, side, 3] uint8."""
  import PIL.Image
  import PIL.ImageOps

  content = checked.read_bytes(image) if isinstance(image, str) else image
  try:
    with PIL.Image.open(io.BytesIO(content)) as opened:
      turned = PIL.ImageOps.exif_transpose(opened)
      coloured = turned.convert("RGB")
  except Exception as error:  # each of Pillow's formats raises its own types
    name = image if isinstance(image, str) else "An image"
    raise UsageError(f"{name} cannot be read as an image: {error}.") from error
  return np.asarray(
    coloured.resize((side, side), PIL.Image.Resampling.BICUBIC), np.uint8
  )


def train_batches(
  rows: Images,
  batch_size: int,
  seed: int,
  epochs: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
  group_by_length: int = 0,
) -> grain.DatasetIterator[Batch]:
  """Returns an iterator over training batches, shuffled anew in each epoch.

  A batch is a function of the arguments and the step. The arguments are those
  of `pipeline.train_batches`; `group_by_length` has no effect, because all
  images have one length.

  Returns:
    an iterator of dicts, with B = batch_size / process_count:
      images: [B, height, width] or [B, height, width, 3] uint8.
      labels: [B] int32, or float32 for a regression.

  Raises:
    ValueError: if the arguments do not fit each other or the rows.
  """
  del group_by_length
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


def eval_batches(rows: Images, batch_size: int) -> grain.DatasetIterator[Batch]:
  """Returns an iterator that gives every row once, in order.

  The last batch is filled with copies of its first row.

  Returns:
    an iterator of dicts with the arrays of `train_batches`, and with
      weights: [B] float32, 1 for rows, 0 for copies.
      index: [B] int32, the row's place in `rows`; -1 for copies.

  Raises:
    ValueError: if the arguments do not fit each other or the rows.
  """

  def fill(chosen: np.ndarray, _: int, index: np.ndarray) -> Batch:
    return {
      **_batch(rows, chosen),
      "weights": (index >= 0).astype(np.float32),
      "index": index.astype(np.int32),
    }

  return batching.evaluate(fill, _lengths(rows), batch_size, _ONE_SIZE)


# To `batching`, an image is a row of one token.
_ONE_SIZE = (1,)


def _lengths(rows: Images) -> np.ndarray:
  return np.ones(len(rows), np.int64)


def _batch(rows: Images, chosen: np.ndarray) -> Batch:
  return {"images": rows.pixels[chosen], "labels": rows.labels[chosen]}
