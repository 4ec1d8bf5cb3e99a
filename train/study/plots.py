"""The plots of a study, as small SVGs that depend only on its rows."""

from collections.abc import Collection, Mapping, Sequence
import contextlib
import io
import itertools
import pathlib
import re
import textwrap
from typing import Any

import matplotlib
from matplotlib import axes as mpl_axes
from matplotlib import figure
from matplotlib import lines as mpl_lines
import numpy as np

from .. import files
from . import estimates, tables
from .results import Result
from .spec import Study

Results = Mapping[str, Result]
Figure = figure.Figure

GREY = "#b8b8b8"
# Wong's colours, which colour-blind people can distinguish.
_COLOURS = (
  *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
  *("#000000", "#f0e442"),
)
_STYLE: Any = {
  "svg.hashsalt": "bilora_jax",
  "svg.fonttype": "none",
  "font.size": 9,
  "axes.titlesize": 9,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "legend.frameon": False,
}


def save(canvas: Figure, path: pathlib.Path) -> None:
  """Writes an SVG whose bytes depend only on the figure.

  Raises:
    OSError: if it cannot be written.
  """
  text = io.StringIO()
  with styled():
    nothing = dict.fromkeys(("Date", "Creator"))
    canvas.savefig(text, format="svg", metadata=nothing)
  # Digits after a hundredth of a point are invisible, but half of the file.
  short = re.sub(r"(\d\.\d\d)\d+", r"\1", text.getvalue())
  files.write_atomically(path, short)


def styled() -> contextlib.AbstractContextManager[Any]:
  """Returns the context with the style of all plots."""
  return matplotlib.rc_context(_STYLE)


def figures(
  study: Study, results: Results, landscapes: Mapping[str, Any]
) -> dict[str, Figure]:
  """Returns the plots of a task by name, except those without rows.

  Args:
    study: the study.
    results: the results of the task, by method.
    landscapes: the rows of landscapes, by method.
  """
  with styled():
    found = {
      "sharpness": sharpness(study, results),
      "curves": curves(study, results),
      "diagnostics": diagnostics(study, results),
      "tuning": tuning(study, results),
      "landscape": line(study, landscapes),
      "plane": plane(study, landscapes),
    }
  return {name: canvas for name, canvas in found.items() if canvas is not None}


def sharpness(study: Study, results: Results) -> Figure | None:
  """Returns plots of the loss's rise against the radius, for each direction."""
  if study.sharpness is None:
    return None
  radii = study.sharpness.radii
  panels = {}
  for key, title in tables.DIRECTIONS.items():
    lines = {
      label: [
        estimates.mean(list(tables.rises(result, *key, i).values()))
        for i in range(len(radii))
      ]
      for label, result in results.items()
    }
    lines = {label: line for label, line in lines.items() if all(line)}
    if lines:
      panels[title] = lines
  if not panels:
    return None
  colours = colours_of(study, results)
  canvas, grid = _panels(len(panels))
  for axes, (title, lines) in zip(grid, panels.items()):
    for label, line in last_coloured(lines, colours):
      middle = np.array([point.mean for point in line])
      half = np.array([point.half or 0.0 for point in line])
      _band(axes, radii, middle, half, colours.get(label), "o")
    positive = all(p.mean > 0 for line in lines.values() for p in line)
    axes.set_xscale("log")
    axes.set_xticks(radii, [f"{radius:g}" for radius in radii], minor=False)
    axes.minorticks_off()
    if positive:
      axes.set_yscale("log")
    axes.set(title=wrapped(title), xlabel="radius")
  _label_rows(grid, "rise of the loss, nats")
  legend_below(canvas, colours, [label for x in panels.values() for label in x])
  return canvas


def curves(study: Study, results: Results) -> Figure | None:
  """Returns plots of the logged losses and metrics, means over seeds."""
  name = tables.metric(results)
  titles = {
    "loss": "training loss, nats",
    "validation_loss": "validation loss, nats",
    f"validation_{name}": f"validation {name.replace('_', ' ')}",
  }
  return _curves(study, results, titles, bands=False)


def diagnostics(study: Study, results: Results) -> Figure | None:
  """Returns plots of the other logged numbers, means over seeds.

  Most of them are diagnoses of the auxiliary.
  """
  known = ("loss", "accuracy")
  names = {
    name
    for result in results.values()
    for row in result.finals.values()
    for name in row["curves"]
    if name not in known and not name.startswith("validation_")
  }
  titles = {
    "c_over_rho": "c / rho, before the clip",
    "clip_factor": "the clip's factor",
    "cosine_present": "cosine with the gradient at the perturbed weights",
    "cosine_sam": "cosine with the gradient at the weights alone",
    "overlap_gradient": "overlap with the gradient's top directions",
    # Only older rows have these. Their batch was the one of the auxiliary's
    # latest update.
    "cosine_present_seen": "cosine with the gradient of the batch just seen",
    "cosine_sam_seen": "the same, at the weights alone",
    "overlap_gradient_seen": "overlap with that gradient's top directions",
    "overlap_primary": "overlap with the primary",
    "turnover": "turnover since the last",
  }
  shown = {k: title for k, title in titles.items() if k in names}
  shown |= {name: name for name in sorted(names - set(titles))}
  return _curves(study, results, shown, bands=True)


