"""The report and the figures, from the rows alone."""

from collections.abc import Callable, Mapping, Sequence
import pathlib
from typing import Any, NamedTuple

import numpy as np

from studies.diffusion.denoising import NEW, SIDE, digits
from studies.diffusion.runs import (
  METHODS,
  REFERENCE,
  Measured,
  Row,
  Study,
  ink,
  key_of,
)
from train import files
from train.study import estimates, plots

# Losses are near 0.1, and their differences are thousandths.
_FACTOR = 1000.0


def _chosen(part: str) -> Callable[[Row, int], float | None]:
  return lambda row, every: row["curves"][part][
    int(row["point"]["steps"]) // every
  ]


class Outcome(NamedTuple):
  """A number of a final run.

  Attributes:
    title: of its table.
    value: `(row, every) -> number`.
    factor: what the number is multiplied by.
    unit: of the product.
  """

  title: str
  value: Callable[[Row, int], float | None]
  factor: float = _FACTOR
  unit: str = "denoising loss, thousandths"


OUTCOMES = {
  "new": Outcome("Unseen images of the 9 (the main outcome)", _chosen("new")),
  "last": Outcome(
    "Unseen images of the 9, after all steps",
    lambda row, every: row["curves"]["new"][-1],
  ),
  "old": Outcome("Held-out images of the old classes", _chosen("old")),
  "old_last": Outcome(
    "Held-out images of the old classes, after all steps",
    lambda row, every: row["curves"]["old"][-1],
  ),
  "training": Outcome("The 16 images", _chosen("training")),
  "nines": Outcome(
    "Samples that are taken for a 9",
    lambda row, every: row["share_of_nines"],
    100.0,
    "share, %",
  ),
}


def write(study: Study) -> pathlib.Path:
  """Writes report.md and the figures; returns the report's path."""
  lines = _head(study)
  finals = {name: _finals(study, name) for name in METHODS}
  if finals[REFERENCE]:
    figures = {
      "differences": (_forest(study, finals), "Differences to LoRA r=4."),
      "curves": (_curves(study, finals), _CURVES),
      "samples": (_samples(study, finals), "Samples of seed 0, as they came."),
    }
    for name, (figure, caption) in figures.items():
      plots.save(figure, study.folder / f"{name}.svg")
      lines += ["", f"![{caption}]({name}.svg)"]
    lines += ["", _NOTE]
    for outcome in OUTCOMES.values():
      lines += ["", f"## {outcome.title}", ""]
      lines += _table(study, finals, outcome)
    lines += _equal_gradients(study, finals)
  path = study.folder / "report.md"
  files.write_atomically(path, "\n".join([*lines, ""]))
  return path


_CURVES = (
  "Losses over the steps, with a dot where validation stopped. Methods with a "
  "small rho lie on LoRA r=4."
)
_NOTE = (
  "± is the 95% t-interval over seeds. A difference is that to "
  f"{REFERENCE}, paired by the seed. p is that of the exact two-sided "
  "sign-flip test, and Holm's correction is over the methods of a table. The "
  "steps are those that validation chose, but for the tables of all steps."
)


def _head(study: Study) -> list[str]:
  lines = [
    "# A diffusion model that learns a new class",
    "",
    "`python -m studies.diffusion` makes this page, and its module has the "
    "protocol.",
    "",
    f"{len(study.rows)} runs are finished.",
  ]
  rows = list(study.rows.values())
  if rows:
    days = sorted({row["date"] for row in rows})
    lines[-1] += (
      f" They ran on {' and '.join(days)} with JAX "
      f"{', '.join(sorted({row['jax'] for row in rows}))}."
    )
  base = study.rows.get("base")
  if base:
    lines += [
      "",
      f"The base has {base['parameters']:,} parameters. Its denoising loss on "
      f"held-out images of the old classes is {_FACTOR * base['old']:.2f} "
      "thousandths.",
    ]
  tuned = [name for name in METHODS if _is_tuned(study, name)]
  if tuned:
    lines += ["", "## Tuning", "", *_tuning(study, tuned)]
  return lines


