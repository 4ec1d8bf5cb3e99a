"""Scores at equal training loss, of curves whose crossings are known."""

import types

import numpy as np
import pytest

from train.study import memorisation, plots


def _row(losses, scores, every=2):
  """A run whose loss is logged at each step, and validated `every` steps."""
  steps = range(1, len(losses) + 1)
  ends = steps[every - 1 :: every]
  return {
    "metric": "accuracy",
    "curves": {
      "loss": [[i, x] for i, x in zip(steps, losses)],
      "validation_accuracy": [[i, x] for i, x in zip(ends, scores)],
    },
  }


# Means of 1.0, 0.6 and 0.2 nats at the validations.
FAST = _row([1.1, 0.9, 0.7, 0.5, 0.3, 0.1], [0.5, 0.6, 0.4])
# Of 1.0, 0.8 and 0.5.
SLOW = _row([1.0, 1.0, 0.8, 0.8, 0.5, 0.5], [0.5, 0.7, 0.8])


def _result(**finals):
  rows = {int(seed[1:]): row for seed, row in finals.items()}
  return types.SimpleNamespace(finals=rows, trials=[])


def test_a_validation_has_the_mean_loss_of_the_steps_before_it():
  run = memorisation.trajectory(FAST, "accuracy")
  assert run is not None
  np.testing.assert_allclose(run.loss, [1.0, 0.6, 0.2])
  np.testing.assert_allclose(run.score, [0.5, 0.6, 0.4])


@pytest.mark.parametrize(
  "row",
  [
    {"curves": {}},
    {"curves": {"loss": [[1, 0.5]], "validation_accuracy": [[1, 0.5]]}},
    # No step was logged between the two validations.
    {
      "curves": {
        "loss": [[1, 0.5]],
        "validation_accuracy": [[1, 0.5], [2, 0.6]],
      }
    },
    {
      "curves": {
        "loss": [[1, None]],
        "validation_accuracy": [[1, 0.5], [2, 0.6]],
      }
    },
  ],
)
def test_a_run_without_curves_has_no_trajectory(row):
  assert memorisation.trajectory(row, "accuracy") is None


@pytest.mark.parametrize(
  ("level", "score"),
  [(1.2, 0.5), (1.0, 0.5), (0.8, 0.55), (0.6, 0.6), (0.3, 0.45), (0.2, 0.4)],
)
def test_scores_are_interpolated_where_the_loss_first_is_that_low(level, score):
  run = memorisation.trajectory(FAST, "accuracy")
  assert run is not None
  assert memorisation.at_loss(run, level) == pytest.approx(score)


def test_a_loss_that_rises_again_does_not_count():
  losses = np.array([1.0, 0.4, 0.7, 0.2])
  run = memorisation.Trajectory(losses, np.array([0.1, 0.2, 0.9, 0.4]))
  assert memorisation.at_loss(run, 0.7) == pytest.approx(0.15)
  # From the lowest loss before, at the third validation, to the fourth.
  assert memorisation.at_loss(run, 0.3) == pytest.approx(0.65)


def test_both_are_compared_at_the_loss_that_both_reach():
  method, reference = _result(s0=SLOW, s1=FAST), _result(s0=FAST, s1=FAST)
  found = memorisation.paired(method, reference, "accuracy")
  assert found is not None
  # Of seed 0 at 0.5 nats, three quarters of the way from 0.6 to 0.2 before it;
  # of seed 1 at 0.2.
  assert found.level == pytest.approx(0.35)
  assert found.differences == pytest.approx([0.8 - 0.55, 0.0])
  assert memorisation.paired(_result(s5=FAST), reference, "accuracy") is None


def test_the_table_and_the_figure_have_every_method_with_curves(
  study, tmp_path
):
  own = study(tmp_path / "made", landscape=None)
  results = {
    "LoRA": _result(s0=FAST, s1=FAST),
    "Bi-LoRA": _result(s0=SLOW, s1=SLOW),
    "frozen": _result(s0={"metric": "accuracy"}),
  }
  lines = memorisation.table(own, results)
  cells = ["Bi-LoRA", "2", "0.500", "55.00", "80.00", "+25.00 ± 0.00"]
  assert lines[2] == f"| {' | '.join(cells)} | 0.5 | 0.5 |"
  assert len(lines) == 3
  with plots.styled():
    canvas = memorisation.figure(own, results)
  assert canvas is not None
  (axes,) = canvas.axes
  np.testing.assert_allclose(axes.lines[0].get_xdata(), [1.0, 0.6, 0.2])
  np.testing.assert_allclose(axes.lines[1].get_ydata(), [50, 70, 80])