def tuning(study: Study, results: Results) -> Figure | None:
  """Returns plots of the validation score of each point of the grids."""
  tuned = {
    label: result
    for label, result in results.items()
    if any(scores for _, scores in result.trials)
  }
  if not tuned:
    return None
  name = tables.metric(results)
  factor, sign = tables.unit(name)
  canvas, grid = _panels(len(tuned), sharey=True)
  for axes, (label, result) in zip(grid, tuned.items()):
    _grid(axes, result, factor)
    axes.set(title=wrapped(label))
  _label_rows(grid, f"validation {name.replace('_', ' ')}{sign}")
  return canvas


def line(study: Study, found: Mapping[str, Any]) -> Figure | None:
  """Returns a plot of the loss along one direction, for each method."""
  if not found:
    return None
  colours = colours_of(study, found)
  canvas, (axes,) = _panels(1)
  for label, row in last_coloured(found, colours):
    losses = np.asarray(row["line"], float)
    axes.plot(row["steps"], losses, color=colours.get(label, GREY))
  axes.set(xlabel="step, in the filters' norms", ylabel="loss, nats")
  legend_below(canvas, colours, list(found))
  return canvas


def plane(study: Study, found: Mapping[str, Any]) -> Figure | None:
  """Returns plots of the loss over two directions, with equal levels."""
  planes = {label: row for label, row in found.items() if "plane" in row}
  if not planes:
    return None
  values = {k: np.asarray(row["plane"], float) for k, row in planes.items()}
  finite = [x[np.isfinite(x)] for x in values.values()]
  if not all(x.size for x in finite):
    return None
  low = min(x.min() for x in finite)
  # The highest level is the flattest method's maximum. Higher losses of other
  # methods stay white.
  high = min(x.max() for x in finite)
  levels = np.linspace(low, high if high > low else low + 1.0, 12)
  canvas, grid = _panels(len(planes), sharey=True)
  for axes, (label, row) in zip(grid, planes.items()):
    steps = row["steps"]
    filled = axes.contourf(
      steps, steps, values[label].T, levels, cmap="viridis"
    )
    axes.set(title=wrapped(label), aspect="equal")
    if axes is grid[-1]:
      canvas.colorbar(filled, ax=grid, label="loss, nats", shrink=0.8)
  return canvas


def highlighted(study: Study, labels: Collection[str]) -> list[str]:
  """Returns the labels that always have a colour.

  These are the reference, the targets and the first Bi-LoRA.
  """
  chosen = [study.reference]
  for one in study.recovery:
    chosen += [one.reference, one.target]
  chosen += [x.label for x in study.cells if x.config.method.name == "bilora"][
    :1
  ]
  return [label for label in dict.fromkeys(chosen) if label in labels]


def colours_of(study: Study, results: Mapping[str, Any]) -> dict[str, str]:
  """Returns colours by label, for all methods if the colours suffice.

  If not, only the highlighted methods have colours. Their colours are the same
  in all plots.
  """
  chosen = highlighted(study, study.labels)
  others = [label for label in results if label not in chosen]
  if len(chosen) + len(others) <= len(_COLOURS):
    chosen += others
  found = dict(zip(chosen, _COLOURS))
  return {label: found[label] for label in found if label in results}


def _curves(
  study: Study, results: Results, titles: Mapping[str, str], bands: bool
) -> Figure | None:
  panels = {}
  for name, title in titles.items():
    lines = {label: _curve(x, name) for label, x in results.items()}
    lines = {label: x for label, x in lines.items() if len(x[0]) > 1}
    if lines:
      panels[title] = lines
  if not panels:
    return None
  every = dict.fromkeys(label for lines in panels.values() for label in lines)
  colours = colours_of(study, every)
  banded = highlighted(study, every) if bands else []
  canvas, grid = _panels(len(panels))
  for axes, (title, lines) in zip(grid, panels.items()):
    for label, (steps, middle, half) in last_coloured(lines, colours):
      width = half if label in banded else np.zeros_like(half)
      _band(axes, steps, middle, width, colours.get(label))
    axes.set(title=wrapped(title), xlabel="step")
    if title == titles.get("c_over_rho"):
      # The values go from about 1 to those of an infinite ascent rate.
      axes.set_yscale("log")
  legend_below(canvas, colours, list(every))
  return canvas


