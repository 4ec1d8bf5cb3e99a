"""The report at the end of a run: Markdown, a figure, and a line to print."""

import json
import pathlib
import shlex
from typing import Any

import matplotlib
from matplotlib import figure

from . import journal

RESULTS = "results.json"


def results(folder: pathlib.Path) -> dict[str, Any] | None:
  """The results of a finished run, or None."""
  path = folder / RESULTS
  return json.loads(path.read_text()) if path.exists() else None


def summary(found: dict[str, Any], folder: pathlib.Path) -> str:
  """The outcome in two or three lines."""
  test, metric = found["test"], found["metric"]
  lines = [
    f"test accuracy {test['accuracy']:.4f} ({_interval(test)}) with "
    f"{found['config']['method']}"
  ]
  if metric != "accuracy":
    lines.append(f"test {metric} {test[metric]:.4f}")
  if found["baseline"]:
    lines.append(
      f"test accuracy {found['baseline']['accuracy']:.4f} "
      f"({_interval(found['baseline'])}) with logistic regression on the "
      "frozen features"
    )
  lines.append(f"report: {folder / 'report.md'}")
  return "\n".join(lines)


def _interval(found: dict[str, Any]) -> str:
  count = f"{found['rows']} {found['unit']}"
  if found["accuracy_95"] is None:
    return count
  low, high = found["accuracy_95"]
  return f"95% {low:.4f} to {high:.4f}, {count}"


def write(folder: pathlib.Path) -> None:
  """Writes `report.md` and `report.png` of a finished run.

  Raises:
    OSError: if they cannot be written.
  """
  found = results(folder)
  assert found is not None
  rows = journal.read(folder)
  _plot(rows, found, folder / "report.png")
  journal.write_atomically(folder / "report.md", _markdown(found))


def _markdown(found: dict[str, Any]) -> str:
  config, test, baseline = found["config"], found["test"], found["baseline"]
  other = ("loss", "rows", "unit", "accuracy_95")
  names = [k for k in test if k not in other]
  # Tokens depend on each other.
  has_interval = test["accuracy_95"] is not None

  def cells(label, x):
    values = [f"{x[name]:.4f}" for name in names]
    if has_interval:
      low, high = x["accuracy_95"]
      values.append(f"{low:.4f} to {high:.4f}")
    return f"| {label} | {' | '.join(values)} | {x['loss']:.4f} |"

  heads = [*names, *["accuracy, 95% (Wilson)"] * has_interval, "loss (nats)"]
  table = [
    f"| on {test['rows']} test {test['unit']} | {' | '.join(heads)} |",
    "|---|" + "---|" * len(heads),
    cells(config["method"], test),
  ]
  if baseline:
    table.append(cells("logistic regression on the frozen features", baseline))
  trained, base = found["trained_parameters"], found["base_parameters"]
  costs = [
    "| cost | |",
    "|---|---|",
    f"| parameters kept after training | {trained:,} of {base:,} |",
    f"| steps | {found['steps']} |",
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
      f"({found['metric']} {found['validation']:.4f}), was tested once"
      + (
        ", without the auxiliary."
        if "auxiliary_rank" in config and not config.get("keep_auxiliary")
        else "."
      ),
      "",
      *table,
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


def _known(value: float | None, form: str) -> str:
  return "unknown" if value is None else format(value, form)


def _plot(rows, found: dict[str, Any], path: pathlib.Path) -> None:
  def series(name):
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [list(x) for x in zip(*points)] or [[], []]

  metric = found["metric"]
  panels = [
    ("loss (nats)", {"train": "loss", "validation": "validation_loss"}),
    (
      metric.replace("_", " "),
      {"train": "accuracy", "validation": f"validation_{metric}"}
      if metric == "accuracy"
      else {"validation": f"validation_{metric}"},
    ),
  ]
  if any("c_over_rho" in row for row in rows):
    panels.append(("c / rho, before the clip", {"auxiliary": "c_over_rho"}))
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
    # Written beside and renamed: a report is whole or not there.
    part = path.with_name(f".{path.name}")
    canvas.savefig(part, dpi=150, format="png")
    part.replace(path)
