"""Folders of images and labels in IDX files, the format of MNIST.

References:
  `The MNIST database <http://yann.lecun.com/exdb/mnist/>`_, its last section.
"""

from collections.abc import Mapping
import gzip
import math
import pathlib
import zlib

import numpy as np

from .. import bounds, checked
from ..errors import UsageError

PARTS = {"train": "train", "test": "t10k"}
"""From each split to the prefix of its file names."""
_BYTES = b"\0\0\x08"


def is_folder(path: pathlib.Path) -> bool:
  """Whether a folder has the images of the training split."""
  return _named(path, "train-images-idx3-ubyte") is not None


def read(path: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns the images and the labels of each split that a folder has.

  Args:
    path: the folder; its files may be gzipped.

  Returns:
    for `train` and `test`, the images, [rows, height, width] uint8, and the
    labels, [rows] uint8.

  Raises:
    UsageError: if a file is missing or invalid.
  """
  found = {}
  for split, name in PARTS.items():
    images = _named(path, f"{name}-images-idx3-ubyte")
    labels = _named(path, f"{name}-labels-idx1-ubyte")
    if images is None and labels is None:
      continue
    if images is None or labels is None:
      raise UsageError(
        f"{path} must have {name}-images-idx3-ubyte with "
        f"{name}-labels-idx1-ubyte (with or without .gz); one is missing."
      )
    found[split] = _array(images, 3), _array(labels, 1)
    first, second = map(len, found[split])
    if first != second:
      raise UsageError(
        f"{images} has {first:,} images, and {labels} {second:,} labels; each "
        "image must have one label."
      )
  return found


def tables(
  path: pathlib.Path, image: str, label: str
) -> Mapping[str, list[dict[str, object]]]:
  """Returns the rows of each split.

  Args:
    path: the folder.
    image: the name of the column of images.
    label: the name of the column of labels.
  """
  return {
    split: [
      {image: pixels, label: int(own)} for pixels, own in zip(images, labels)
    ]
    for split, (images, labels) in read(path).items()
  }


def _named(folder: pathlib.Path, name: str) -> pathlib.Path | None:
  for path in (folder / name, folder / f"{name}.gz"):
    if checked.is_file(path):
      return path
  return None


def _array(path: pathlib.Path, axes: int) -> np.ndarray:
  content = checked.read_bytes(path)
  if path.suffix == ".gz":
    bounds.check_gzip(path)
    try:
      content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
      raise UsageError(f"{path} is not a whole gzip file: {error}.") from error
  start = 4 + 4 * axes
  if len(content) < start or content[:4] != _BYTES + bytes([axes]):
    raise UsageError(
      f"{path} is not an IDX file of bytes with {axes} axes: it begins with "
      f"{content[:4].hex(' ') or 'nothing'}."
    )
  shape = np.frombuffer(content, ">u4", axes, 4).tolist()
  if len(content) - start != math.prod(shape):
    raise UsageError(
      f"{path} has {len(content) - start:,} bytes after its header, which "
      f"promises {' x '.join(map(str, shape))}."
    )
  return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
