"""What a report says, of rows made up for it."""

import dataclasses
import json

import pytest

from train.run import config as config_lib
from train.study import (
  forest,
  memorisation,
  plan,
  plots,
  record,
  report,
  results,
)
from train.study.main import main

METHODS = [
  {"name": "LoRA", "method": "lora"},
  {"name": "Bi-LoRA", "method": "bilora", "tune": {"rho": [0.05, 0.5]}},
]


def _row(run, score, **others):
  config = config_lib.flat(run.config)
  row = {
    "key": run.key,
    "label": run.cell.label,
    "task": run.cell.task,
    "stage": run.stage,
    "seed": run.config.optimisation.seed,
    "point": dict(run.point),
    "failed": None,
    "score": score,
    "metric": "accuracy",
    "config": config,
    "sharpness_options": None,
    "step_seconds": 0.2,
    "gradients_per_step": 1.0,
    "validation": {"best": {"accuracy": score, "loss": 0.5}},
    "curves": {"loss": [[1, 0.7], [2, 0.5]], "turnover": [[1, 0.1], [2, None]]},
    "machine": "one",
    "jax": "0",
    "date": "2026-01-01",
  }
  if run.stage == "final":
    place = float(run.cell.label != "LoRA")
    radii = run.sharpness.radii
    rise = {"rise": [r * (2 - place) + score / 100 for r in radii]}
    row["sharpness_options"] = dataclasses.asdict(run.sharpness)
    row["test"] = {"accuracy": score + 0.01 * place, "loss": 0.5}
    row["sharpness"] = {"loss": 0.3, "full": {"one_step": rise}}
  return row | others


@pytest.fixture
def made(study, tmp_path):
  """A finished study of made-up rows, and the rows."""
  own = study(tmp_path / "made", landscape=None)
  done = {}
  for cell in own.cells:
    for i, run in enumerate(plan.trials(own, cell)):
      done[run.key] = _row(run, 0.5 + 0.1 * i)
    point = plan.winner(own, cell, done)
    assert point is not None
    for run in plan.finals(own, cell, point):
      done[run.key] = _row(run, 0.7 + 0.1 * run.config.optimisation.seed)
  return own, list(done.values())


@pytest.fixture
def unplotted(monkeypatch):
  """For tests of what the tables say."""
  monkeypatch.setattr(plots, "figures", lambda *_: {})
  monkeypatch.setattr(forest, "differences", lambda *_: None)
  monkeypatch.setattr(forest, "against_sharpness", lambda *_: None)
  monkeypatch.setattr(memorisation, "figure", lambda *_: None)


def _write(own, rows):
  own.folder.mkdir(exist_ok=True)
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (own.folder / record.RUNS).write_text(text)
  return report.write(own).read_text()


def _cells(text, table, label):
  """The cells of a method in the table that begins with some heads."""
  lines = text.splitlines()
  start = next(i for i, x in enumerate(lines) if x.startswith(f"| {table}"))
  row = next(x for x in lines[start:] if x.startswith(f"| {label} |"))
  return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.usefixtures("unplotted")
def test_the_numbers_are_those_of_the_rows(made):
  text = _write(*made)
  own = _cells(text, "method | n | test accuracy, %", "Bi-LoRA")
  # 0.71 and 0.81: t of one degree of freedom is 12.706.
  assert own[1:3] == ["2", "76.00 ± 63.53"]
  # Both pairs differ by a point: all signs of two pairs, Holm over one method.
  assert own[3:7] == ["+1.00 ± 0.00", "0.500", "0.500", "0.500"]
  assert own[7:] == ["75.00 ± 63.53", "0.3000 ± 0.0000", "1.00", "1.00"]
  assert "0.5 with 2 pairs" in text
  rises = _cells(text, "method | n | radius 0.1", "Bi-LoRA")
  assert rises[2:] == ["0.1075 ± 0.0064", "1.0075 ± 0.0064"]
  # LoRA's are 0.1 and 1 higher, of both seeds.
  paired = text.split("Differences to LoRA, paired by the seed")[1]
  assert _cells(paired, "method | n | radius 0.1", "Bi-LoRA")[1:] == [
    *("2", "-0.10 ± 0.00 (0.500)", "-1.0 ± 0.0 (0.500)")
  ]
  lines = text.split("### Tuning")[1]
  assert "| Bi-LoRA | rho 0.05 | 1 | 50.00 |  |" in lines
  assert "| Bi-LoRA | rho 0.5 | 1 | 60.00 | won |" in lines


