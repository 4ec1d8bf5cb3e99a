"""Makes rows harder to learn from: wrong labels, and rare classes.

All draws use hashes of the seed and of a row's place, so they do not depend on
the version of a random generator. A row gets the same number in a smaller draw
as in a larger one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import hashing, pipeline
from .options import DataOptions, NoiseKind
from .task import Task

_ALL = 2**31

Row = Mapping[str, Any]


def rows(
  task: Task, split: str, options: DataOptions, seed: int
) -> tuple[list[Row], list[str]]:
  """Returns the rows of a split that the options ask for, and notes.

  Args:
    task: a task with a source.
    split: one of the task's splits. Labels change in `train` only, and in
      `validation` if `noisy_validation` is set.
    options: how many rows, of which classes, with which labels.
    seed: the seed of all draws.

  Returns:
    the rows, and sentences for the user on what was changed.

  Raises:
    ValueError: as `pipeline.drawn`.
    RuntimeError: as `pipeline.drawn`.
  """
  limit = options.limit(split)
  tailed = split == "train" and options.imbalance > 0
  found = pipeline.drawn(
    task,
    split,
    options.data_dir or None,
    # A limit gives the seed's order; this one is too large to drop rows.
    _ALL if tailed else limit or None,
    seed,
  )
  notes = []
  if tailed and found:
    labels = np.array([row[task.label] for row in found])
    kept = long_tailed(labels, len(task.labels), options.imbalance, limit)
    found = [found[i] for i in kept]
    counts = np.bincount(labels[kept], minlength=len(task.labels)).tolist()
    notes.append(f"Training rows of each class: {counts}.")
  if split == "train" or (split == "validation" and options.noisy_validation):
    found, said = _relabelled(task, split, options, seed, found)
    notes += said
  return found, notes


def _relabelled(
  task: Task, split: str, options: DataOptions, seed: int, found: list[Row]
) -> tuple[list[Row], list[str]]:
  if not found or not (options.one_rater or options.label_noise):
    return found, []
  true = np.array([row[task.label] for row in found])
  labels = true
  # The split is part of the name, because all splits have the same places.
  draw = f"{split} {seed}"
  if options.one_rater:
    labels = one_vote([row[task.votes] for row in found], draw)
  if options.label_noise:
    labels = noisy(
      labels,
      len(task.labels),
      options.label_noise,
      options.label_noise_kind,
      draw,
    )
  wrong = int(np.sum(labels != true))
  note = f"{wrong:,} of the {len(found):,} labels of {split} are wrong."
  return [
    {**row, task.label: label} for row, label in zip(found, labels.tolist())
  ], [note]


def one_vote(votes: Sequence[Sequence[int]], draw: str) -> np.ndarray:
  """Returns for each row the label of one of its raters, [rows].

  Args:
    votes: for each row, the labels of all its raters.
    draw: the name of the draw, any text.
  """
  places = _shares(f"rater {draw}", len(votes))
  return np.array([x[int(at * len(x))] for x, at in zip(votes, places)])


def noisy(
  labels: np.ndarray, classes: int, share: float, kind: NoiseKind, draw: str
) -> np.ndarray:
  """Returns labels with a share of wrong ones, [rows].

  Args:
    labels: [rows], from 0 to `classes` - 1.
    classes: the number of classes.
    share: the share of wrong labels, rounded to whole labels.
    kind: `symmetric`: labels of all classes can change, to any other class with
      the same probability. `class-dependent`: the share applies to the odd
      classes, whose labels change to the class below, such as 1 to 0. The even
      classes do not change.
    draw: the name of the draw, any text.
  """
  chosen = _shares(f"noise {draw}", len(labels))
  if kind == "symmetric":
    steps = _shares(f"label {draw}", len(labels)) * (classes - 1)
    wrong = (labels + 1 + steps.astype(int)) % classes
    sources = np.ones(len(labels), bool)
  else:
    wrong = labels - 1
    sources = labels % 2 == 1
  order = np.argsort(np.where(sources, chosen, np.inf), kind="stable")
  flipped = order[: round(share * int(sources.sum()))]
  found = labels.copy()
  found[flipped] = wrong[flipped]
  return found


def long_tailed(
  labels: np.ndarray, classes: int, ratio: float, limit: int = 0
) -> np.ndarray:
  """Returns the rows to keep, so that class frequencies fall exponentially.

  The classes are sorted by frequency, and k counts them from 0. Of C classes,
  class k keeps `ratio ** (k / (C - 1))` times the rows of class 0, and at least
  one row.

  Args:
    labels: [rows], in the order in which rows are taken.
    classes: the number of classes, at least two.
    ratio: the rarest class's rows over those of the most frequent class,
      above 0.
    limit: the most rows to keep, but at least one of each class; 0: no limit.

  Returns:
    [kept] places in `labels`, increasing.

  References:
    Cui et al., `Class-balanced loss <https://arxiv.org/abs/1901.05555>`_, 2019.
  """
  there = np.bincount(labels, minlength=classes)
  order = np.argsort(-there, kind="stable")
  falling = np.empty(classes)
  falling[order] = ratio ** (np.arange(classes) / (classes - 1))
  most = np.min(there / falling)
  if limit:
    most = min(most, limit / falling.sum())
  counts = np.minimum(np.maximum((most * falling + 1e-9).astype(int), 1), there)
  return np.sort(
    np.concatenate(
      [np.flatnonzero(labels == k)[: counts[k]] for k in range(classes)]
    )
  )


def _shares(purpose: str, count: int) -> np.ndarray:
  """Returns `count` uniform numbers in [0, 1), which depend on a text."""
  return np.array([hashing.share(f"{purpose} {i}") for i in range(count)])
