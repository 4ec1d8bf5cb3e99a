"""Shifted test rows: what is changed, how much of it, and that it is fixed."""

import difflib
import random

import numpy as np
import pytest

from train.data import images, pipeline, shifts
from train.data import registry as tasks
from train.data.options import DataOptions

WORDS = [f"word{i}" for i in range(2000)]
TEXT = " ".join(WORDS)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_words_has_one_typing_error_each(share):
  found = shifts.typos(TEXT, share, random.Random(0)).split(" ")
  assert len(found) == len(WORDS)
  changed = [(a, b) for a, b in zip(WORDS, found) if a != b]
  # Three standard deviations of a share of 2,000 are at most 0.034.
  assert abs(len(changed) / len(WORDS) - share) < 0.034
  for before, after in changed:
    assert abs(len(before) - len(after)) <= 1
    # All but two letters of seven are where they were.
    assert difflib.SequenceMatcher(None, before, after).ratio() > 0.7
  lengths = {len(after) - len(before) for before, after in changed}
  assert lengths == ({-1, 0, 1} if share else set())


def test_words_of_one_letter_have_no_error():
  assert shifts.typos("a b c", 1.0, random.Random(0)) == "a b c"


def test_a_share_of_words_is_left_out_and_the_others_keep_their_order():
  found = shifts.dropped_words(TEXT, 0.3, random.Random(0)).split(" ")
  assert abs(len(found) / len(WORDS) - 0.7) < 0.034
  rest = iter(WORDS)
  assert all(word in rest for word in found)


@pytest.mark.parametrize("text", ["one two", "one", "", " "])
def test_of_words_one_stays_and_of_none_the_text(text):
  found = shifts.dropped_words(text, 1.0, random.Random(0))
  assert found == (text.split()[0] if text.strip() else text)


def _pixels(*shape):
  draws = np.random.RandomState(1)
  return draws.randint(60, 190, shape).astype(np.uint8)


def test_noise_has_its_deviation():
  pixels = _pixels(20, 16, 16)
  added = shifts.noise(pixels, 0.1).astype(float) - pixels
  # 5,120 draws: the deviation's own deviation is one percent.
  assert abs(added.std() / 25.5 - 1) < 0.04 and abs(added.mean()) < 1.5


def test_contrast_goes_towards_the_middle():
  pixels = np.array([[[0, 255, 127, 128]]], np.uint8)
  # 127.5 + (x - 127.5) / 4, rounded.
  expected = [96, 159, 127, 128]
  assert shifts.contrast(pixels, 0.25).ravel().tolist() == expected


def test_blur_is_a_convolution_with_a_gaussian():
  pixels = np.zeros((1, 33, 33, 3), np.uint8)
  pixels[0, 16, 16] = [255, 128, 0]
  found = shifts.blur(pixels, 2 / 33)[0].astype(float)
  at = np.arange(33) - 16.0
  bell = np.exp(-(at**2) / (2 * 2.0**2))
  kernel = np.outer(bell, bell) / bell.sum() ** 2
  np.testing.assert_allclose(found[..., 0], 255 * kernel, atol=0.51)
  np.testing.assert_allclose(found[..., 1], 128 * kernel, atol=0.51)
  assert not found[..., 2].any()


@pytest.mark.parametrize("channels", [(), (3,)])
def test_a_turn_of_ninety_degrees_is_that_of_the_array(channels):
  pixels = _pixels(3, 8, 8, *channels)
  found = shifts.rotation(pixels, 90)
  for i, turns in enumerate((1, -1, 1)):
    expected = np.rot90(pixels[i], turns, (0, 1))
    np.testing.assert_array_equal(found[i], expected)


def test_digits_come_in_each_shift_with_their_labels():
  task, given = tasks.get("digits"), DataOptions(task="digits")

  def read(rows):
    return images.decoded(task, rows)

  found = shifts.examples(task, given, 0, read)
  clean = images.load(task, "test")
  assert list(found) == list(shifts.IMAGES)
  for rows in found.values():
    assert isinstance(rows, images.Images)
    np.testing.assert_array_equal(rows.labels, clean.labels)
    assert rows.pixels.dtype == np.uint8
    assert (rows.pixels != clean.pixels).any()


def test_sentences_are_shifted_the_same_for_all_seeds():
  task = tasks.get("rated-sentences/tweets")
  seen = {}

  def examples(seed, **fields):
    read = []

    def keep(rows):
      read.append([row["sentence"] for row in rows])
      labels = pipeline.labels_of([row["label"] for row in rows])
      return images.Images(np.zeros((len(rows), 1, 1), np.uint8), labels)

    given = DataOptions(task=task.name, **fields)
    found = shifts.examples(task, given, seed, keep)
    seen[seed] = dict(zip(found, read))
    return found

  found = examples(0)
  examples(1)
  assert seen[0] == seen[1]
  assert list(found) == [*shifts.TEXTS, "movies", "products"]
  assert [len(x) for x in found.values()] == [2023] * 4 + [10_603, 3_686]
  few = examples(2, eval_rows=10)
  assert {len(x) for x in few.values()} == {10}
