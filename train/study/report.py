"""Writes the report of a study: tables and plots of its finished runs."""

import pathlib
import re
from typing import Any

from .. import files
from . import (
  forest,
  landscape_rows,
  memorisation,
  plan,
  plots,
  record,
  results,
  tables,
)
from .results import Result, Results
from .spec import Study

REPORT = "report.md"
PLOTS = "plots"


def write(study: Study) -> pathlib.Path:
  """Writes `report.md` and `plots/` into the folder of a study.

  They depend only on the study and its rows.

  Returns:
    The path of the report.

  Raises:
    UsageError: if the rows cannot be read.
    OSError: if the report cannot be written.
  """
  done = plan.finished(record.read(study.folder / record.RUNS))
  found = results.collect(study, done)
  lines_of = landscape_rows.collect(
    study, found, record.read(study.folder / landscape_rows.FILE)
  )
  folder = study.folder / PLOTS
  folder.mkdir(parents=True, exist_ok=True)
  lines = _head(study, found)
  with plots.styled():
    forest_plot = forest.differences(study, found)
  if forest_plot is not None:
    plots.save(forest_plot, folder / "differences.svg")
    lines += ["", f"![differences]({PLOTS}/differences.svg)"]
  for task, of_task in found.items():
    pictures = _pictures(study, task, of_task, lines_of.get(task, {}), folder)
    lines += ["", f"## {task}", "", *_task(study, of_task, pictures)]
  path = study.folder / REPORT
  files.write_atomically(path, "\n".join([*lines, ""]))
  return path


def _head(study: Study, found: Results) -> list[str]:
  every = [result for of_task in found.values() for result in of_task.values()]
  finished = sum(result.finished for result in every)
  planned = sum(result.planned for result in every)
  lines = [f"# {study.name}", "", f"{finished} of {planned} runs are finished."]
  missing = [
    f"- {result.cell.name}: {result.finished} of {result.planned}"
    + ("" if result.point is not None else ", to be tuned")
    for result in every
    if result.finished < result.planned
  ]
  if missing:
    lines += ["", "Missing:", "", *missing]
  rows = [row for result in every for row in result.finals.values()]
  made = sorted({f"{row['machine']}, JAX {row['jax']}" for row in rows})
  dates = sorted({row["date"] for row in rows})
  if made:
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    lines += ["", f"{span}; {'; '.join(made)}."]
  broken = tables.failures(every)
  if broken:
    lines += ["", "Broke off, and are in no mean:", "", *broken]
  return lines


def _task(
  study: Study, found: dict[str, Result], pictures: dict[str, str]
) -> list[str]:
  def picture(name: str) -> list[str]:
    return ["", pictures[name]] if name in pictures else []

  lines = tables.accuracy(study, found)
  lines += ["", tables.accuracy_note(study, found)]
  lines += _after(study, found)
  sharp = {
    key: tables.sharpness(study, found, *key) for key in tables.DIRECTIONS
  }
  if any(sharp.values()):
    assert study.sharpness is not None
    lines += [
      "",
      "### Sharpness",
      "",
      f"Rise of the loss of {study.sharpness.rows} training rows, in nats, at "
      f"the {study.sharpness.at} weights; ± is the 95% t-interval over seeds.",
      *picture("sharpness"),
      *picture("gain"),
    ]
    for key, table in sharp.items():
      if table:
        lines += ["", f"{tables.DIRECTIONS[key]}:".capitalize(), "", *table]
        lines += _paired(study, found, *key)
  for recovery in study.recovery:
    shares = tables.shares(study, found, recovery)
    if shares:
      lines += ["", f"### Share of the drop to {recovery.target}", "", *shares]
      lines += ["", tables.shares_note(recovery)]
  equal = memorisation.table(study, found)
  if equal:
    lines += ["", "### At equal training loss", "", *equal]
    lines += ["", memorisation.note(study), *picture("memorisation")]
  if "curves" in pictures or "diagnostics" in pictures:
    lines += ["", "### Training", *picture("curves"), *picture("diagnostics")]
  if "landscape" in pictures or "plane" in pictures:
    lines += ["", "### Landscapes", *picture("landscape"), *picture("plane")]
    lines += ["", landscape_rows.note(study)]
  lines += ["", "### Tuning", "", *tables.tuning(found)]
  lines += ["", tables.tuning_note(study), *picture("tuning")]
  return lines


def _after(study: Study, found: dict[str, Result]) -> list[str]:
  tables_of = tables.after(study, found)
  if not tables_of:
    return []
  accuracies, differences, probabilities = tables_of
  return [
    "",
    "### After training",
    "",
    "Accuracy in %: of the best weights and of those of the last step on the "
    "test rows, of the best on rows that are shifted, and of the merged model "
    "in few bits and without its smallest weights:",
    "",
    *accuracies,
    "",
    f"Differences to {study.reference} in points, paired by the seed, with p "
    "in brackets (exact sign-flip test, not corrected):",
    "",
    *differences,
    "",
    "Probabilities of the test rows, by the best weights:",
    "",
    *probabilities,
  ]


def _paired(
  study: Study, found: dict[str, Result], space: str, direction: str
) -> list[str]:
  table = tables.sharpness_differences(study, found, space, direction)
  if not table:
    return []
  said = f"Differences to {study.reference}, paired by the seed, with p in "
  return ["", f"{said}brackets (exact sign-flip test):", "", *table]


def _pictures(
  study: Study,
  task: str,
  found: dict[str, Result],
  landscapes: dict[str, Any],
  folder: pathlib.Path,
) -> dict[str, str]:
  """Returns the Markdown of each plot by its name, except empty plots."""
  links = {}
  drawn_of = plots.figures(study, found, landscapes)
  with plots.styled():
    gain = forest.against_sharpness(study, found)
    memorised = memorisation.figure(study, found)
  if gain is not None:
    drawn_of["gain"] = gain
  if memorised is not None:
    drawn_of["memorisation"] = memorised
  for name, canvas in drawn_of.items():
    file = f"{_slug(task)}-{name}.svg"
    plots.save(canvas, folder / file)
    links[name] = f"![{name}]({PLOTS}/{file})"
  return links


def _slug(name: str) -> str:
  return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
