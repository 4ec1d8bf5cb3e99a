"""The folder of a run: claimed first, given up if nothing comes of it."""

import json
import shutil

import numpy as np
from outcomes import files, rows
import pytest

from train import locks
from train.models import load as models
from train.run import config as config_lib


def test_a_run_is_claimed_before_its_model_is_opened_and_given_up_after_it(
  run, tmp_path, monkeypatch, capsys
):
  folder, there = tmp_path / "run", []

  def fail(*_):
    there.append(config_lib.from_run(folder).optimisation.seed)
    raise ValueError("no such model")

  monkeypatch.setattr(models, "open_pretrained", fail)
  assert run(folder, "--seed", "3") == 2
  assert "no such model" in capsys.readouterr().err
  assert there == [3]
  assert not folder.exists()


def test_a_folder_that_another_command_is_in_is_refused_and_left_as_it_is(
  run, finished, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(models, "open_pretrained", None)  # it is not asked
  folder = shutil.copytree(finished, tmp_path / "run")
  with locks.held(folder / locks.FILE, "it"):
    before = files(folder)
    assert run(folder) == 2
    assert files(folder) == before
  shown = capsys.readouterr().err
  assert f"error: the run's folder {folder} is in use by process" in shown
  assert shown.count("\n") == 1
  assert files(folder) == files(finished)


@pytest.mark.parametrize("left", ["adapters", "results.json", "metrics.jsonl"])
def test_a_folder_that_lost_its_configuration_is_not_taken_for_another_run(
  run, finished, tmp_path, capsys, left
):
  folder = tmp_path / "run"
  folder.mkdir()
  copy = shutil.copytree if (finished / left).is_dir() else shutil.copy
  copy(finished / left, folder / left)
  before = files(folder)
  assert run(folder) == 2
  shown = capsys.readouterr().err
  for part in (f"{folder} has {left} of a run", "no config.json", "--run-dir"):
    assert part in shown
  assert files(folder) == before


def test_parts_of_adapters_that_a_kill_left_are_removed(
  run, finished, tmp_path
):
  folder = shutil.copytree(finished, tmp_path / "run")
  (folder / "adapters" / f".{'0' * 32}").touch()
  assert run(folder) == 0
  assert files(folder).keys() == files(finished).keys()


def test_a_run_that_has_begun_is_not_given_up(
  run, finished, tmp_path, monkeypatch
):
  folder = shutil.copytree(finished, tmp_path / "run")
  (folder / "results.json").unlink()
  monkeypatch.setattr(models, "open_pretrained", None)
  with pytest.raises(TypeError):
    run(folder)
  assert (folder / "config.json").exists()
  assert (folder / "metrics.jsonl").exists()


def test_a_finished_run_is_told_of_before_its_model_is_opened(
  run, finished, capsys, monkeypatch
):
  monkeypatch.setattr(models, "open_pretrained", None)
  # What changes no numbers may differ.
  assert run(finished, "--checkpoint-every", "7", "--log-every", "2") == 0
  date = json.loads((finished / "results.json").read_text())["date"]
  assert f"was finished on {date}" in capsys.readouterr().out
  assert run(finished, "--rank", "5") == 2
  assert "rank is 4 there and 5 here" in capsys.readouterr().err


def test_batches_to_evaluate_are_of_their_own_size(run, finished, tmp_path):
  # 88 rows to test and 32 to validate in threes: the last are filled up.
  options = ("--eval-batch-size", "3", "--no-baseline")
  assert run(tmp_path / "run", *options) == 0

  def validations(folder):
    found = [row for row in rows(folder) if "validation_loss" in row]
    return [list(row.values()) for row in found]

  expected = validations(finished)
  assert len(expected) == 6
  np.testing.assert_allclose(validations(tmp_path / "run"), expected, rtol=1e-5)


def test_batches_to_evaluate_are_shared_by_the_mesh(run, tmp_path, capsys):
  mesh = ("--mesh", "data=8", "--eval-batch-size", "12")
  assert run(tmp_path / "run", *mesh) == 2
  shown = capsys.readouterr().err
  assert (
    "--eval-batch-size must be a multiple of data times fsdp, which is 8"
    in shown
  )
  assert "got 12" in shown
  assert not (tmp_path / "run").exists()
