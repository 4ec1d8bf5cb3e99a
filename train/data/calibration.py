"""Scores of class probabilities, among them their calibration."""

import numpy as np

BINS = 15
SCORES = {
  "accuracy": "accuracy",
  "worst_class_accuracy": "accuracy of the worst class",
  "loss": "loss (nats)",
  "ece": f"calibration error ({BINS} bins)",
  "brier": "Brier score",
}
"""From each score of `scores` to its name in reports."""


def scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """Returns the scores of the class probabilities of a split.

  Args:
    probabilities: [rows, classes]; each row sums to 1.
    labels: [rows], the right classes.

  Returns:
    `accuracy`, as a fraction; `worst_class_accuracy`, the lowest accuracy of a
    class; `loss`, the mean cross-entropy in nats; `ece`, the expected
    calibration error; and `brier`, the Brier score. For `loss`, probabilities
    below float32's smallest normal number are raised to it.
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
  """Returns the mean distance between confidence and accuracy, over bins.

  Each bin contributes (rows in the bin / all rows) |accuracy - confidence|.

  Args:
    confidence: [rows], the probability of the predicted class.
    right: [rows], whether the prediction is right.
    bins: the number of bins of equal width; a confidence of 1 belongs to the
      last bin.

  References:
    Guo et al., `On calibration of modern neural networks
    <https://arxiv.org/abs/1706.04599>`_, 2017, equation 3.
  """
  place = np.minimum((confidence * bins).astype(int), bins - 1)
  gap = np.bincount(place, right - confidence, bins)
  return float(np.abs(gap).sum() / len(right))
