"""Tasks of images: splits, few-shot draws, batches, and what a model gets."""

import hashlib

import numpy as np
import PIL.Image
import pytest
from sklearn import datasets

from train.data import images, objectives
from train.data import registry as tasks
from train.models.vit.config import IMAGENET

DIGITS = tasks.get("digits")
SPLITS = {"train": 600, "validation": 400, "test": 797}


def _small(rows):
  """Row i is an image of i's."""
  pixels = np.arange(rows, dtype=np.uint8)[:, None, None]
  return images.Images(
    np.broadcast_to(pixels, (rows, 2, 3)), np.arange(rows, dtype=np.int32) % 4
  )


def _numbers(batch):
  return batch["images"][:, 0, 0].tolist()


def test_digits_are_divided_by_a_hash_of_their_numbers():
  stored = datasets.load_digits()
  order = sorted(
    range(1797), key=lambda i: hashlib.sha256(f"digits {i}".encode()).digest()
  )
  start = 0
  for split, count in SPLITS.items():
    rows = images.load(DIGITS, split)
    wanted = order[start : start + count]
    assert rows.pixels.dtype == np.uint8 and len(rows) == count
    # Sixteen levels of ink, from 0 to 255.
    np.testing.assert_allclose(
      rows.pixels, stored.images[wanted] * 255 / 16, atol=0.5
    )
    np.testing.assert_array_equal(rows.labels, stored.target[wanted])
    assert np.bincount(rows.labels).min() > 0.07 * count
    start += count


def test_a_smaller_draw_is_part_of_a_larger_one_and_the_seed_draws():
  def drawn(limit, seed):
    rows = images.load(DIGITS, "train", None, limit, seed)
    assert len(rows) == limit
    # No two of the digits are the same.
    return [pixels.tobytes() for pixels in rows.pixels]

  assert drawn(100, 3)[:20] == drawn(20, 3)
  assert len(set(drawn(100, 3))) == 100
  assert len(set(drawn(100, 3)) & set(drawn(100, 4))) < 50


def test_an_epoch_has_every_row_once_in_an_order_of_its_own():
  rows = _small(12)
  batches = list(images.train_batches(rows, 4, seed=0, epochs=2))
  epochs = [
    [number for batch in half for number in _numbers(batch)]
    for half in (batches[:3], batches[3:])
  ]
  assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
  assert epochs[0] != epochs[1]
  for batch in batches:
    assert batch["images"].shape == (4, 2, 3)
    np.testing.assert_array_equal(batch["labels"], batch["images"][:, 0, 0] % 4)


def test_batches_resume_from_a_step():
  def fresh():
    return images.train_batches(_small(12), 4, seed=0)

  whole, resumed = fresh(), fresh()
  wanted = [_numbers(next(whole)) for _ in range(7)]
  resumed.set_state({"next_index": 5})
  assert [_numbers(next(resumed)) for _ in range(2)] == wanted[5:]


def test_processes_share_each_batch():
  whole = images.train_batches(_small(12), 4, seed=0, epochs=1)
  parts = [
    images.train_batches(_small(12), 4, 0, 1, process_index=i, process_count=2)
    for i in range(2)
  ]
  for batch, first, second in zip(whole, *parts, strict=True):
    assert _numbers(batch) == _numbers(first) + _numbers(second)


def test_an_evaluation_sees_every_row_once():
  rows = _small(10)
  seen = []
  for batch in images.eval_batches(rows, 4):
    real = batch["weights"] > 0
    assert (batch["index"][~real] == -1).all()
    assert (
      batch["index"][real].tolist() == np.array(_numbers(batch))[real].tolist()
    )
    seen += batch["index"][real].tolist()
  assert seen == list(range(10))


def test_images_are_enlarged_as_pillow_does_and_normalised():
  pixels = images.load(DIGITS, "train").pixels[:4]
  got = np.asarray(objectives.prepared(pixels, 56, *IMAGENET))
  assert got.shape == (4, 56, 56, 3) and got.dtype == np.float32
  mean = np.array([0.485, 0.456, 0.406])
  deviation = np.array([0.229, 0.224, 0.225])
  shades = got * deviation + mean
  # Of equal channels, coloured ones are the same.
  coloured = np.repeat(pixels[..., None], 3, -1)
  np.testing.assert_array_equal(
    objectives.prepared(coloured, 56, *IMAGENET), got
  )
  for image, shade in zip(pixels, shades):
    # Of floats, which Pillow does not round after each of its passes.
    large = PIL.Image.fromarray(image.astype(np.float32)).resize(
      (56, 56), PIL.Image.Resampling.BICUBIC
    )
    for channel in range(3):
      np.testing.assert_allclose(
        shade[..., channel] * 255,
        np.clip(np.asarray(large), 0, 255),
        rtol=0,
        atol=1e-3,
      )


def test_what_cannot_be_had_is_named():
  with pytest.raises(ValueError, match="no split 'dev'; it has train, valid"):
    images.load(DIGITS, "dev")
  with pytest.raises(ValueError, match="limit must be at least 1; got 0"):
    images.load(DIGITS, "train", limit=0)


def test_a_limit_beyond_the_rows_takes_all():
  assert len(images.load(DIGITS, "train", limit=601)) == 600
