"""Shifted test rows: other domains, texts with errors, poor images.

The changes depend on a row's place in its split, and not on the run's seed.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import random
from typing import Any

import numpy as np

from . import images, pipeline, regimes
from .options import DataOptions
from .task import Task

Examples = pipeline.Examples | images.Images

_MIDDLE = 127.5


def examples(
  task: Task,
  options: DataOptions,
  seed: int,
  read: Callable[[list[regimes.Row]], Examples],
) -> dict[str, Examples]:
  """Returns shifted test sets by their names, one for each severity.

  They are the task's test rows with errors, and the rows of other domains if
  the task has them.

  Args:
    task: a task of texts or images, with a source.
    options: how many rows.
    seed: the seed of the draw, if the number of rows has a limit.
    read: from rows to the model's examples, as `load.Reader.examples`.
  """
  rows, _ = regimes.rows(task, "test", options, seed)
  if task.image:
    clean = read(rows)
    assert isinstance(clean, images.Images)
    found: dict[str, Examples] = {
      name: dataclasses.replace(clean, pixels=change(clean.pixels))
      for name, change in IMAGES.items()
    }
  else:
    found = {
      name: read([_changed(task, row, i, change) for i, row in enumerate(rows)])
      for name, change in TEXTS.items()
    }
  for split in task.splits:
    if split.name not in ("train", "validation", "test"):
      found[split.name] = read(regimes.rows(task, split.name, options, seed)[0])
  return found


def typos(text: str, share: float, draw: random.Random) -> str:
  """Returns a text in which some words have a typing error.

  An error doubles a letter, leaves a letter out, or swaps two neighbours.

  Args:
    text: any text.
    share: the probability that a word of two or more characters gets an error.
    draw: draws the words, the errors and their places.
  """

  def typed(word: str) -> str:
    if draw.random() >= share or len(word) < 2:
      return word
    at = int(draw.random() * (len(word) - 1))
    left, right = word[at], word[at + 1]
    errors = (left + left + right, right, right + left)
    return word[:at] + errors[int(draw.random() * 3)] + word[at + 2 :]

  return " ".join(map(typed, text.split()))


def dropped_words(text: str, share: float, draw: random.Random) -> str:
  """Returns a text without some of its words.

  Args:
    text: any text; a text without words does not change.
    share: the probability that a word is left out; at least one word stays.
    draw: draws the words.
  """
  words = text.split()
  places = [draw.random() for _ in words]
  kept = [word for word, at in zip(words, places) if at >= share]
  return " ".join(kept or words[:1]) or text


def noise(pixels: np.ndarray, deviation: float) -> np.ndarray:
  """Returns images with Gaussian noise on each pixel, clipped to 0 and 255.

  Args:
    pixels: [rows, height, width] or [rows, height, width, 3] uint8.
    deviation: the noise's standard deviation, as a fraction of 255.
  """
  # NumPy promises that the numbers of a RandomState never change.
  added = np.random.RandomState(0).normal(0, 255 * deviation, pixels.shape)
  return _pixels(pixels + added)


def blur(pixels: np.ndarray, width: float) -> np.ndarray:
  """Returns images blurred by a Gaussian.

  Args:
    pixels: as of `noise`.
    width: the Gaussian's standard deviation, as a fraction of the height.
  """
  from scipy import ndimage  # imported here, since few runs need it

  sigma = width * pixels.shape[1]
  sigmas = (0, sigma, sigma, 0)[: pixels.ndim]
  return _pixels(ndimage.gaussian_filter(pixels.astype(np.float32), sigmas))


def contrast(pixels: np.ndarray, share: float) -> np.ndarray:
  """Returns images whose pixels are nearer to the middle grey.

  Args:
    pixels: as of `noise`.
    share: the factor of each pixel's distance from the middle grey.
  """
  return _pixels(_MIDDLE + share * (pixels.astype(np.float32) - _MIDDLE))


def rotation(pixels: np.ndarray, degrees: float) -> np.ndarray:
  """Returns images rotated about their centre.

  New corners get the colour of the nearest pixel.

  Args:
    pixels: as of `noise`.
    degrees: the angle; every second image turns the other way.
  """
  from scipy import ndimage

  turned = np.empty(pixels.shape, np.float32)
  for i, angle in enumerate((degrees, -degrees)):
    turned[i::2] = ndimage.rotate(
      pixels[i::2].astype(np.float32),
      angle,
      axes=(1, 2),
      reshape=False,
      order=1,
      mode="nearest",
    )
  return _pixels(turned)


TEXTS: Mapping[str, Callable[[str, random.Random], str]] = {
  "typos 10%": lambda text, draw: typos(text, 0.1, draw),
  "typos 30%": lambda text, draw: typos(text, 0.3, draw),
  "dropped words 10%": lambda text, draw: dropped_words(text, 0.1, draw),
  "dropped words 30%": lambda text, draw: dropped_words(text, 0.3, draw),
}
IMAGES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
  "noise 0.1": functools.partial(noise, deviation=0.1),
  "noise 0.2": functools.partial(noise, deviation=0.2),
  "blur 0.05": functools.partial(blur, width=0.05),
  "blur 0.1": functools.partial(blur, width=0.1),
  "contrast 0.5": functools.partial(contrast, share=0.5),
  "contrast 0.25": functools.partial(contrast, share=0.25),
  "rotation 15": functools.partial(rotation, degrees=15),
  "rotation 30": functools.partial(rotation, degrees=30),
}


def _changed(
  task: Task,
  row: regimes.Row,
  place: int,
  change: Callable[[str, random.Random], str],
) -> regimes.Row:
  # Python promises that a text gives the same numbers in every version.
  draw = random.Random(f"shift {place}")
  changed: dict[str, Any] = {}
  for name in task.fields:
    value = row[name]
    text = value.decode() if isinstance(value, bytes) else value
    changed[name] = change(text, draw)
  return {**row, **changed}


def _pixels(values: np.ndarray) -> np.ndarray:
  return np.clip(np.rint(values), 0, 255).astype(np.uint8)
