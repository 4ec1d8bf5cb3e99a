"""The report of a run: Markdown, a figure, and a summary to print."""

from collections.abc import Iterable
import pathlib
import shlex
from typing import Any

from .. import checked, files, options
from ..data import calibration
from ..errors import UsageError
from . import config as config_lib
from .loggers import jsonl

RESULTS = "results.json"


_NUMBER = float | None
# The required fields of results.json, of an evaluation in it, and of its
# configuration.
_FIELDS = {
  "config": dict,
  "metric": str,
  "best_step": int,
  "validation": _NUMBER,
  "test": dict,
  "baseline": dict | None,
  "trained_parameters": int,
  "base_parameters": int,
  "steps": int,
  "median_step_seconds": _NUMBER,
  "median_tokens_per_second": _NUMBER,
  "peak_host_memory_gib": float,
  "machine": str,
  "date": str,
  "command": tuple[str, ...],
}
_EVALUATION = {
  "loss": _NUMBER,
  "rows": int,
  "unit": str,
  "accuracy_95": tuple[float, ...] | None,
}


def results(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns the results of a finished run; None if it is not finished.

  Raises:
    UsageError: if the file is invalid.
  """
  path = folder / RESULTS
  if not checked.is_file(path):
    return None
  # Older runs wrote NaN.
  found = files.finite(checked.read_json(path))
  others = {"stopped_at": int | None, "after": dict}
  checked.fields(str(path), found, _FIELDS, others)
  checked.fields(
    f"{path}, config,", found["config"], {"method": str, "task": str}
  )
  config_lib.from_any(str(path), found["config"])
  _check_evaluation(f"{path}, test,", found["test"], [found["metric"]])
  if found["baseline"]:
    names = [*found["test"]]
    _check_evaluation(f"{path}, baseline,", found["baseline"], names)
  for name, numbers in found.get("after", {}).items():
    where = f"{path}, after, {name},"
    checked.fields(where, numbers, dict.fromkeys(calibration.SCORES, _NUMBER))
  return found


def _check_evaluation(
  where: str, found: dict[str, Any], names: Iterable[str]
) -> None:
  checked.fields(
    where, found, _EVALUATION | dict.fromkeys(names, _NUMBER) | _EVALUATION
  )
  for name in found.keys() - _EVALUATION:
    checked.field(where, found, name, _NUMBER)
  if found["accuracy_95"] is not None and len(found["accuracy_95"]) != 2:
    raise UsageError(
      f"{where} accuracy_95 must be a list of two numbers; got "
      f"{options.shown(found['accuracy_95'])}."
    )


def summary(found: dict[str, Any], folder: pathlib.Path) -> str:
  """Returns the results as a text of two or three lines."""
  test, metric = found["test"], found["metric"]
  # The interval belongs to the accuracy, which a regression does not have.
  first = "accuracy" if "accuracy" in test else metric

  def line(row, method):
    return f"test {first} {_known(row[first])} ({_interval(row)}) with {method}"

  lines = [line(test, found["config"]["method"])]
  if metric != first:
    lines.append(f"test {metric} {_known(test[metric])}")
  if found["baseline"]:
    lines.append(line(found["baseline"], _baseline(test)))
  lines.append(f"report: {folder / 'report.md'}")
  return "\n".join(lines)


def _interval(found: dict[str, Any]) -> str:
  count = f"{found['rows']} {found['unit']}"
  if found["accuracy_95"] is None:
    return count
  low, high = found["accuracy_95"]
  return f"95% {low:.4f} to {high:.4f}, {count}"


def _baseline(found: dict[str, Any]) -> str:
  kind = "ridge" if found["unit"] == "values" else "logistic"
  return f"{kind} regression on the frozen features"


def write(folder: pathlib.Path) -> None:
  """Writes `report.md` and `report.png` of a finished run.

  Raises:
    OSError: if they cannot be written.
  """
  found = results(folder)
  assert found is not None
  rows = jsonl.read(folder)
  _plot(rows, found, folder / "report.png")
  files.write_atomically(folder / "report.md", _markdown(found))


def _markdown(found: dict[str, Any]) -> str:
  config, test, baseline = found["config"], found["test"], found["baseline"]
  other = ("loss", "rows", "unit", "accuracy_95")
  names = [k for k in test if k not in other]
  # Tokens depend on each other, so their accuracy has no interval.
  has_interval = test["accuracy_95"] is not None

  def cells(label, x):
    values = [_known(x[name]) for name in names]
    if has_interval:
      low, high = x["accuracy_95"]
      values.append(f"{low:.4f} to {high:.4f}")
    return f"| {label} | {' | '.join(values)} | {_known(x['loss'])} |"

  loss = "loss" if test["unit"] == "values" else "loss (nats)"
  heads = [*names, *["accuracy, 95% (Wilson)"] * has_interval, loss]
  table = [
    f"| on {test['rows']} test {test['unit']} | {' | '.join(heads)} |",
    "|---|" + "---|" * len(heads),
    cells(config["method"], test),
  ]
  if baseline:
    table.append(cells(_baseline(test), baseline))
  more = []
  if after := found.get("after"):
    more = [
      "",
      f"| after training | {' | '.join(calibration.SCORES.values())} |",
      "|---|" + "---|" * len(calibration.SCORES),
    ]
    for label, x in after.items():
      values = [_known(x[name]) for name in calibration.SCORES]
      more.append(f"| {label} | {' | '.join(values)} |")
  trained, base = found["trained_parameters"], found["base_parameters"]
  spec = config_lib.build(config_lib.fitting(config)).method.spec
  stopped = found.get("stopped_at")
  costs = [
    "| cost | |",
    "|---|---|",
    f"| parameters kept after training | {trained:,} of {base:,} |",
    f"| steps | {found['steps']}"
    + (f", stopped after {stopped}" if stopped else "")
    + " |",
    f"| median step | {_known(found['median_step_seconds'], '.3f')} s |",
    "| median speed | "
    f"{_known(found['median_tokens_per_second'], ',.0f')} tokens/s |",
    f"| peak host memory | {found['peak_host_memory_gib']:.2f} GiB |",
  ]
  return "\n".join(
    [
      f"# {config['method']} on {config['task']}",
      "",
      f"{found['date']}, {found['machine']}. The checkpoint of step "
      f"{found['best_step']}, the best on the validation rows "
      f"({found['metric']} {_known(found['validation'])}), was tested once"
      + (
        ", without the auxiliary."
        if spec.has_auxiliary and not config.get("keep_auxiliary")
        else "."
      ),
      "",
      *table,
      *more,
      "",
      *costs,
      "",
      "![curves](report.png)",
      "",
      "    " + shlex.join(found["command"]),
      "",
      "| option | value |",
      "|---|---|",
      *(f"| {name} | {value} |" for name, value in config.items()),
      "",
    ]
  )


def _known(value: float | None, form: str = ".4f") -> str:
  return "unknown" if value is None else format(value, form)


def _plot(rows, found: dict[str, Any], path: pathlib.Path) -> None:
  def series(name):
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [list(x) for x in zip(*points)] or [[], []]

  metric = found["metric"]
  panels = [
    ("loss", {"train": "loss", "validation": "validation_loss"}),
    (
      metric.replace("_", " "),
      {"train": "accuracy", "validation": f"validation_{metric}"}
      if metric == "accuracy"
      else {"validation": f"validation_{metric}"},
    ),
  ]
  if any("c_over_rho" in row for row in rows):
    panels.append(("c / rho, before the clip", {"auxiliary": "c_over_rho"}))
  # Imported only here, so that the first step need not wait for it.
  import matplotlib
  from matplotlib import figure

  with matplotlib.rc_context(
    {"axes.spines.top": False, "axes.spines.right": False}
  ):
    canvas = figure.Figure(figsize=(4 * len(panels), 3), layout="constrained")
    for axes, (title, lines) in zip(
      canvas.subplots(1, len(panels), squeeze=False)[0], panels
    ):
      for label, name in lines.items():
        x, y = series(name)
        marker = "o" if name.startswith("validation") else None
        axes.plot(x, y, label=label, marker=marker)
      axes.set(xlabel="step", title=title)
      axes.legend(frameon=False)
    axes = canvas.axes
    if len(panels) == 3:
      axes[2].axhline(1.0, color="grey", linewidth=0.8)
    with files.replacing(path) as part:
      canvas.savefig(part, dpi=150, format="png")