def _curve(result: Result, name: str) -> tuple[list[float], Any, Any]:
  """Returns the steps that all seeds have, with means and half intervals."""
  of_seeds = [
    {step: value for step, value in row["curves"][name] if value is not None}
    for row in result.finals.values()
    if name in row["curves"]
  ]
  if not of_seeds:
    return [], [], []
  steps = sorted(set.intersection(*map(set, of_seeds)))
  found = [
    estimates.mean([curve[step] for curve in of_seeds]) for step in steps
  ]
  known = [x for x in found if x is not None]
  middle = np.array([x.mean for x in known])
  return steps, middle, np.array([x.half or 0.0 for x in known])


def _grid(axes: mpl_axes.Axes, result: Result, factor: float) -> None:
  """Draws a grid's scores along its first field, with a line for each rest."""
  first, *others = result.cell.grid[0]
  numbers = all(
    isinstance(point[first], (int, float)) for point, _ in result.trials
  )
  lines: dict[str, list[tuple[Any, list[float]]]] = {}
  for point, rows in result.trials:
    scores = [row["score"] * factor for row in rows if row["score"] is not None]
    rest = tables.text({name: point[name] for name in others})
    if scores:
      lines.setdefault(rest, []).append((point[first], scores))
  for colour, (rest, points) in zip(itertools.cycle(_COLOURS), lines.items()):
    x = [value if numbers else str(value) for value, _ in points]
    for at, (_, scores) in zip(x, points):
      axes.plot([at] * len(scores), scores, ".", color=colour, alpha=0.4)
    means = [np.mean(scores) for _, scores in points]
    axes.plot(x, means, "o-", color=colour, markersize=4, label=rest)
  if numbers and all(point[first] > 0 for point, _ in result.trials):
    values = sorted({point[first] for point, _ in result.trials})
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
  axes.set(xlabel=first.replace("_", " "))
  if others:
    axes.legend(fontsize=7)


def blank(width: float, height: float) -> Figure:
  """Returns an empty figure of this size, in inches."""
  return Figure(figsize=(width, height), layout="constrained")


def wrapped(text: str) -> str:
  """Returns a title that is wrapped to several lines."""
  return textwrap.fill(text, 32)


def _panels(
  count: int, sharey: bool = False
) -> tuple[Figure, list[mpl_axes.Axes]]:
  """Returns a figure with `count` axes, in rows of up to four."""
  columns = min(count, 4) if count != 5 else 3
  rows = -(-count // columns)
  canvas = blank(max(2.6 * columns, 4.4), 2.5 * rows if count > 1 else 3.2)
  grid = canvas.subplots(rows, columns, squeeze=False, sharey=sharey)
  flat = [axes for row in grid for axes in row]
  for axes in flat[count:]:
    axes.remove()
  return canvas, flat[:count]


def _band(
  axes: mpl_axes.Axes,
  x: Sequence[float],
  middle: Any,
  half: Any,
  colour: str | None,
  marker: str = "",
) -> None:
  """Draws a line with its interval, or a thin grey line without a colour."""
  if colour is None:
    axes.plot(x, middle, color=GREY, linewidth=0.7)
    return
  axes.plot(x, middle, color=colour, marker=marker, markersize=3)
  if np.any(half):
    axes.fill_between(
      x, middle - half, middle + half, color=colour, alpha=0.15, linewidth=0
    )


def last_coloured(
  lines: Mapping[str, Any], colours: Mapping[str, str]
) -> list[tuple[str, Any]]:
  """Returns the lines with the grey ones first, so that others cover them."""
  return sorted(lines.items(), key=lambda item: item[0] in colours)


def _label_rows(grid: Sequence[mpl_axes.Axes], text: str) -> None:
  for axes in grid:
    place = axes.get_subplotspec()
    if place is not None and place.is_first_col():
      axes.set_ylabel(text)


def legend_below(
  canvas: Figure, colours: Mapping[str, str], labels: Sequence[str]
) -> None:
  """Draws a legend below the panels, with one entry for all grey lines."""
  shown = [label for label in colours if label in labels]
  handles: list[Any] = [
    mpl_lines.Line2D([], [], color=colours[label], label=label)
    for label in shown
  ]
  rest = len(set(labels) - set(shown))
  if rest:
    handles.append(mpl_lines.Line2D([], [], color=GREY, label=f"{rest} others"))
  # A letter takes 0.07 inches, and the line of an entry half an inch.
  longest = max(len(handle.get_label()) for handle in handles)
  columns = max(1, int(canvas.get_figwidth() / (0.07 * longest + 0.6)))
  canvas.legend(
    handles=handles, loc="outside lower center", ncols=columns, frameon=False
  )
