"""A run that stops as validations get no better, and what is not a number."""

import json
import math
import signal

from outcomes import rows
import pytest

from train import files
from train.data import scores as evaluate
from train.run import loop


@pytest.fixture
def validations(monkeypatch):
  """Has validations find these accuracies, in order; the test finds NaN.

  The loss is a number where the accuracy is.
  """

  def install(*accuracies):
    left = iter(accuracies)

    def predictor(prepared):
      def predict(evaluated, split):
        if split == "test":
          return evaluate.Evaluation({"accuracy": 0.25}, math.nan, 1, 4)
        found = next(left)
        loss = math.nan if math.isnan(found) else 0.5
        return evaluate.Evaluation({"accuracy": found}, loss, 1, 4)

      return predict

    monkeypatch.setattr(loop, "predictor", predictor)

  return install


def test_a_run_stops_after_validations_that_are_no_better_and_so_if_resumed(
  run, tmp_path, capsys, validations, signal_at
):
  folder, options = tmp_path / "run", ("--patience", "2", "--no-baseline")
  # At the steps 4, 8, 12 and 16; then it would be 20 and 24.
  validations(0.5, 0.75, 0.75, 0.5)
  signal_at(signal.SIGTERM, 13)
  assert run(folder, *options) == 0
  assert "interrupted after step 13" in capsys.readouterr().out
  assert run(folder, *options) == 0
  shown = capsys.readouterr().out
  assert "stopped after step 16 of 24: 2 validations were no better" in shown
  results = json.loads((folder / "results.json").read_text())
  assert (results["best_step"], results["stopped_at"]) == (8, 16)
  assert max(row["step"] for row in rows(folder)) == 16
  assert (folder / "checkpoints/last/16").is_dir()
  assert (
    "| steps | 24, stopped after 16 |" in (folder / "report.md").read_text()
  )


def test_what_is_no_number_is_null_in_json(run, tmp_path, validations):
  folder = tmp_path / "run"
  validations(*[math.nan, 0.5, math.nan, 0.25, 0.25, 0.25])
  assert run(folder, "--no-baseline") == 0
  texts = {
    path: path.read_text()
    for path in (
      *folder.rglob("*.json*"),
      *folder.glob("checkpoints/last/*/loop/metadata"),
    )
  }
  assert not any("NaN" in x or "Infinity" in x for x in texts.values())
  assert len(texts) >= 7
  for name in ("results.json", "metrics.jsonl"):
    assert "null" in texts[folder / name]
  results = json.loads((folder / "results.json").read_text())
  assert results["test"]["loss"] is None and results["stopped_at"] is None
  # What came before a number is worse than any.
  assert results["best_step"] == 8
  assert "unknown" in (folder / "report.md").read_text()


def test_finite_goes_into_lists_and_tables():
  found = files.finite({"a": [1.5, -math.inf, (math.nan, "x")], "b": {"c": 2}})
  assert found == {"a": [1.5, None, [None, "x"]], "b": {"c": 2}}
