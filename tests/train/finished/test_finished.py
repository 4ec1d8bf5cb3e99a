"""A run that has ended is opened, told of new rows by, exported or refused."""

import csv
import io
import json
import pathlib
import shutil
import tarfile

import numpy as np
from outcomes import rows as logged
import pytest

from train import __main__ as program
from train.finished import finished as finished_lib
from train.methods import spec
from train.run import kept

TEXTS = ["a lovely film", "a dull film", "the film , and the rest of it"]


def _told(capsys, *arguments):
  """What `predict` prints, as rows."""
  capsys.readouterr()
  assert program.main(["predict", *map(str, arguments)]) == 0
  return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
  path = tmp_path_factory.mktemp("rows") / "new.csv"
  path.write_text(
    "sentence,label\n" + "".join(f'"{x}",positive\n' for x in TEXTS)
  )
  return path


@pytest.mark.parametrize("method", spec.every())
def test_every_method_learns_a_batch_and_runs_to_its_end(finished_by, method):
  folder = finished_by(method)
  # From about ln 2; a step of the schedule is too small for less than a tenth.
  losses = [row["loss"] for row in logged(folder) if "loss" in row]
  assert len(losses) == 20 and losses[-1] < 0.9 * losses[0]
  results = json.loads((folder / "results.json").read_text())
  assert results["config"]["method"] == method
  assert results["steps"] == 20 and results["baseline"] is None
  assert 0 <= results["test"]["accuracy"] <= 1
  assert "logistic" not in (folder / "report.md").read_text()
  # What it is gone on with: adapters, or parameters.
  kept = (folder / "adapters").is_dir()
  assert kept is (method not in ("full", "full_sam", "head"))
  assert (folder / "parameters.safetensors").is_file() is not kept


@pytest.mark.parametrize("method", spec.every())
def test_every_method_is_predicted_with_and_exported(
  finished_by, table, tmp_path, capsys, method
):
  folder = finished_by(method)
  capsys.readouterr()
  rows = _told(capsys, "--run", folder, "--data", table)
  assert len(rows) == len(TEXTS)
  for row in rows:
    of = {x: float(row[f"probability_{x}"]) for x in ("negative", "positive")}
    assert sum(of.values()) == pytest.approx(1, abs=1e-5)
    assert row["label"] == max(of, key=of.get)
  out = tmp_path / "out"
  export = ("export", "--run", str(folder), "--out", str(out))
  assert program.main([*export, "--base-model", "some/base"]) == 0
  has_adapters = spec.get(method).has_adapters
  config = "adapter_config.json" if has_adapters else "config.json"
  assert (out / config).is_file()
  assert f"--method {method}" in (out / "README.md").read_text()


@pytest.mark.parametrize("method", ["bilora", "full", "head"])
def test_own_test_rows_give_the_run_s_own_numbers(
  finished_by, tmp_path, method
):
  folder, out = finished_by(method), tmp_path / "again.json"
  arguments = ["--run", str(folder), "--json", str(out)]
  assert program.main(["evaluate", *arguments]) == 0
  results = json.loads((folder / "results.json").read_text())
  assert json.loads(out.read_text()) == results["test"]
  # It is not written over unless that is asked for.
  assert program.main(["evaluate", *arguments]) == 2
  assert program.main(["evaluate", *arguments, "--overwrite"]) == 0


def test_labelled_rows_of_a_file_are_evaluated(
  finished_by, table, capsys, tmp_path
):
  folder, out = finished_by("lora"), tmp_path / "found.json"
  rows = _told(capsys, "--run", folder, "--data", table)
  right = [row["label"] == "positive" for row in rows]
  arguments = ["--run", str(folder), "--data", str(table), "--json", str(out)]
  assert program.main(["evaluate", *arguments]) == 0
  assert "95%" in capsys.readouterr().out
  found = json.loads(out.read_text())
  assert found["rows"] == 3
  assert found["accuracy"] == pytest.approx(np.mean(right))
  nats = [-np.log(float(row["probability_positive"])) for row in rows]
  assert found["loss"] == pytest.approx(np.mean(nats), abs=1e-4)


def test_parameters_are_kept_as_they_were(tmp_path):
  import ml_dtypes

  wanted = {"a": {"b": np.arange(6.0, dtype="float32").reshape(2, 3)}}
  wanted["c"] = np.ones(3, ml_dtypes.bfloat16)
  kept.save_parameters(tmp_path, wanted)
  found = kept.load_parameters(tmp_path)
  np.testing.assert_array_equal(found["a"]["b"], wanted["a"]["b"])
  np.testing.assert_array_equal(found["c"], wanted["c"])
  assert found["c"].dtype == wanted["c"].dtype
  assert [path.name for path in tmp_path.iterdir()] == [kept.PARAMETERS]
  (tmp_path / kept.PARAMETERS).write_bytes(b"half")
  with pytest.raises(ValueError, match="not a whole safetensors file"):
    kept.load_parameters(tmp_path)


def test_what_is_no_finished_run_is_refused_in_a_sentence(
  finished_by, tmp_path, capsys
):
  def error(folder):
    assert program.main(["predict", "--run", str(folder), "--text", "a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line

  assert "does not exist" in error(tmp_path / "no")
  assert "is not a run" in error(tmp_path)
  (tmp_path / "runs.jsonl").touch()
  assert "is the folder of a study" in error(tmp_path)
  for method, name in (("lora", "adapters"), ("full", "parameters")):
    ended = finished_by(method)
    folder = tmp_path / method
    folder.mkdir()
    capsys.readouterr()
    shutil.copy(ended / "config.json", folder)
    assert f"has no {name}" in error(folder)
    assert "--from-run" in error(folder)
  shutil.copy(finished_by("full") / "results.json", tmp_path / "full")
  assert "older versions did not keep" in error(tmp_path / "full")
  (tmp_path / "lora" / "task.json").write_text("{}")
  (tmp_path / "lora" / "adapters").mkdir()
  assert "task.json lacks name" in error(tmp_path / "lora")


def test_runs_of_an_older_version_are_opened(tmp_path, monkeypatch, capsys):
  archive = pathlib.Path(__file__).parents[1] / "old_runs.tar.gz"
  with tarfile.open(archive) as file:
    file.extractall(tmp_path, filter="data")
  monkeypatch.chdir(tmp_path)  # their models are beside them
  opened = finished_lib.open_run("encoder-whole")
  assert opened.task.name == "snippets"
  assert opened.labels == ("negative", "positive")
  rows = opened.predict(TEXTS)
  assert rows.shape == (3, 2)
  # A row alone, and of another width, is told the same.
  np.testing.assert_allclose(opened.predict(TEXTS[1:2]), rows[1:2], atol=1e-6)
  for name in ("encoder-whole", "decoder-whole"):
    out = ("--out", f"{name}-out", "--base-model", "some/base")
    assert program.main(["export", "--run", name, *out]) == 0
  say = ("--prompt", "hello", "--max-new-tokens", "4")
  assert program.main(["generate", "--run", "decoder-whole", *say]) == 0
  assert "> hello" in capsys.readouterr().out
