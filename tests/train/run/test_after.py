"""What is tested after training: the merged model; and what is told of it."""

import json

import pytest

from train.data import calibration, shifts
from train.errors import UsageError
from train.run import options
from train.run.options import EvaluationOptions

NAMES = [
  *("test", "last step", *shifts.TEXTS),
  *("int8", "nf4", "int3", "pruned 30%", "pruned 50%"),
]


@pytest.fixture(scope="module")
def tested(run, tmp_path_factory):
  """A run that is validated often, so that its best step is not its last."""
  folder = tmp_path_factory.mktemp("after") / "run"
  more = ("--after", "last,shifted,quantised,pruned", "--no-baseline")
  noise = ("--label-noise", "0.4", "--eval-every", "2")
  assert run(folder, *more, *noise) == 0
  return folder


def test_all_that_was_asked_for_is_in_the_results(tested):
  found = json.loads((tested / "results.json").read_text())
  assert list(found["after"]) == NAMES
  for numbers in found["after"].values():
    assert list(numbers) == list(calibration.SCORES)
    assert 0 <= numbers["worst_class_accuracy"] <= numbers["accuracy"] <= 1
  # The merged model is the one with adapters that was tested.
  test = found["after"]["test"]
  assert test["accuracy"] == found["test"]["accuracy"]
  assert test["loss"] == pytest.approx(found["test"]["loss"], rel=1e-4)
  assert found["after"]["int8"]["loss"] == pytest.approx(test["loss"], rel=0.02)
  assert found["best_step"] < found["steps"]
  assert found["after"]["last step"]["loss"] != test["loss"]


def test_the_report_has_a_line_for_each(tested):
  text = (tested / "report.md").read_text()
  found = json.loads((tested / "results.json").read_text())["after"]
  for name in NAMES:
    assert f"| {name} | {found[name]['accuracy']:.4f} |" in text


def test_the_same_command_tells_of_a_run_again(tested, run, capsys):
  more = ("--after", "last,shifted,quantised,pruned", "--no-baseline")
  noise = ("--label-noise", "0.4", "--eval-every", "2")
  assert run(tested, *more, *noise) == 0
  assert "nothing is left to do" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("more", "told"),
  [
    (["--after", "bent"], "--after must be some of calibration, last, shifted"),
    (
      ["--after", "last", "--base-dtype", "nf4"],
      "--after is only for classification, on one device, with a base",
    ),
  ],
)
def test_what_cannot_be_tested_is_refused(run, tmp_path, more, told, capsys):
  assert run(tmp_path / "run", *more) == 2
  assert told in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_names_are_once_and_in_their_order():
  given = EvaluationOptions(after=" shifted,last ,shifted")
  assert options.after(given) == ("shifted", "last")
  assert options.after(EvaluationOptions()) == ()
  with pytest.raises(UsageError, match="got 'x'"):
    options.after(EvaluationOptions(after="x"))
