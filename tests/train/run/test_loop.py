"""A run from start to end: interruptions, bad steps, full disks, the best."""

import json
import os
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from outcomes import (
  adapters,
  assert_no_step_twice,
  assert_same_bits,
  assert_same_outcome,
  files,
  rows,
)
import programs
import pytest

from train import files as files_lib
from train.data import scores as evaluate
from train.run import checkpoints as checkpoints_lib
from train.run import loop, step

STEPS = 24


# Step 5 is saved anyway, 8 is evaluated and may be the best, 7 is neither.
@pytest.mark.parametrize("at", [5, 7, 8])
def test_an_interrupted_run_resumes_to_the_same_bits(
  run, finished, tmp_path, capsys, monkeypatch, signal_at, at
):
  before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
  signal_at(signal.SIGTERM, at)
  assert run(tmp_path / "run") == 0
  monkeypatch.undo()
  shown = capsys.readouterr()
  assert f"interrupted after step {at}, which is saved" in shown.out
  assert not shown.err
  assert not (tmp_path / "run" / "results.json").exists()
  assert max(row["step"] for row in rows(tmp_path / "run")) <= at
  assert run(tmp_path / "run") == 0
  assert f"resumed after step {at}" in capsys.readouterr().out
  assert_same_outcome(tmp_path / "run", finished)
  assert_no_step_twice(tmp_path / "run")
  after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
  assert after == before


def test_the_first_ctrl_c_saves(run, tmp_path, capsys, signal_at):
  signal_at(signal.SIGINT, 2)
  assert run(tmp_path / "run") == 0
  shown = capsys.readouterr()
  assert "interrupted after step 2, which is saved" in shown.out
  assert (tmp_path / "run" / "checkpoints" / "last" / "2").is_dir()


def test_a_signal_in_the_last_step_lets_the_run_finish(
  run, finished, tmp_path, capsys, signal_at
):
  signal_at(signal.SIGTERM, STEPS)
  assert run(tmp_path / "run") == 0
  assert "interrupted" not in capsys.readouterr().out
  assert_same_outcome(tmp_path / "run", finished)


