"""Scores of probabilities, against scikit-learn and plain loops."""

import numpy as np
import pytest
from sklearn import metrics

from train.data import calibration


@pytest.fixture(scope="module")
def drawn():
  draws = np.random.default_rng(0)
  logits = 2 * draws.normal(size=(500, 4))
  odds = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  labels = draws.integers(0, 3, 500)  # the class 3 has no row
  return odds.astype(np.float32), labels


def test_scores_are_those_of_scikit_learn(drawn):
  odds, labels = drawn
  found = calibration.scores(odds, labels)
  assert list(found) == list(calibration.SCORES)
  predicted = odds.argmax(-1)
  exact = odds.astype(np.float64)
  exact /= exact.sum(-1, keepdims=True)
  classes = [0, 1, 2, 3]
  # Float32's sums to 1 are 1 within 1e-7.
  assert found["loss"] == pytest.approx(
    metrics.log_loss(labels, exact, labels=classes), rel=1e-5
  )
  assert found["accuracy"] == metrics.accuracy_score(labels, predicted)
  worst = metrics.recall_score(
    labels, predicted, labels=[0, 1, 2], average=None
  )
  assert found["worst_class_accuracy"] == pytest.approx(min(worst))
  brier = np.mean(
    [
      np.square(row - np.eye(4)[label]).sum()
      for row, label in zip(exact, labels)
    ]
  )
  assert found["brier"] == pytest.approx(brier, rel=1e-5)


def test_the_calibration_error_is_its_definition(drawn):
  odds, labels = drawn
  bins = [[] for _ in range(15)]
  for row, label in zip(odds.astype(np.float64), labels):
    k = next(k for k in range(15) if k == 14 or row.max() < (k + 1) / 15)
    bins[k].append([row.max(), row.argmax() == label])
  expected = 0.0
  for members in filter(None, bins):
    confidence, accuracy = np.mean(members, 0)
    expected += len(members) / len(labels) * abs(accuracy - confidence)
  found = calibration.scores(odds, labels)["ece"]
  assert found == pytest.approx(expected, rel=1e-6)


def test_certainty_has_scores_of_its_own():
  sure = np.eye(2, dtype=np.float32)[[0, 1, 1]]
  right = calibration.scores(sure, np.array([0, 1, 1]))
  assert right == {
    "accuracy": 1.0,
    "worst_class_accuracy": 1.0,
    "loss": 0.0,
    "ece": 0.0,
    "brier": 0.0,
  }
  wrong = calibration.scores(sure, np.array([1, 0, 0]))
  assert wrong["ece"] == 1 and wrong["brier"] == 2
  assert wrong["loss"] == pytest.approx(-np.log(np.finfo(np.float32).tiny))