def test_gains_are_drawn_as_paired_differences(made):
  own, rows = made
  found = results.collect(own, {row["key"]: row for row in rows})

  def points(figure):
    """Of the first panel: the middle of each method's error bars."""
    return [bar.lines[0].get_xydata()[0] for bar in figure.axes[0].containers]

  # Seeds are 10 points apart, and each pair a point.
  forest_plot = forest.differences(own, found)
  assert points(forest_plot)[0] == pytest.approx([1.0, 0.0])
  (label,) = forest_plot.axes[0].get_yticklabels()
  assert label.get_text() == "Bi-LoRA"
  assert forest_plot.axes[0].get_xlabel() == "accuracy, points (n = 2)"
  # Of the radii 0.1 and 1, it is the second.
  gain = forest.against_sharpness(own, next(iter(found.values())))
  assert points(gain)[0] == pytest.approx([-1.0, 1.0])
  assert forest.differences(own, {"none": {}}) is None
  # An interval of two seeds is 25 standard errors wide, and none is drawn.
  (bar,) = forest_plot.axes[0].containers
  assert not bar.has_xerr and not bar.has_yerr


def test_a_report_is_a_function_of_the_rows(made):
  own, rows = made

  def written():
    return {
      p.name: p.read_bytes() for p in own.folder.rglob("*") if p.is_file()
    }

  _write(own, rows)
  first = written()
  assert sum(name.endswith(".svg") for name in first) >= 4
  _write(own, rows)
  assert written() == first


def test_an_unfinished_study_is_plotted(made):
  own, rows = made
  # Tuning alone, and a single seed of each method.
  assert "-tuning.svg" in _write(own, [rows[2]])
  assert "-sharpness.svg" in _write(own, [rows[0], *rows[2:5]])


@pytest.mark.usefixtures("unplotted")
def test_an_unfinished_study_is_told_of_with_what_is_missing(made):
  own, rows = made
  empty = _write(own, [])
  assert "0 of 6 runs are finished." in empty
  assert "- Bi-LoRA/snippets: 0 of 4, to be tuned" in empty
  assert _cells(empty, "method | n | test", "LoRA")[1:] == ["0 of 2"] + [""] * 9
  for count in range(1, 5):
    assert f"{count} of 6 runs are" in _write(own, rows[:count])
  text = _write(own, rows[:5])
  # Bi-LoRA has one seed of two: no interval, and one pair.
  assert _cells(text, "method | n | test", "Bi-LoRA")[1:5] == [
    *("1 of 2", "71.00", "+1.00", "1.000")
  ]


@pytest.mark.usefixtures("unplotted")
def test_a_run_that_broke_off_is_told_of_and_in_no_mean(made):
  own, rows = made
  rows[-1] |= {"failed": "the loss is not finite", "score": None}
  del rows[-1]["test"], rows[-1]["sharpness"]
  text = _write(own, rows)
  assert "6 of 6 runs are finished." in text
  line = "- Bi-LoRA on snippets, final, rho 0.5, seed 1: the loss is not finite"
  assert line in text
  assert _cells(text, "method | n | test", "Bi-LoRA")[1:3] == [
    *("1 of 2", "71.00")
  ]


@pytest.mark.usefixtures("unplotted")
def test_rows_of_another_study_do_not_count(made):
  own, rows = made
  rows[0]["config"]["epochs"] = 7
  assert "5 of 6 runs are finished." in _write(own, rows)


@pytest.mark.usefixtures("unplotted")
def test_a_loss_that_is_not_finite_is_told_of_beside_the_mean(made):
  own, rows = made
  rows[0]["sharpness"]["full"]["one_step"]["rise"][1] = None
  found = _cells(_write(own, rows), "method | n | radius 0.1", "LoRA")
  assert found[3] == "2.0 (1 not finite)"


