"""Runs of an older version: one that was stopped resumes, others are told of.

Their config.json has all options in one table.
"""

import json
import pathlib
import tarfile

import numpy as np
import outcomes
import pytest

from train.models import load as models

_RUNS = pathlib.Path(__file__).parents[1] / "old_runs.tar.gz"


@pytest.fixture
def old(tmp_path, data_dir, monkeypatch):
  """The folder that the runs were made in, which is the current one."""
  with tarfile.open(_RUNS) as runs:
    runs.extractall(tmp_path, filter="data")
  (tmp_path / "data").symlink_to(data_dir)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def _command(folder):
  return json.loads((folder / "results.json").read_text())["command"][3:]


def test_a_stopped_run_resumes_and_ends_as_one_that_was_not(old, capsys):
  command = _command(old / "encoder-whole")
  assert command[-2:] == ["--run-dir", "encoder-whole"]
  assert outcomes.main([*command[:-1], "encoder-stopped"]) == 0
  assert "resumed after step 11" in capsys.readouterr().out
  expected = outcomes.adapters(old / "encoder-whole")
  found = outcomes.adapters(old / "encoder-stopped")
  assert found.keys() == expected.keys()
  for name, x in found.items():
    # To the bit on one machine; others add up in another order.
    np.testing.assert_allclose(x, expected[name], atol=1e-5)


@pytest.mark.parametrize("name", ["encoder-whole", "decoder-whole"])
def test_a_finished_run_is_told_of_and_nothing_is_loaded(
  old, capsys, monkeypatch, name
):
  monkeypatch.setattr(models, "open_pretrained", None)
  results = json.loads((old / name / "results.json").read_text())
  assert outcomes.main(_command(old / name)) == 0
  shown = capsys.readouterr().out
  assert f"{name} was finished on {results['date']}" in shown
  assert f"test accuracy {results['test']['accuracy']:.4f}" in shown
