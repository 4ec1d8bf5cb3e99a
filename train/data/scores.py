"""Evaluation on a split: predictions, the task's metrics, an interval.

Functions import SciPy's statistics and scikit-learn when they need them. These
imports take as long as all other imports at the start of a run.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .batching import Batch
from .objectives import Items


def _accuracy(true: Any, predicted: Any) -> float:
  return float(np.mean(np.equal(true, predicted)))


def _of_sklearn(name: str) -> Callable[[Any, Any], float]:
  def found(true: Any, predicted: Any) -> float:
    from sklearn import metrics

    return float(getattr(metrics, name)(true, predicted))

  return found


def _correlation(name: str) -> Callable[[Any, Any], float]:
  """Returns a correlation of SciPy; 0 if one side is constant."""

  def found(true: Any, predicted: Any) -> float:
    from scipy import stats

    if len(true) < 2 or np.ptp(true) == 0 or np.ptp(predicted) == 0:
      return 0.0
    return float(getattr(stats, name)(true, predicted).statistic)

  return found


METRICS: dict[str, Callable[[Any, Any], float]] = {
  "accuracy": _accuracy,
  "matthews_correlation": _of_sklearn("matthews_corrcoef"),
  "rmse": _of_sklearn("root_mean_squared_error"),
  "pearson": _correlation("pearsonr"),
  "spearman": _correlation("spearmanr"),
}
LOWER_IS_BETTER = ("rmse", "perplexity")
VALUES = "values"
"""The unit of a regression's predictions, which are not right or wrong."""


class Evaluation(NamedTuple):
  """The scores of a model on a split.

  Attributes:
    metrics: the values of the metrics by name; shares are fractions.
    loss: the mean cross-entropy in nats, or the mean squared error of
      standardised values.
    correct: the number of right predictions; 0 for values.
    rows: the number of all predictions.
    unit: what the predictions are of: independent `rows`, `tokens`, which
      depend on each other, or `values`, which are not right or wrong.
  """

  metrics: dict[str, float]
  loss: float
  correct: int
  rows: int
  unit: str = "rows"

  def interval(self) -> tuple[float, float] | None:
    """Returns Wilson's 95% interval of the accuracy; None unless for rows."""
    if self.unit != "rows":
      return None
    from scipy import stats

    found = stats.binomtest(self.correct, self.rows).proportion_ci(
      0.95, method="wilson"
    )
    return float(found.low), float(found.high)

  def to_json(self) -> dict[str, Any]:
    """Returns the numbers in the form of a run's `results.json`."""
    return {
      **self.metrics,
      "loss": self.loss,
      "rows": self.rows,
      "unit": self.unit,
      "accuracy_95": self.interval(),
    }


class Rows(NamedTuple):
  """The rows of a split.

  Attributes:
    labels: [rows], the true labels.
    batches: batches as of `pipeline.eval_batches`, with each row once.
  """

  labels: np.ndarray
  batches: Iterable[Batch]


def evaluate(
  predict: Callable[[Batch], Items], rows: Rows, names: Sequence[str]
) -> Evaluation:
  """Evaluates a model on all rows of a split.

  Args:
    predict: from a batch to its items, (B,).
    rows: the rows of the split.
    names: the names of the metrics.
  """
  labels = np.empty(len(rows.labels), rows.labels.dtype)
  losses = np.empty(len(rows.labels), np.float64)
  for batch in rows.batches:
    real = batch["weights"] > 0
    index = batch["index"][real]
    found = predict(batch)
    labels[index] = np.asarray(found.predictions)[real]
    losses[index] = np.asarray(found.losses)[real]
  return _evaluation(rows.labels, labels, float(losses.mean()), names)


def baseline(
  features: Callable[[Batch], Any],
  train: Rows,
  validation: Rows,
  test: Rows,
  names: Sequence[str],
) -> Evaluation:
  """Evaluates a linear model of frozen features, which adapters should beat.

  The model is a logistic regression for classes, and a ridge regression for
  values. The validation rows choose its inverse regularisation, from 0.001 to
  10.

  Args:
    features: from a batch to features, (B, D).
    train: the rows to fit.
    validation: the rows that choose the regularisation.
    test: the rows of the evaluation.
    names: the names of the metrics; the first one chooses the regularisation.
  """

  def of(rows):
    found = {}
    for batch in rows.batches:
      for index, row in zip(batch["index"], np.asarray(features(batch))):
        found[int(index)] = row
    return np.stack([found[i] for i in range(len(rows.labels))]), rows.labels

  return linear(of(train), of(validation), of(test), names)


def linear(
  train: tuple[np.ndarray, np.ndarray],
  validation: tuple[np.ndarray, np.ndarray],
  test: tuple[np.ndarray, np.ndarray],
  names: Sequence[str],
) -> Evaluation:
  """As `baseline`, from the features and labels of each split.

  The features are (rows, D), and the labels are (rows,).
  """
  from sklearn import linear_model, metrics, pipeline, preprocessing

  (x_train, y_train), (x_validation, y_validation) = train, validation
  x_test, y_test = test
  values = y_train.dtype.kind == "f"
  models = [
    pipeline.make_pipeline(
      preprocessing.StandardScaler(),
      linear_model.Ridge(alpha=1 / c)
      if values
      else linear_model.LogisticRegression(C=c, max_iter=5000),
    ).fit(x_train, y_train)
    for c in (0.001, 0.01, 0.1, 1.0, 10.0)
  ]
  best = max(
    models,
    key=lambda m: better(
      names[0], METRICS[names[0]](y_validation, m.predict(x_validation))
    ),
  )
  predicted = best.predict(x_test)
  if values:
    errors = (predicted - y_test) / np.std(y_train)
    loss = np.mean(np.square(errors))
  else:
    loss = metrics.log_loss(
      y_test, best.predict_proba(x_test), labels=best.classes_
    )
  return _evaluation(y_test, predicted, float(loss), names)


def better(name: str, value: float) -> float:
  """Returns a number that is higher for a better value of a metric."""
  return -value if name in LOWER_IS_BETTER else value


def _evaluation(true, predicted, loss, names) -> Evaluation:
  values = true.dtype.kind == "f"
  return Evaluation(
    metrics={name: float(METRICS[name](true, predicted)) for name in names},
    loss=loss,
    correct=0 if values else int(np.sum(true == predicted)),
    rows=len(true),
    unit=VALUES if values else "rows",
  )
