"""Evaluation on a split: predictions, the task's metrics, an interval."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn import linear_model, metrics, preprocessing
from sklearn import pipeline as sklearn_pipeline

from .batching import Batch
from .objectives import Items

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


class Rows(NamedTuple):
  """The rows of a split.

  Attributes:
    labels: [rows].
    batches: each row once, as `pipeline.eval_batches` gives them.
  """

  labels: np.ndarray
  batches: Iterable[Batch]


def evaluate(
  predict: Callable[[Batch], Items], rows: Rows, names: Sequence[str]
) -> Evaluation:
  """Runs a model over all rows of a split.

  Args:
    predict: a batch to its items, (B,).
    rows: of the split.
    names: of the metrics.
  """
  labels = np.empty(len(rows.labels), np.int64)
  losses = np.empty(len(rows.labels), np.float64)
  for batch in rows.batches:
    real = batch["weights"] > 0
    index = batch["index"][real]
    found = predict(batch)
    labels[index] = np.asarray(found.predictions)[real]
    losses[index] = np.asarray(found.losses)[real]
  return _evaluation(rows.labels, labels, float(losses.mean()), names)


def logistic_regression(
  features: Callable[[Batch], Any],
  train: Rows,
  validation: Rows,
  test: Rows,
  names: Sequence[str],
) -> Evaluation:
  """Logistic regression on frozen features: what adapters have to beat.

  Its inverse regularisation, of 0.001 to 10, is chosen on the validation rows.

  Args:
    features: a batch to features, (B, D).
    train: rows to fit.
    validation: rows to choose by.
    test: rows to report.
    names: of the metrics, the one to choose by first.
  """

  def of(rows):
    found = {}
    for batch in rows.batches:
      for index, row in zip(batch["index"], np.asarray(features(batch))):
        found[int(index)] = row
    return np.stack([found[i] for i in range(len(rows.labels))])

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
