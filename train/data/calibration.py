"""How far probabilities of classes can be trusted."""

import numpy as np

BINS = 15
SCORES = {
  "accuracy": "accuracy",
  "worst_class_accuracy": "accuracy of the worst class",
  "loss": "loss (nats)",
  "ece": f"calibration error ({BINS} bins)",
  "brier": "Brier score",
}
"""What `scores` gives, and what a reader is told that it is."""


def scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Returns what the probabilities of all rows of a split say.

  Args:
    probabilities: [rows, classes], each row's sum 1.
    labels: [rows], the right classes.

  Returns:
    `accuracy` and `worst_class_accuracy`, that of the class of the split with
    the lowest one, as fractions; `loss`, the mean cross-entropy in nats, where
    no probability counts as less than float32's smallest; `ece` and `brier`.
  """
  found = np.asarray(probabilities, np.float64)
  rows = np.arange(len(labels))
  right = found.argmax(-1) == labels
  least = np.finfo(np.float32).tiny
  truth = np.zeros_like(found)
  truth[rows, labels] = 1
  return {
    "accuracy": float(right.mean()),
    "worst_class_accuracy": min(
      float(right[labels == label].mean()) for label in np.unique(labels)
    ),
    "loss": float(-np.log(np.maximum(found[rows, labels], least)).mean()),
    "ece": expected_calibration_error(found.max(-1), right),
    "brier": float(np.square(found - truth).sum(-1).mean()),
  }


def expected_calibration_error(
  confidence: np.ndarray, right: np.ndarray, bins: int = BINS
) -> float:
  """Returns the mean distance of confidence and accuracy, over equal bins.

  That is sum over bins of (rows in it / rows) |its accuracy - its confidence|.

  Args:
    confidence: [rows], the probability of the class that is predicted.
    right: [rows], whether it is the right one.
    bins: of equal width, in which 1 belongs to the last.

  References:
    Guo et al., `On calibration of modern neural networks
    <https://arxiv.org/abs/1706.04599>`_, 2017, equation 3.
  """
  place = np.minimum((confidence * bins).astype(int), bins - 1)
  gap = np.bincount(place, right - confidence, bins)
  return float(np.abs(gap).sum() / len(right))
