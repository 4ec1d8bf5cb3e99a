"""Studies of regimes: what is shared between them, and what is tested after."""

import pathlib

import pytest

from train import __main__ as program
from train.data import shifts
from train.study import plan, record, report, runs, spec, training, workers

MOVIES = "rated-sentences/movies"
TASKS = [
  {"name": "rater", "task": MOVIES, "one_rater": True},
  {"name": "noise", "task": MOVIES, "label_noise": 0.4},
]


@pytest.fixture
def two_regimes(study, tmp_path):
  """A method on one task by raters' labels and by made ones."""
  own = study(
    tmp_path,
    task=TASKS,
    method=[
      {
        "name": "LoRA",
        "method": "lora",
        "after": "last,shifted",
        "eval_rows": 24,
        "tune": {"learning_rate": [0.01, 0.02]},
      }
    ],
    sharpness={"rows": 0},
    recovery=None,
    landscape=None,
  )
  assert len(own.cells) == 2
  return own


def test_a_method_is_compiled_once_for_its_regimes_trials_and_seeds(
  two_regimes, tmp_path
):
  kept: training.Kept = {}
  rows = []
  for cell in two_regimes.cells:
    trial = plan.trials(two_regimes, cell)[0]
    finals = plan.finals(two_regimes, cell, trial.point)
    rows += [
      training.run(run, tmp_path / run.key, kept) for run in (trial, *finals)
    ]
  compiled = {
    kind: [x for key, x in kept.items() if key[0] == kind]
    for kind in ("step", "predict", "after")
  }
  ((step,), (predict,), (after,)) = compiled.values()
  # Rows are cut at 16 tokens, which is one length.
  assert step._cache_size() == predict._cache_size() == 1
  assert after.answers._cache_size() == 1
  # The labels differ, and so does what is learned from them.
  assert len({row["data"] for row in rows}) == 6
  names = ["test", "last step", *shifts.TEXTS, "products", "tweets"]
  for row in rows:
    assert list(row.get("after", {})) == names * (row["stage"] == "final")
    if row["stage"] == "final":
      assert row["after"]["test"]["accuracy"] == row["test"]["accuracy"]


def test_what_is_tested_after_training_is_in_the_report(
  two_regimes, monkeypatch
):
  def replay(run, folder, kept):
    seed = run.config.optimisation.seed
    numbers = dict.fromkeys(
      ("accuracy", "worst_class_accuracy", "loss", "ece", "brier"), 0.5
    )
    tested = {
      "test": {"accuracy": 0.5, "loss": 1.0, "rows": 4, "unit": "rows"},
      "after": {"test": numbers, "int3": {**numbers, "accuracy": 0.25 + seed}},
    }
    return {
      "key": run.key,
      "label": run.cell.label,
      "task": run.cell.task,
      "stage": run.stage,
      "seed": seed,
      "point": dict(run.point),
      "config": plan.config_lib.flat(run.config),
      "sharpness_options": None,
      "failed": None,
      "score": 0.5,
      "metric": "accuracy",
      "machine": "",
      "jax": "",
      "date": "",
      "curves": {"loss": [[1, 1.0]]},
      "gradients_per_step": 1.0,
      "step_seconds": 0.1,
      "seconds": 0.0,
      **(tested if run.stage == "final" else {}),
    }

  monkeypatch.setattr(training, "run", replay)
  runs.work(two_regimes, two_regimes.cells)
  text = report.write(two_regimes).read_text()
  assert text.count("### After training") == 2
  # The mean of 25 and 125%, its interval t(1) = 12.7 times 50.
  assert "| LoRA | 2 | 50.00 ± 0.00 | 75.00 ± 635.31 |" in text
  assert "| LoRA | 0.5000 ± 0.0000 | 0.5000 ± 0.0000 |" in text


@pytest.mark.parametrize("count", [1, 3])
def test_trials_alone_are_run_if_that_is_asked(
  tables, tmp_path, monkeypatch, count
):
  own = spec.parse(tables(tmp_path / "study"))
  monkeypatch.setattr(spec, "read", lambda path: own)
  monkeypatch.setattr(report, "write", lambda study: study.folder)
  called = []
  monkeypatch.setattr(runs, "work", lambda *arguments: called.append(arguments))
  monkeypatch.setattr(
    workers, "start", lambda *arguments: called.append(arguments) or 0
  )
  chosen = ["--only", "Bi-LoRA/", "--tune"]
  command = ["study", "a.toml", *chosen, "--workers", str(count)]
  assert program.main(command) == 0
  if count > 1:
    # The workers are asked for the same.
    assert called == [(pathlib.Path("a.toml"), chosen, 3)]
    return
  ((study, cells),) = called
  (cell,) = cells
  assert cell.label == "Bi-LoRA"
  planned = plan.known_runs(study, cell, {})
  assert [run.stage for run in planned] == ["tune", "tune"]
  scored = {run.key: {"score": 0.5} for run in planned}
  assert plan.complete(study, cells, scored)
  assert not plan.complete(study, list(own.cells), scored)


def test_workers_begin_at_places_of_their_own_among_the_methods(
  study, tmp_path, monkeypatch
):
  own = study(tmp_path, task=[{"name": "snippets"}, *TASKS], landscape=None)
  orders = []

  def complete(study, cells, done):
    orders.append([(cell.label, cell.task) for cell in cells])
    return True

  monkeypatch.setattr(plan, "complete", complete)
  for worker in range(2):
    runs.work(own, own.cells, worker, 2)
  first, second = orders
  names = ["snippets", "rater", "noise"]
  assert first == [(m, task) for m in ("LoRA", "Bi-LoRA") for task in names]
  assert second == first[3:] + first[:3]


def test_rows_are_read_once_each(tmp_path):
  path = tmp_path / "landscapes.jsonl"
  rows = record.Rows(path)
  assert rows.new() == []
  record.append(path, {"key": "a"})
  assert rows.new() == [{"key": "a"}]
  assert rows.new() == []
  with path.open("a") as file:
    file.write('{"key": ')  # as a kill leaves it
  assert rows.new() == []
  record.append(path, {"key": "b"})
  assert rows.new() == [{"key": "b"}]
  assert record.read(path) == [{"key": "a"}, {"key": "b"}]
