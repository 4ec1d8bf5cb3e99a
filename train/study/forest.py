"""Plots of each method's gain over the reference, paired by the seed.

Gains are paired because seeds differ more than methods do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import lines as mpl_lines

from . import estimates, plots, tables
from .results import Result
from .spec import Study

Results = Mapping[str, Result]

ONE, _MORE, _DARK = "#0072b2", "#d55e00", "#777777"
"""Colours of one gradient a step, of more, and of lines."""


def differences(
  study: Study, tasks: Mapping[str, Results]
) -> plots.Figure | None:
  """Returns a forest plot of the test metric, with a panel for each task.

  Args:
    study: the study.
    tasks: the results by task and method.
  """
  panels = {task: _gains(study, results) for task, results in tasks.items()}
  panels = {task: gains for task, gains in panels.items() if gains}
  if not panels:
    return None
  # The first method is at the top, as in the tables.
  labels = [
    x for x in study.labels if any(x in gains for gains in panels.values())
  ]
  labels.reverse()
  canvas = plots.blank(2.2 + 2.6 * len(panels), 1.1 + 0.24 * len(labels))
  grid = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
  for axes, (task, gains) in zip(grid, panels.items()):
    colours = {label: _colour(tasks[task][label]) for label in gains}
    seeds = panel(axes, labels, gains, colours)
    name = tables.metric(tasks[task])
    _, sign = tables.unit(name)
    points = ", points" if sign else ""
    axes.set(
      title=plots.wrapped(task),
      xlabel=f"{name.replace('_', ' ')}{points}{seeds}",
    )
  grid[0].set_yticks(range(len(labels)), labels)
  handles: list[Any] = [
    mpl_lines.Line2D([], [], color=colour, marker="o", linestyle="", label=text)
    for colour, text in (
      (ONE, "one gradient a step"),
      (_MORE, "more"),
    )
  ]
  canvas.legend(handles=handles, loc="outside lower center", ncols=2)
  canvas.suptitle(
    f"Test minus {study.reference}, paired by seed, 95% intervals", fontsize=9
  )
  return canvas


def panel(
  axes: Any,
  labels: Sequence[str],
  gains: Mapping[str, estimates.Estimate],
  colours: Mapping[str, str],
) -> str:
  """Draws paired differences, a row each, and the line of no difference.

  Args:
    axes: of the panel.
    labels: of the rows, from the bottom.
    gains: mean differences by the label.
    colours: by the label.

  Returns:
    How many seeds there are, for the axis; empty if the panel's rows say so.
  """
  counts = {gain.seeds for gain in gains.values()}
  one_count = len(counts) == 1
  for label, gain in gains.items():
    y = labels.index(label)
    axes.errorbar(
      gain.mean,
      y,
      xerr=_half(gain),
      fmt="o",
      color=colours[label],
      markersize=4,
      capsize=2,
    )
    if not one_count:
      axes.annotate(
        f"n = {gain.seeds}",
        (1, y),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=6,
        color=_DARK,
      )
  axes.axvline(0, color=_DARK, linewidth=0.8, zorder=0)
  axes.grid(axis="y", linewidth=0.3)
  axes.set_axisbelow(True)
  return f" (n = {counts.pop()})" if one_count else ""


def _half(gain: estimates.Estimate) -> float | None:
  """Returns half the interval's width; None for two seeds.

  With two seeds, the interval would be so wide that it hides the others.
  """
  return gain.half if gain.seeds > 2 else None


def against_sharpness(study: Study, results: Results) -> plots.Figure | None:
  """Returns a plot of each method's gain in the metric and in sharpness."""
  options = study.sharpness
  if options is None or "full" not in options.spaces:
    return None
  reference = results.get(study.reference)
  place = len(options.radii) // 2
  gains = _gains(study, results)
  if reference is None or not gains:
    return None

  def flatter(label: str) -> estimates.Estimate | None:
    return estimates.mean(
      estimates.differences(
        tables.rises(results[label], "full", "one_step", place),
        tables.rises(reference, "full", "one_step", place),
      )
    )

  known = {label: flatter(label) for label in gains}
  found = {label: x for label, x in known.items() if x is not None}
  if not found:
    return None
  drawn = plots.blank(7.2, 3.6)
  axes = drawn.subplots()
  for number, (label, rise) in enumerate(found.items(), 1):
    axes.errorbar(
      rise.mean,
      gains[label].mean,
      xerr=_half(rise),
      yerr=_half(gains[label]),
      fmt="o",
      color=_colour(results[label]),
      markersize=4,
      linewidth=0.5,
      label=f"{number}  {label}",
    )
    # Numbers, because the methods' names would overlap.
    axes.annotate(
      str(number),
      (rise.mean, gains[label].mean),
      xytext=(4, 4),
      textcoords="offset points",
      fontsize=7,
    )
  axes.axhline(0, color=_DARK, linewidth=0.8, zorder=0)
  axes.axvline(0, color=_DARK, linewidth=0.8, zorder=0)
  name = tables.metric(results)
  points = ", points" if tables.unit(name)[1] else ""
  axes.set(
    xlabel=f"rise of the loss at radius {options.radii[place]:g}, nats, minus "
    f"that of {study.reference}",
    ylabel=f"test {name.replace('_', ' ')}{points}, minus that "
    f"of {study.reference}",
  )
  drawn.legend(loc="outside right upper", fontsize=7)
  return drawn


def _gains(study: Study, results: Results) -> dict[str, estimates.Estimate]:
  """Returns each method's paired difference of the test metric, in points."""
  reference = results.get(study.reference)
  if reference is None:
    return {}
  name = tables.metric(results)
  factor, _ = tables.unit(name)
  found = {
    label: estimates.mean(
      [factor * x for x in tables.gains(result, reference, name)]
    )
    for label, result in results.items()
    if label != study.reference
  }
  return {label: x for label, x in found.items() if x is not None}


def _colour(result: Result) -> str:
  gradients = result.of("gradients_per_step").values()
  return ONE if max(gradients) <= 1 else _MORE