def _is_tuned(study: Study, name: str) -> bool:
  follows = METHODS[name].has_rho or METHODS[name].longer > 1
  if follows and not _is_tuned(study, REFERENCE):
    return False
  return all(
    key_of("tuning", name, point, seed) in study.rows
    for point in study.points(name)
    for seed in study.settings.tuning_seeds
  )


def _tuning(study: Study, tuned: Sequence[str]) -> list[str]:
  """Each point's lowest validation loss, and the steps at which it is."""
  lines = _heads(
    ["method", "learning rate", "rho", "steps", "validation loss, thousandths"]
  )
  for name in tuned:
    winner = study.winner(name)
    for point in study.points(name):
      losses = study.validation(name, point)[1:]
      place = int(np.argmin(losses))
      won = point.items() <= winner.items()
      cells = [
        name,
        f"{point['learning_rate']:g}",
        f"{point['rho']:g}" if METHODS[name].has_rho else "",
        str((place + 1) * study.settings.every),
        f"{_FACTOR * losses[place]:.2f}" + (" (won)" if won else ""),
      ]
      lines.append(f"| {' | '.join(cells)} |")
  return lines


def _finals(study: Study, name: str) -> dict[int, Row]:
  return {
    row["seed"]: row
    for row in study.rows.values()
    if row.get("stage") == "final" and row["method"] == name
  }


def _values(
  study: Study, rows: Mapping[int, Row], outcome: Outcome
) -> dict[int, float]:
  found = {
    seed: outcome.value(row, study.settings.every) for seed, row in rows.items()
  }
  return {k: outcome.factor * x for k, x in found.items() if x is not None}


def _table(
  study: Study, finals: Mapping[str, Mapping[int, Row]], outcome: Outcome
) -> list[str]:
  values = {name: _values(study, x, outcome) for name, x in finals.items()}
  others = [name for name in METHODS if name != REFERENCE]
  paired = {
    name: estimates.differences(values[name], values[REFERENCE])
    for name in others
  }
  flips = [estimates.sign_flip(paired[name]) for name in others]
  # The control came later, and is not of the family.
  family = [
    None if METHODS[name].longer > 1 else p for name, p in zip(others, flips)
  ]
  ps = dict(zip(others, zip(flips, estimates.holm(family))))
  lines = _heads(
    [
      "method",
      "n",
      outcome.unit,
      "difference",
      "p",
      "p, Holm",
      "learning rate, rho",
      "steps",
      "gradients",
    ]
  )
  for name, own in values.items():
    p, corrected = ps.get(name, (None, None))
    point = next((row["point"] for row in finals[name].values()), None)
    cells = [
      name,
      str(len(own)),
      _shown(own.values(), ""),
      _shown(paired.get(name, ()), "+"),
      "" if p is None else f"{p:.3f}",
      "" if corrected is None else f"{corrected:.3f}",
    ]
    if point is not None:
      steps = point["steps"]
      if outcome in (OUTCOMES["last"], OUTCOMES["old_last"]):
        steps = METHODS[name].longer * study.settings.steps
      cells += [
        f"{point['learning_rate']:g}"
        + (f", {point['rho']:g}" if METHODS[name].has_rho else ""),
        str(steps),
        str(steps * METHODS[name].gradients),
      ]
    else:
      cells += ["", "", ""]
    lines.append(f"| {' | '.join(cells)} |")
  return lines


def _equal_gradients(
  study: Study, finals: Mapping[str, Mapping[int, Row]]
) -> list[str]:
  """LoRA-SAM against the LoRA that may take as many gradients."""
  pair = [x for x, method in METHODS.items() if method.sam or method.longer > 1]
  if len(pair) < 2:
    return []
  differences = estimates.differences(
    *(_values(study, finals[name], OUTCOMES["new"]) for name in pair)
  )
  if not differences:
    return []
  return [
    "",
    "## As many gradients",
    "",
    f"{pair[0]} minus {pair[1]}, on unseen images of the 9: "
    f"{_shown(differences, '+')} thousandths (n = {len(differences)}, "
    f"p = {estimates.sign_flip(differences):.3f}).",
  ]


