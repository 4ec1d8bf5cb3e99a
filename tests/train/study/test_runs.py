"""A study that is killed and resumed has the rows of one that was not."""

import base64
import json
import re
import shutil
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from train import __main__ as program
from train import jsonl, locks
from train.run import config as config_lib
from train.study import landscape_rows, plan, record, report, runs, training


@pytest.fixture(scope="module")
def done(study, tmp_path_factory):
  """A finished study and its rows."""
  own = study(tmp_path_factory.mktemp("study"))
  runs.work(own, own.cells)
  return own, record.read(own.folder / record.RUNS)


def test_each_run_is_a_row_and_none_is_run_again(done, monkeypatch):
  own, rows = done
  stages = [(row["label"], row["stage"], row["seed"]) for row in rows]
  assert stages == [
    ("LoRA", "final", 0),
    ("LoRA", "final", 1),
    ("Bi-LoRA", "tune", 100),
    ("Bi-LoRA", "tune", 100),
    ("Bi-LoRA", "final", 0),
    ("Bi-LoRA", "final", 1),
  ]
  assert not any((own.folder / "running").iterdir())
  monkeypatch.setattr(training, "run", None)  # it would fail if it were called
  runs.work(own, own.cells)
  assert record.read(own.folder / record.RUNS) == rows


def _replayed(rows, landscapes=()):
  """A `training.run` that gives what was found before; and whom it was for."""
  known = {row["key"]: row for row in rows}
  lines = {row["key"]: row for row in landscapes}
  asked = []

  def run(task, folder, kept):
    asked.append(task)
    row = dict(known[task.key])
    if task.landscape is not None:
      row["landscape"] = {
        "line": lines[landscape_rows.key(task.key, task.landscape)]["line"]
      }
    return row

  return run, asked


def test_a_torn_line_is_dropped_and_its_run_alone_is_repeated(
  done, study, tmp_path, monkeypatch
):
  first, rows = done
  landscapes = record.read(first.folder / landscape_rows.FILE)
  replay, asked = _replayed(rows, landscapes)
  monkeypatch.setattr(training, "run", replay)
  own = study(tmp_path)
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / record.RUNS).write_text(text[:-100])
  shutil.copy(first.folder / landscape_rows.FILE, tmp_path)
  runs.work(own, own.cells)
  assert record.read(tmp_path / record.RUNS) == rows
  assert [run.key for run in asked] == [rows[-1]["key"]]


def test_a_landscape_asked_for_later_changes_no_row(
  done, study, tmp_path, monkeypatch
):
  first, rows = done
  landscapes = record.read(first.folder / landscape_rows.FILE)
  replay, asked = _replayed(rows, landscapes)
  monkeypatch.setattr(training, "run", replay)
  shutil.copy(first.folder / record.RUNS, tmp_path)
  before = study(tmp_path, landscape=None)
  runs.work(before, before.cells)
  assert not asked
  after = study(tmp_path)
  runs.work(after, after.cells)
  assert [(run.cell.label, run.config.optimisation.seed) for run in asked] == [
    ("LoRA", 0)
  ]
  assert record.read(tmp_path / record.RUNS) == rows
  assert record.read(tmp_path / landscape_rows.FILE) == landscapes


def test_rows_and_landscapes_outlive_new_fields_of_the_configuration(
  done, study, tmp_path, monkeypatch
):
  first, _ = done
  monkeypatch.setattr(training, "run", None)  # it would fail if it were called
  # Under the keys of a time when there was no field `dora`.
  for name in (record.RUNS, landscape_rows.FILE):
    text = ""
    for row in record.read(first.folder / name):
      row["key"] = f"old{row['key']}"
      row.get("config", {}).pop("dora", None)
      text += json.dumps(row) + "\n"
    (tmp_path / name).write_text(text)
  own = study(tmp_path)
  runs.work(own, own.cells)
  text = report.write(own).read_text()
  assert "6 of 6 runs are finished." in text
  assert "snippets-landscape.svg" in text


def test_the_middle_of_a_landscape_is_the_loss_that_was_measured(done):
  own, rows = done
  (landscape,) = record.read(own.folder / landscape_rows.FILE)
  assert landscape["steps"] == [-1.0, 0.0, 1.0]
  loss = rows[0]["sharpness"]["loss"]
  assert landscape["line"][1] == pytest.approx(loss, rel=1e-5)
  assert landscape["line"][0] != pytest.approx(loss, rel=1e-3)


def test_a_finished_study_is_told_of(done):
  own, _ = done
  text = report.write(own).read_text()
  assert "6 of 6 runs are finished." in text
  links = re.findall(r"\]\((plots/.*?\.svg)\)", text)
  names = {re.split("[-/]", link)[-1] for link in links}
  wanted = {"differences.svg", "gain.svg", "sharpness.svg", "landscape.svg"}
  assert names >= wanted
  assert all((own.folder / link).exists() for link in links)


def test_methods_of_a_seed_see_the_same_rows_in_the_same_order(done):
  _, rows = done
  final = [row for row in rows if row["stage"] == "final"]
  by_seed = {
    seed: {row["data"] for row in final if row["seed"] == seed}
    for seed in (0, 1)
  }
  assert [len(found) for found in by_seed.values()] == [1, 1]
  assert by_seed[0] != by_seed[1]


def test_a_trial_touches_no_test_row(done):
  _, rows = done
  for row in rows:
    tested = row["stage"] == "final"
    assert ("test" in row, "correct" in row, "sharpness" in row) == (
      tested,
    ) * 3


