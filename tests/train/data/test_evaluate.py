"""Evaluation: its figures by hand, its order, and the baseline."""

import math

import numpy as np
import pytest

from train.data import objectives, pipeline
from train.data import scores as evaluate

NAMES = ("accuracy", "matthews_correlation")


def _examples(labels, lengths=None) -> pipeline.Examples:
  """Row i is the token i, as often as its length says."""
  labels = np.asarray(labels, np.int32)
  lengths = np.ones(len(labels), int) if lengths is None else lengths
  tokens = np.repeat(np.arange(len(labels), dtype=np.int32), lengths)
  return pipeline.Examples(
    tokens=tokens,
    token_types=np.zeros_like(tokens),
    offsets=np.concatenate([[0], np.cumsum(lengths)]),
    labels=labels,
  )


def _rows(examples, size) -> evaluate.Rows:
  batches = pipeline.eval_batches(examples, size, pad_id=0)
  return evaluate.Rows(examples.labels, batches)


def _answers(predicted, losses):
  """A model that knows each row by its first token."""
  predicted, losses = np.asarray(predicted), np.asarray(losses)

  def predict(batch):
    rows = batch["tokens"][:, 0]
    return objectives.Items(
      losses=losses[rows],
      weights=np.ones(len(rows)),
      predictions=predicted[rows],
      right=np.zeros(len(rows)),
    )

  return predict


def test_metrics_are_those_of_the_definition():
  draws = np.random.default_rng(0)
  true, predicted = draws.integers(0, 2, (2, 37))
  losses = draws.random(37)
  # Eight rows at a time, the longest first, the last three beside copies.
  found = evaluate.evaluate(
    _answers(predicted, losses),
    _rows(_examples(true, draws.integers(1, 16, 37)), 8),
    NAMES,
  )
  tp, tn = (np.sum((true == k) & (predicted == k)) for k in (1, 0))
  fp, fn = (np.sum((true != k) & (predicted == k)) for k in (1, 0))
  root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
  assert found.metrics == {
    "accuracy": pytest.approx((tp + tn) / 37),
    "matthews_correlation": pytest.approx((tp * tn - fp * fn) / root),
  }
  assert (found.correct, found.rows) == (tp + tn, 37)
  assert found.loss == pytest.approx(losses.mean())


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_the_batch_size_does_not_matter(batch_size):
  draws = np.random.default_rng(1)
  true, predicted = draws.integers(0, 2, (2, 19))
  examples = _examples(true, draws.integers(1, 16, 19))
  model = _answers(predicted, draws.random(19))
  one, other = (
    evaluate.evaluate(model, _rows(examples, size), NAMES)
    for size in (19, batch_size)
  )
  assert one == other


@pytest.mark.parametrize(
  ("correct", "rows"), [(0, 10), (10, 10), (7, 10), (2057, 2570)]
)
def test_the_interval_is_wilsons(correct, rows):
  z, share = 1.959963984540054, correct / rows
  centre = share + z**2 / (2 * rows)
  half = z * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
  ends = (
    (centre - half) / (1 + z**2 / rows),
    (centre + half) / (1 + z**2 / rows),
  )
  found = evaluate.Evaluation({}, 0.0, correct, rows).interval()
  assert found == pytest.approx(ends, abs=1e-9)


def _features(table):
  return lambda batch: table[batch["tokens"][:, 0]]


def test_logistic_regression_is_right_on_features_that_can_be_divided():
  draws = np.random.default_rng(2)
  labels = draws.integers(0, 2, 40)
  table = draws.normal(size=(40, 5))
  table[:, 2] = np.where(labels == 1, 3.0, -3.0)
  examples = _examples(labels, draws.integers(1, 16, 40))
  found = evaluate.baseline(
    _features(table), *(_rows(examples, 8) for _ in range(3)), NAMES
  )
  assert found.metrics == {"accuracy": 1.0, "matthews_correlation": 1.0}
  assert found.rows == 40
  assert 0 < found.loss < math.log(2)


def test_the_validation_rows_choose_the_regularisation():
  # One strong feature that is right, and weak ones that explain noise in the
  # training labels: only a strong regularisation leaves the noise alone.
  draws = np.random.default_rng(3)
  true = np.repeat([0, 1], 30)
  table = np.concatenate(
    [np.where(true, 1.0, -1.0)[:, None], draws.normal(size=(60, 40))], 1
  )
  noisy = np.where(draws.random(60) < 0.3, 1 - true, true)
  train, clean = _examples(noisy), _examples(true)

  def accuracy(validation):
    found = evaluate.baseline(
      _features(table),
      *(_rows(examples, 8) for examples in (train, validation, clean)),
      NAMES,
    )
    return found.metrics["accuracy"]

  assert accuracy(clean) > accuracy(train)
