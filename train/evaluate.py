"""Evaluation on a split: predictions, the task's metrics, an interval."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn import linear_model, metrics, preprocessing
from sklearn import pipeline as sklearn_pipeline

from train.objectives import Items
from train.tasks import pipeline

METRICS: dict[str, Callable[[Any, Any], float]] = {
  "accuracy": metrics.accuracy_score,
  "matthews_correlation": metrics.matthews_corrcoef,
}


class Evaluation(NamedTuple):
  """How a model does on a split.

  Attributes:
    metrics: by name, as fractions.
    loss: mean cross-entropy in nats.
    correct: number of right predictions.
    rows: number of all.
    unit: what they are of; tokens depend on each other, rows do not.
  """

  metrics: dict[str, float]
  loss: float
  correct: int
  rows: int
  unit: str = "rows"

  def interval(self) -> tuple[float, float] | None:
    """Wilson's 95% interval of the accuracy; None where it does not hold."""
    if self.unit != "rows":
      return None
    found = stats.binomtest(self.correct, self.rows).proportion_ci(
      0.95, method="wilson"
    )
    return float(found.low), float(found.high)


def evaluate(
  predict: Callable[[pipeline.Batch], Items],
  examples: pipeline.Examples,
  batch_size: int,
  names: Sequence[str],
  pad_id: int,
) -> Evaluation:
  """Runs a model over all rows of a split.

  Args:
    predict: a batch to its items, (B,).
    examples: the rows.
    batch_size: rows at a time.
    names: of the metrics.
    pad_id: token id of padding.
  """
  labels = np.empty(len(examples), np.int64)
  losses = np.empty(len(examples), np.float64)
  for batch in pipeline.eval_batches(examples, batch_size, pad_id=pad_id):
    real = batch["weights"] > 0
    rows = batch["index"][real]
    found = predict(batch)
    labels[rows] = np.asarray(found.predictions)[real]
    losses[rows] = np.asarray(found.losses)[real]
  return _evaluation(examples.labels, labels, float(losses.mean()), names)


def logistic_regression(
  features: Callable[[pipeline.Batch], Any],
  train: pipeline.Examples,
  validation: pipeline.Examples,
  test: pipeline.Examples,
  batch_size: int,
  names: Sequence[str],
  pad_id: int,
) -> Evaluation:
  """Logistic regression on frozen features: what adapters have to beat.

  Its inverse regularisation, of 0.001 to 10, is chosen on the validation rows.

  Args:
    features: a batch to features, (B, D).
    train: rows to fit.
    validation: rows to choose by.
    test: rows to report.
    batch_size: rows at a time.
    names: of the metrics, the one to choose by first.
    pad_id: token id of padding.
  """

  def of(examples):
    found = {}
    for batch in pipeline.eval_batches(examples, batch_size, pad_id=pad_id):
      for index, row in zip(batch["index"], np.asarray(features(batch))):
        found[int(index)] = row
    return np.stack([found[i] for i in range(len(examples))])

  x_train, x_validation, x_test = map(of, (train, validation, test))
  models = [
    sklearn_pipeline.make_pipeline(
      preprocessing.StandardScaler(),
      linear_model.LogisticRegression(C=c, max_iter=5000),
    ).fit(x_train, train.labels)
    for c in (0.001, 0.01, 0.1, 1.0, 10.0)
  ]
  best = max(
    models,
    key=lambda m: METRICS[names[0]](validation.labels, m.predict(x_validation)),
  )
  loss = metrics.log_loss(
    test.labels, best.predict_proba(x_test), labels=best.classes_
  )
  return _evaluation(test.labels, best.predict(x_test), float(loss), names)


def _evaluation(true, predicted, loss, names) -> Evaluation:
  return Evaluation(
    metrics={name: float(METRICS[name](true, predicted)) for name in names},
    loss=loss,
    correct=int(np.sum(true == predicted)),
    rows=len(true),
  )