def test_a_signal_right_after_a_step_is_saved_by_the_next(
  run, tmp_path, capsys, monkeypatch
):
  # Between the question whether to save, and the question whether to stop.
  def evaluate_and_signal(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return evaluate.Evaluation({"accuracy": 0.5}, 0.7, 1, 2)

  monkeypatch.setattr(evaluate, "evaluate", evaluate_and_signal)
  assert run(tmp_path / "run") == 0
  assert "interrupted after step 5" in capsys.readouterr().out
  assert (tmp_path / "run" / "checkpoints" / "last" / "5").is_dir()


def test_a_finished_run_prints_its_results_and_trains_nothing(
  run, finished, tmp_path, capsys, monkeypatch
):
  folder = shutil.copytree(finished, tmp_path / "run")
  monkeypatch.setattr(step, "make_train_step", None)
  assert run(folder) == 0
  results = json.loads((folder / "results.json").read_text())
  shown = capsys.readouterr().out
  assert f"test accuracy {results['test']['accuracy']:.4f}" in shown
  assert str(folder / "report.md") in shown
  ours, theirs = files(folder), files(finished)
  for name in ("config.json", "report.png"):  # its folder; a date
    del ours[name], theirs[name]
  assert ours == theirs


def _poison(monkeypatch, bad):
  """Makes the base NaN in some steps; returns what each left of the trained."""
  make, left = programs.once(step.make_train_step), {}

  def make_poisoned(*arguments):
    real = make(*arguments)

    def train_step(variables, state, batch):
      if int(state.step) + 1 in bad:
        variables = jax.tree.map(lambda x: x * jnp.nan, variables)
      state, metrics = real(variables, state, batch)
      left[int(state.step)] = jax.tree.map(np.array, state.trained)
      return state, metrics

    return train_step

  monkeypatch.setattr(step, "make_train_step", make_poisoned)
  return left


def test_a_step_that_is_not_finite_is_reported_and_skipped(
  run, tmp_path, capsys, monkeypatch
):
  left = _poison(monkeypatch, {7, 8, 14})
  assert run(tmp_path / "run", "--on-nonfinite", "skip") == 0
  shown = capsys.readouterr().out
  for number, in_a_row in ((7, 1), (8, 2), (14, 1)):
    sentence = (
      f"the loss or gradient of step {number} is not finite (loss nan), "
      f"{in_a_row} in a row; skipped."
    )
    assert shown.count(sentence) == 1
  assert shown.count("not finite") == 3
  for number in range(2, STEPS + 1):
    same = all(
      np.array_equal(x, y)
      for x, y in zip(
        jax.tree.leaves(left[number]), jax.tree.leaves(left[number - 1])
      )
    )
    # The rate of the last step is not zero: the schedule ends after it.
    assert same is (number in {7, 8, 14})
  assert rows(tmp_path / "run")[-1]["step"] == STEPS
  assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


# Once where metrics are written more often than checkpoints, once less.
@pytest.mark.parametrize("log_every", ["3", "20"])
def test_a_run_told_to_stop_stops_and_resumes_before_the_bad_step(
  run, tmp_path, capsys, monkeypatch, log_every
):
  def start():
    code = run(
      tmp_path / "run", "--on-nonfinite", "stop", "--log-every", log_every
    )
    return code, capsys.readouterr().err

  with monkeypatch.context() as patch:
    _poison(patch, {7})
    for _ in range(2):
      code, shown = start()
      assert code == 1
      assert shown.count("\n") == 1
      assert "step 7 is not finite" in shown and "the run stops" in shown
  assert start() == (0, "")


def test_ten_bad_steps_in_a_row_end_any_run(run, tmp_path, capsys, monkeypatch):
  _poison(monkeypatch, range(4, STEPS + 1))
  assert run(tmp_path / "run", "--on-nonfinite", "skip") == 1
  shown = capsys.readouterr()
  assert "step 13 is not finite (loss nan), 10 in a row" in shown.err
  assert shown.err.count("\n") == 1
  assert shown.out.count("skipped") == 9


def test_nine_bad_steps_in_a_row_do_not(run, tmp_path, capsys, monkeypatch):
  _poison(monkeypatch, range(4, 13))
  assert run(tmp_path / "run", "--on-nonfinite", "skip") == 0
  assert capsys.readouterr().out.count("skipped") == 9


def test_the_best_is_tested_and_not_the_last(run, tmp_path, monkeypatch):
  accuracies = {4: 0.5, 8: 0.75, 12: 0.75, 16: 0.5, 20: 0.7, 24: 0.6}
  of_validation, tested = iter(accuracies.values()), []
  seen = []

  def predictor(prepared):
    def predict(evaluated, split):
      if split == "test":
        tested.append(evaluated)
        return evaluate.Evaluation({"accuracy": 0.25}, 0.7, 1, 4)
      seen.append(jax.tree.map(np.array, evaluated))
      accuracy = next(of_validation)
      return evaluate.Evaluation({"accuracy": accuracy}, 0.7, 1, 4)

    return predict

  monkeypatch.setattr(loop, "predictor", predictor)
  folder = tmp_path / "run"
  assert run(folder, "--no-baseline") == 0
  results = json.loads((folder / "results.json").read_text())
  assert (results["best_step"], results["validation"]) == (8, 0.75)
  assert results["test"]["accuracy"] == 0.25
  assert len(tested) == 1

  def flat(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(k): np.asarray(x) for k, x in leaves}

  assert_same_bits(flat(tested[0]), flat(seen[1]))
  kept = {x.tobytes() for x in adapters(folder).values()}
  assert kept == {x.tobytes() for x in flat(seen[1]).values()}
  assert kept != {x.tobytes() for x in flat(seen[-1]).values()}


def test_a_disk_that_is_full_at_once_is_a_sentence(
  run, finished, tmp_path, capsys, monkeypatch
):
  def no_space(path, text):
    raise OSError(28, "No space left on device", str(path))

  with monkeypatch.context() as patch:
    patch.setattr(files_lib, "write_atomically", no_space)
    assert run(tmp_path / "run") == 1
  shown = capsys.readouterr().err
  assert "No space left on device" in shown
  assert "the same command resumes" in shown
  assert run(tmp_path / "run") == 0
  assert_same_outcome(tmp_path / "run", finished)


def test_a_disk_that_fills_up_is_a_sentence_and_the_run_resumes(
  run, finished, tmp_path, capsys, monkeypatch
):
  save, usage = checkpoints_lib.Checkpoints.save_last, shutil.disk_usage("/")

  def save_and_fill(self, *arguments):
    save(self, *arguments)
    full = usage._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)

  monkeypatch.setattr(checkpoints_lib.Checkpoints, "save_last", save_and_fill)
  assert run(tmp_path / "run") == 1
  monkeypatch.undo()
  shown = capsys.readouterr().err
  assert shown.count("\n") == 1
  for part in (str(tmp_path / "run"), "the same command resumes", "0.0 MiB"):
    assert part in shown
  assert run(tmp_path / "run") == 0
  assert "resumed after step 5" in capsys.readouterr().out
  assert_same_outcome(tmp_path / "run", finished)
  assert_no_step_twice(tmp_path / "run")


SLOW_STEPS = """
import time
from train.run import journal
advance = journal.Journal.advance
def slow(self, step):
  advance(self, step)
  if step >= 3:
    time.sleep(0.5)
journal.Journal.advance = slow
"""


def test_sigterm_to_the_program_saves_says_so_and_exits_0(
  spawn, run, finished, tmp_path, capsys
):
  folder = tmp_path / "run"
  process = spawn(folder, driver=SLOW_STEPS)
  for line in process.stdout:
    if line.startswith("step"):
      break
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=600)
  assert process.returncode == 0, err
  assert "is saved; the same command resumes there." in out
  assert run(folder) == 0
  assert "resumed after step" in capsys.readouterr().out
  assert_same_outcome(folder, finished)
  assert_no_step_twice(folder)


# A limit on the size of files: unlike a disk that is seen to be full, Orbax
# and TensorStore find it in their own threads, after the save was begun.
SMALL_FILES = """
import resource
from train.run import checkpoints
save = checkpoints.Checkpoints.save_last
def save_then_limit(self, *arguments):
  save(self, *arguments)
  self.wait()
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
checkpoints.Checkpoints.save_last = save_then_limit
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_a_write_that_fails_in_the_background_is_one_sentence_too(
  spawn, run, finished, tmp_path, capsys
):
  folder = tmp_path / "run"
  process = spawn(folder, driver=SMALL_FILES)
  _, err = process.communicate(timeout=600)
  assert process.returncode == 1, err
  assert err.startswith("error: a checkpoint could not be written to")
  assert err.count("\n") == 1
  for part in (str(folder / "checkpoints"), "the same command resumes"):
    assert part in err
  assert "File too large" in err
  assert run(folder) == 0
  assert "resumed after step 5" in capsys.readouterr().out
  assert_same_outcome(folder, finished)
  assert_no_step_twice(folder)
