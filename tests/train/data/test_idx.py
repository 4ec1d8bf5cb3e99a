"""Folders of IDX files, as MNIST's, written as their format is defined."""

import gzip
import struct

import numpy as np
import pytest

from train.data import columns, options, tables
from train.data import registry as tasks
from train.data.options import DataOptions
from train.errors import UsageError

NAMES = {
  "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
  "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def _bytes(values):
  head = struct.pack(">HBB", 0, 8, values.ndim)
  return (
    head
    + struct.pack(f">{values.ndim}I", *values.shape)
    + bytes(values.ravel().tolist())
  )


@pytest.fixture
def folder(tmp_path):
  draws = np.random.RandomState(0)
  found = {}
  for split, names in NAMES.items():
    count = 40 if split == "train" else 7
    pixels = draws.randint(0, 256, (count, 4, 3)).astype(np.uint8)
    labels = (np.arange(count) % 2).astype(np.uint8)
    found[split] = pixels, labels
    for name, values in zip(names, found[split]):
      if split == "train":
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(_bytes(values)))
      else:
        (tmp_path / name).write_bytes(_bytes(values))
  return tmp_path, found


def test_images_and_labels_are_read_of_both_splits(folder):
  path, wanted = folder
  found = tables.read(path)
  assert list(found) == ["train", "test"]
  for split, (pixels, labels) in wanted.items():
    rows = found[split].rows
    np.testing.assert_array_equal([row["image"] for row in rows], pixels)
    assert [row["label"] for row in rows] == labels.tolist()


def test_a_task_holds_validation_rows_out_of_the_training_images(folder):
  path, _ = folder
  given = DataOptions(task="classification", path=str(path))
  options.check(given)
  task, _ = columns.fit(tasks.get("classification"), given)
  assert task.source is not None and task.labels == ("0", "1")
  sizes = [
    len(task.source.read(x, None)) for x in ("train", "validation", "test")
  ]
  assert sizes == [36, 4, 7]


@pytest.mark.parametrize(
  ("name", "content", "told"),
  [
    ("t10k-labels-idx1-ubyte", None, "one is missing"),
    ("t10k-labels-idx1-ubyte", b"", "it begins with nothing"),
    (
      "t10k-labels-idx1-ubyte",
      b"\0\0\x0d\1" + bytes(8),
      "begins with 00 00 0d",
    ),
    (
      "t10k-images-idx3-ubyte",
      struct.pack(">HBBIII", 0, 8, 3, 2**31, 2**31, 4),
      "has 0 bytes after its header, which promises 2147483648 x",
    ),
    (
      "t10k-labels-idx1-ubyte",
      struct.pack(">HBBI", 0, 8, 1, 2) + b"\0\1",
      "has 7 images, and .* 2 labels; each image must have one",
    ),
    ("train-images-idx3-ubyte.gz", b"\x1f\x8b", "is not a whole gzip file"),
  ],
)
def test_a_fault_is_told_of_with_its_file(folder, name, content, told):
  path, _ = folder
  if content is None:
    (path / name).unlink()
  else:
    (path / name).write_bytes(content)
  with pytest.raises(UsageError, match=told):
    tables.read(path)
