"""Rows made harder to learn from: wrong labels, and rare classes.

All is drawn by hashes of the seed and of a row's place in its draw, so that the
labels of a smaller draw are drawn as those of a larger one, and no generator's
version matters.
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
  """Returns the rows of a split as the options have them, and what was done.

  Args:
    task: with a source.
    split: one of the task's. Of any but `train`, and `validation` if
      `noisy_validation` is set, labels are as they came.
    options: how many rows, of which classes, with what labels.
    seed: of all that is drawn.

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
    # A draw without end: in the seed's order.
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
  # Another draw for each split: their places are the same numbers.
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
  """Returns the label that one rater of each row gave it, [rows].

  Args:
    votes: of each row, the labels that its raters gave it.
    draw: which draw this is; any text.
  """
  places = _shares(f"rater {draw}", len(votes))
  return np.array([x[int(at * len(x))] for x, at in zip(votes, places)])


def noisy(
  labels: np.ndarray, classes: int, share: float, kind: NoiseKind, draw: str
) -> np.ndarray:
  """Returns labels of which a share is wrong, [rows].

  Args:
    labels: [rows], from 0 to `classes` - 1.
    classes: how many there are.
    share: of the labels that become wrong, rounded to whole labels.
    kind: `symmetric`: labels of any class become any other, all alike.
      `class-dependent`: of the classes 1, 3, 5, ... the share becomes the class
      before, as 1 becomes 0; the classes 0, 2, 4, ... stay as they are.
    draw: which draw this is; any text.
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
  """Returns the rows that are kept, so that class frequencies fall off.

  The k-th most frequent of C classes keeps `ratio ** (k / (C - 1))` times as
  many rows as the most frequent one, k from 0, and at least one.

  Args:
    labels: [rows], in the order in which rows are taken.
    classes: how many there are, at least two.
    ratio: of the rarest class's rows to the most frequent one's, above 0.
    limit: the most rows to keep, which is no less than one a class; 0: all.

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
  """[count] numbers in [0, 1), uniform, of a text."""
  return np.array([hashing.share(f"{purpose} {i}") for i in range(count)])