def _heads(names: Sequence[str]) -> list[str]:
  return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def _shown(values: Any, sign: str) -> str:
  found = estimates.mean(list(values))
  if found is None:
    return ""
  half = "" if found.half is None else f" ± {found.half:.2f}"
  return f"{found.mean:{sign}.2f}{half}"


def _forest(study: Study, finals: Mapping[str, Mapping[int, Row]]) -> Any:
  """Paired differences with 95% intervals, a panel for each outcome."""
  names = [name for name in METHODS if name != REFERENCE and finals[name]]
  shown = {key: OUTCOMES[key] for key in ("new", "last", "old", "nines")}
  with plots.styled():
    figure = plots.blank(10.4, 2.6)
    panels = figure.subplots(1, len(shown), sharey=True)
    for panel, outcome in zip(panels, shown.values()):
      reference = _values(study, finals[REFERENCE], outcome)
      for place, name in enumerate(reversed(names)):
        found = estimates.mean(
          estimates.differences(
            _values(study, finals[name], outcome), reference
          )
        )
        if found is not None:
          panel.errorbar(
            found.mean, place, xerr=found.half, fmt="o", capsize=2, color="C0"
          )
      panel.axvline(0, color=plots.GREY, linewidth=0.8, zorder=0)
      panel.set(title=plots.wrapped(outcome.title), xlabel=outcome.unit)
    panels[0].set_yticks(range(len(names)), reversed(names))
  return figure


def _curves(study: Study, finals: Mapping[str, Mapping[int, Row]]) -> Any:
  """Mean losses over the steps, a dot where validation stopped."""
  every = study.settings.every
  with plots.styled():
    figure = plots.blank(10.4, 3.4)
    panels = figure.subplots(1, len(Measured._fields))
    colours = {name: f"C{i}" for i, name in enumerate(METHODS)}
    for panel, part in zip(panels, Measured._fields):
      for name, rows in finals.items():
        curves = [row["curves"][part] for row in rows.values()]
        if not curves:
          continue
        means = _FACTOR * np.mean(np.array(curves, float), axis=0)
        panel.plot(every * np.arange(len(means)), means, color=colours[name])
        steps = int(next(iter(rows.values()))["point"]["steps"])
        panel.plot(steps, means[steps // every], "o", color=colours[name])
      panel.set(xlabel="step", title=_PARTS[part], ylabel=_LOSS_LABEL)
    plots.legend_below(figure, colours, list(METHODS))
  return figure


_LOSS_LABEL = "denoising loss, thousandths"
_PARTS = {
  "training": "the 16 images",
  "new": "unseen images of the 9",
  "old": "old classes, held out",
}


def _samples(study: Study, finals: Mapping[str, Mapping[int, Row]]) -> Any:
  """Samples of the base and of each method, and real images."""
  real = ink(digits().test[: NEW + 1])
  first = study.settings.seeds[0]
  shown = {"real 9s, unseen": real}
  if "base" in study.rows:
    shown["the base, 0 to 9"] = study.rows["base"]["samples"]
  for name, rows in finals.items():
    if first in rows:
      shown[name] = rows[first]["samples"]
  with plots.styled():
    figure = plots.blank(5.0, 0.66 * len(shown))
    grid = figure.subplots(len(shown), 1)
    for panel, (name, images) in zip(grid, shown.items()):
      pictures = np.pad(
        np.array(images).reshape(-1, SIDE, SIDE), ((0, 0), (1, 1), (1, 1))
      )
      panel.imshow(np.concatenate(pictures, axis=1), cmap="gray_r")
      panel.set(xticks=[], yticks=[])
      panel.set_title(name, loc="left", fontsize=7, pad=2)
      panel.spines[:].set_visible(False)
  return figure
