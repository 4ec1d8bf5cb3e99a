"""Loggers: those of every run, those that are asked for, a contributor's."""

import importlib
import io
import json
import sys
import types

import pytest
from rich import console as rich_console

from train.errors import UsageError
from train.run.loggers import registry, terminal
from train.run.loggers.logger import Opened

_TOY = '''
"""A logger of a contributor's."""

import json

from train.run.loggers import registry
from train.run.loggers.logger import Logger


class Toy(Logger):
  def __init__(self, opened):
    self._path = opened.folder / "toy.json"
    self._rows = [opened.config["rank"], opened.total]

  def log(self, step, values):
    self._rows.append([step, sorted(values)])

  def close(self):
    self._path.write_text(json.dumps(self._rows))


registry.register("toy", Toy)
'''


def _opened(folder, step=0):
  return Opened(folder, step, 24, {"rank": 4})


def test_a_logger_in_a_file_of_a_contributor_s_is_told_of_a_run(run, tmp_path):
  (tmp_path / "toy.py").write_text(_TOY)
  added = ("--plugins", str(tmp_path / "toy.py"), "--loggers", "toy")
  assert run(tmp_path / "run", "--no-baseline", "--epochs", "1", *added) == 0
  rank, total, *rows = json.loads((tmp_path / "run/toy.json").read_text())
  assert (rank, total) == (4, 8)
  assert [step for step, _ in rows] == [3, 4, 6, 8, 8]
  assert rows[-1] == [8, ["validation_accuracy", "validation_loss"]]


def test_a_name_that_is_unknown_is_refused_before_any_work(
  run, tmp_path, capsys
):
  assert run(tmp_path / "run", "--loggers", "wandb_") == 2
  shown = capsys.readouterr().err
  assert "--loggers takes wandb, mlflow" in shown and "'wandb_'" in shown
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_named(monkeypatch, name):
  monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
  with pytest.raises(UsageError, match=f"pip install {name}"):
    registry.check(name)


def test_a_logger_that_cannot_be_opened_is_a_sentence(monkeypatch, tmp_path):
  def fail(opened):
    raise ConnectionError("no such host")

  monkeypatch.setitem(registry._FACTORIES, "far", fail)
  with pytest.raises(UsageError, match=r"--loggers far .* no such host"):
    registry.make("far", _opened(tmp_path))


def _recorder(calls, name=""):
  """Stands in for a package: it writes down what is called, and how."""

  class Recorder(types.SimpleNamespace):
    def __getattr__(self, attribute):
      if attribute.startswith("__"):
        raise AttributeError(attribute)
      return _recorder(calls, f"{name}.{attribute}".strip("."))

    def __call__(self, *arguments, **keywords):
      calls.append((name, arguments, keywords))
      return self

    def __str__(self):
      return f"<{name}>"

  return Recorder()


def test_wandb_is_told_of_steps_in_any_order_and_of_one_run(
  monkeypatch, tmp_path
):
  """By the calls of wandb 0.31, which were tried with itself."""
  calls = []
  monkeypatch.setitem(sys.modules, "wandb", _recorder(calls))
  for step in (0, 3):
    logger = registry._FACTORIES["wandb"](_opened(tmp_path, step))
    logger.log(5, {"loss": 0.5})
    logger.close()
  starts = [x for name, _, x in calls if name == "init"]
  assert starts[0]["id"] == starts[1]["id"]
  assert starts[0]["resume"] == "allow" and starts[0]["config"] == {"rank": 4}
  assert ("init.log", ({"step": 5, "loss": 0.5},), {}) in calls
  assert ("init.define_metric", ("*",), {"step_metric": "step"}) in calls
  assert calls[-1][0] == "init.finish"


def test_mlflow_is_told_of_one_run(monkeypatch, tmp_path):
  """By the calls of mlflow 3.17, which were tried with itself."""
  calls = []
  recorder = _recorder(calls)
  run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="17"))
  recorder.start_run = lambda **keywords: (
    calls.append(("start_run", (), keywords)) or run
  )
  monkeypatch.setitem(sys.modules, "mlflow", recorder)
  for step in (0, 3):
    logger = registry._FACTORIES["mlflow"](_opened(tmp_path, step))
    logger.log(5, {"loss": 0.5})
    logger.close()
  starts = [x for name, _, x in calls if name == "start_run"]
  assert starts == [{"run_name": tmp_path.name}, {"run_id": "17"}]
  assert [x for x in calls if x[0] == "log_params"] == [
    ("log_params", ({"rank": 4},), {})
  ]
  assert ("log_metrics", ({"loss": 0.5},), {"step": 5}) in calls
  assert calls[-1][0] == "end_run"


@pytest.mark.parametrize(
  ("name", "place"),
  [
    ("wandb", "WANDB_MODE=offline"),
    ("mlflow", "MLFLOW_TRACKING_URI=sqlite://"),
  ],
)
def test_the_packages_themselves_take_it(monkeypatch, tmp_path, name, place):
  pytest.importorskip(name)
  variable, value = place.split("=")
  if name == "mlflow":
    value = f"sqlite:///{tmp_path}/mlflow.db"
  monkeypatch.setenv(variable, value)
  for step in (0, 3):
    logger = registry.make(name, _opened(tmp_path, step))[0]
    for later in (step + 1, 5):
      logger.log(later, {"loss": 0.5})
    logger.close()
  assert (tmp_path / f"{name}_id").read_text()


@pytest.mark.parametrize("width", [80, 120])
def test_the_last_line_of_a_terminal_has_steps_time_and_loss(tmp_path, width):
  shown = io.StringIO()
  console = rich_console.Console(
    file=shown, width=width, force_terminal=True, color_system=None
  )
  logger = terminal.Terminal(_opened(tmp_path, 2), console)
  values = {"loss": 0.69314, "accuracy": 0.5, "c_over_rho": 1.25}
  times = {"step_seconds": 0.125, "tokens_per_second": 123456.7}
  logger.advance(12)
  logger.log(12, {**values, **times, "clip_factor": 0.5})
  logger.advance(13)
  logger.close()
  lines = shown.getvalue().replace("\r", "\n").splitlines()
  last = [line for line in lines if "13/24" in line][-1]
  assert "loss 0.6931" in last and ":" in last
  assert "\u2026" not in last and "accuracy" not in last
  logged = next(line for line in lines if "step     12" in line)
  for part in (
    "accuracy 0.5",
    "tokens_per_second 1.235e+05",
    "clip_factor 0.5",
  ):
    assert part in logged