def test_the_test_is_what_the_packed_rows_say(done):
  _, rows = done
  for row in rows:
    if row["stage"] == "final":
      packed = np.frombuffer(base64.b64decode(row["correct"]), np.uint8)
      right = np.unpackbits(packed, count=row["rows"]["test"])
      assert np.isclose(right.mean(), row["test"]["accuracy"])


def test_the_final_runs_are_at_the_point_of_the_best_mean(done):
  own, rows = done
  cell = own.cells[1]
  scores = [row["score"] for row in rows if row["stage"] == "tune"]
  best = cell.grid[int(np.argmax(scores))]
  finals = [r for r in rows if r["label"] == "Bi-LoRA" and "test" in r]
  assert all(row["config"]["rho"] == best["rho"] for row in finals)
  # Ties: the first.
  for score, wanted in ((0.0, 0), (1.0, 0), (2.0, 1)):
    trials: dict[str, Any] = {
      run.key: {"score": 1.0 if run.point == cell.grid[0] else score}
      for run in plan.trials(own, cell)
    }
    assert plan.winner(own, cell, trials) == cell.grid[wanted]
  trials[plan.trials(own, cell)[1].key] = {"score": None}  # it broke off
  assert plan.winner(own, cell, trials) == cell.grid[0]


def test_a_run_stops_as_its_validations_get_no_better(study, tmp_path):
  still = {"learning_rate": 1e-12, "eval_every": 1, "patience": 2}
  own = study(
    tmp_path,
    method=[{"name": "LoRA", "method": "lora", **still}],
    tuning=None,
    sharpness={"rows": 0},
    recovery=None,
    landscape=None,
  )
  run = plan.finals(own, own.cells[0], {})[0]
  row = training.run(run, tmp_path / "run", {})
  assert (row["steps"], row["best_step"], row["stopped_at"]) == (8, 1, 3)
  assert row["validation"]["last"]["loss"] == pytest.approx(
    row["validation"]["best"]["loss"]
  )
  assert [step for step, _ in row["curves"]["loss"]] == [1, 2, 3]


def test_a_run_is_that_of_the_program(done, run, tmp_path):
  """The same numbers as `python -m train`, of which it leaves much out."""
  own, rows = done
  defaults = config_lib.flat(own.cells[0].config)
  names = ("train_rows", "epochs", "learning_rate", "eval_every")
  options = [
    word
    for name in names
    for word in (f"--{name.replace('_', '-')}", str(defaults[name]))
  ]
  folder = tmp_path / "run"
  options += ["--method", "lora", "--group-by-length", "0", "--no-baseline"]
  assert run(folder, *options) == 0
  found = json.loads((folder / "results.json").read_text())
  row = rows[0]
  assert found["test"]["loss"] == pytest.approx(row["test"]["loss"], rel=1e-5)
  assert found["best_step"] == row["best_step"]


def test_a_claim_is_one_process_s_until_it_ends(tmp_path):
  holder = (
    "import pathlib, sys, time\n"
    "from train.study import record\n"
    "with record.claimed(pathlib.Path(sys.argv[1]), 'x') as mine:\n"
    "  print(mine, flush=True)\n"
    "  time.sleep(60)\n"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", holder, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  with process.stdout:
    assert process.stdout.readline() == "True\n"
    with record.claimed(tmp_path, "x") as mine:
      assert not mine
    process.kill()
    process.wait()
  with record.claimed(tmp_path, "x") as mine:
    assert mine
    with record.claimed(tmp_path, "x") as twice:
      assert not twice
  assert not any(tmp_path.glob("*/*"))


def test_rows_of_many_writers_are_whole_and_a_torn_tail_is_dropped(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b'{"n": -1}\n{"n": ' + b"9" * 10_000)
  threads = [
    threading.Thread(target=record.append, args=(path, {"n": i}))
    for i in range(8)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  found = [row["n"] for row in jsonl.read_log(path)]
  assert found[0] == -1
  assert sorted(found) == list(range(-1, 8))


def test_what_killed_processes_left_is_swept_and_a_run_that_goes_on_is_not(
  tmp_path,
):
  for key in ("killed", "alive"):
    (tmp_path / record.RUNNING / key).mkdir(parents=True)
    (tmp_path / record.RUNNING / key / "config.json").touch()
  (tmp_path / "locks").mkdir()
  (tmp_path / "locks" / "ended.lock").touch()
  with record.claimed(tmp_path, "alive"):
    record.sweep(tmp_path)
    left = [x.name for x in tmp_path.glob("*/*")]
  assert sorted(left) == ["alive", "alive.lock"]


def test_a_folder_that_another_command_is_in_is_refused(
  tables, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(training, "run", None)  # it would fail if it were called
  folder, file = tmp_path / "study", tmp_path / "study.toml"
  model = tables(folder)["defaults"]["model"]
  file.write_text(
    f'study = {{name = "tiny", folder = "{folder}", seeds = [0], '
    f'reference = "LoRA"}}\ntask = [{{name = "snippets"}}]\n'
    f'method = [{{name = "LoRA", method = "lora", model = "{model}"}}]\n'
  )
  with locks.held(folder / locks.FILE, "it"):
    assert program.main(["study", str(file)]) == 2
  shown = capsys.readouterr().err
  assert f"error: the folder {folder} is in use by process" in shown
  assert list(tmp_path.iterdir()) == [file] or not any(folder.iterdir())