@pytest.mark.usefixtures("unplotted")
def test_a_share_says_when_it_is_not_defined(made, study):
  own, rows = made
  # One seed: nobody knows whether the target is flatter.
  method = {"name": "other", "method": "lora_sam", "seeds": [0]}
  more = study(own.folder, landscape=None, method=[*METHODS, method])
  (run,) = plan.finals(more, more.cells[-1], {})
  row = _row(run, 0.7)
  row["sharpness"]["full"]["one_step"]["rise"] = [0.182, None]
  text = _write(more, [*rows, row])
  share = text.split("### Share of the drop to Bi-LoRA")[1]
  # (0.207 - 0.182) / (0.207 - 0.107), and no value at the other radius.
  assert _cells(share, "method | n | radius", "other") == [
    *("other", "1", "0.25 *not defined*", "")
  ]


@pytest.mark.usefixtures("unplotted")
def test_report_runs_nothing(made, tables, tmp_path, capsys):
  own, rows = made
  _write(own, rows[:2])
  (own.folder / report.REPORT).unlink()
  path = tmp_path / "study.toml"
  path.write_text(_toml(tables(own.folder, landscape=None)))
  before = (own.folder / record.RUNS).read_bytes()
  assert main([str(path), "--report"]) == 0
  assert "2 of 6" in (own.folder / report.REPORT).read_text()
  assert (own.folder / record.RUNS).read_bytes() == before
  assert str(own.folder / report.REPORT) in capsys.readouterr().out


def _toml(found):
  """Tables as TOML, whose values are written as JSON's."""
  lines = []
  for name, table in found.items():
    many = table if isinstance(table, list) else [table]
    for one in many:
      lines.append(f"[[{name}]]" if table is many else f"[{name}]")
      lines += [f"{k} = {_value(v)}" for k, v in one.items()]
  return "\n".join(lines)


def _value(value):
  if isinstance(value, dict):
    return "{" + ", ".join(f"{k} = {_value(v)}" for k, v in value.items()) + "}"
  return json.dumps(value)


@pytest.mark.usefixtures("unplotted")
def test_a_point_may_be_another_method_s_or_that_of_another_task(
  study, tmp_path
):
  own = study(
    tmp_path / "taken",
    landscape=None,
    recovery=None,
    task=[{"name": "snippets"}, {"name": "few", "task": "snippets"}],
    method=[
      METHODS[1] | {"name": "LoRA", "tasks": ["snippets"]},
      {
        "name": "LoRA",
        "method": "bilora",
        "tasks": ["few"],
        "point_of": "LoRA/snippets",
      },
      {
        "name": "SAM",
        "method": "lora_sam",
        "tasks": ["snippets"],
        "point_of": "LoRA",
      },
    ],
  )
  tuned, sam, few = own.cells
  # What is not tuned yet has the same trials to wait for.
  for cell in own.cells:
    assert plan.winner(own, cell, {}) is None
    assert plan.trials(own, cell) == plan.trials(own, tuned)
  done = {
    run.key: _row(run, 0.5 + 0.1 * i)
    for i, run in enumerate(plan.trials(own, tuned))
  }
  assert [
    run.config.method.options.rho for run in plan.remaining(own, [sam], done)
  ] == [0.5, 0.5]
  for cell in own.cells:
    assert plan.winner(own, cell, done) == {"rho": 0.5}
    for run in plan.finals(own, cell, {"rho": 0.5}):
      done[run.key] = _row(run, 0.7)
  text = _write(own, list(done.values()))
  # Two trials, and two seeds for each of three: no trial counts twice.
  assert "8 of 8 runs are finished." in text
  assert "With the point that won for LoRA: SAM." in text
  assert "With the point that won for LoRA/snippets: LoRA." in text
  assert text.count("| LoRA | rho 0.5 | 1 | 60.00 | won |") == 1
  assert few.config.data.task == "snippets"
