"""What runs a study has, which come next, and which of a grid won."""

from collections.abc import Iterator, Mapping
import dataclasses
import hashlib
import json
import math
import statistics
from typing import Any, Literal, NamedTuple

from ..run import config as config_lib
from ..run.config import Config
from . import spec
from .spec import Cell, Landscape, Sharpness, Study

Stage = Literal["tune", "final"]
Rows = Mapping[str, Mapping[str, Any]]
"""Finished runs by their keys."""

_NEUTRAL = (
  *("run_dir", "data_dir", "compilation_cache", "mesh", "profile"),
  *("baseline", "checkpoint_every", "eval_batch_size", "plugins"),
  "accept_changes",
)


class Run(NamedTuple):
  """One run.

  Attributes:
    stage: a trial of the tuning, or a final run, which alone is tested.
    config: whole, but for the folder.
    point: of the grid, what was tried; empty if the method is not tuned.
    sharpness: what is measured at its end.
    landscape: what is drawn at its end. It is kept apart, and no part of the
      key: to ask for it later changes no row.
  """

  cell: Cell
  stage: Stage
  config: Config
  point: Mapping[str, Any]
  sharpness: Sharpness | None
  landscape: Landscape | None = None

  @property
  def key(self) -> str:
    """The digest of everything that decides the numbers of the run."""
    return key(self.stage, self.config, self.sharpness)

  @property
  def name(self) -> str:
    """For a line of output."""
    tried = "".join(f", {k} {v:g}" for k, v in self.point.items())
    seed = self.config.optimisation.seed
    return f"{self.cell.name}, {self.stage}{tried}, seed {seed}"


def key(stage: str, config: Config, sharpness: Sharpness | None) -> str:
  """The digest of a run, 16 hexadecimal digits."""
  fields = {
    name: value
    for name, value in config_lib.flat(config).items()
    if name not in _NEUTRAL
  }
  measured = dataclasses.asdict(sharpness) if sharpness else None
  text = json.dumps([stage, fields, measured], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """The rows by the keys that their runs would have today.

  A field of the configuration that is new since then is at its default in old
  rows; a row with one that is gone is of no run.
  """
  found = {}
  known = set(config_lib.kinds())
  for row in rows:
    if set(row["config"]) <= known:
      measured = row["sharpness_options"]
      where = f"the row {row['key']} of runs.jsonl"
      config = config_lib.from_any(where, row["config"])
      if measured:
        place = f"{where}, sharpness_options"
        measured = spec.plain(place, spec.Sharpness, measured)
      found[key(row["stage"], config, measured)] = row
  return found


def trials(study: Study, cell: Cell) -> list[Run]:
  """The runs that tune a method on a task, point by point.

  Those of another cell, if its point is taken over. A trial is there for its
  score: it diagnoses nothing, and is not tested.
  """
  tuned = cell.point_of or cell
  config = config_lib.replace(tuned.config, diagnose_every=0, after="")
  return [
    Run(
      tuned,
      "tune",
      config_lib.replace(config, seed=seed, **point),
      point,
      None,
    )
    for point in tuned.grid
    for seed in (study.tuning.seeds if study.tuning else ())
  ]


def finals(study: Study, cell: Cell, point: Mapping[str, Any]) -> list[Run]:
  """The final runs of a method on a task, at a point of its grid."""
  return [
    Run(
      cell,
      "final",
      config_lib.replace(cell.config, seed=seed, **point),
      point,
      study.sharpness,
      _landscape(study, cell, seed),
    )
    for seed in cell.seeds
  ]


def winner(study: Study, cell: Cell, done: Rows) -> Mapping[str, Any] | None:
  """The point of the best mean score over the seeds of tuning; ties: the first.

  A point of which a run broke off is behind all others.

  Returns:
    No point, `{}`, if the method is not tuned; None while a trial is missing;
    that of another cell, if it is taken over.
  """
  cell = cell.point_of or cell
  if not cell.grid:
    return {}
  scores: dict[int, list[float]] = {}
  for run in trials(study, cell):
    if run.key not in done:
      return None
    score = done[run.key]["score"]
    place = cell.grid.index(run.point)
    scores.setdefault(place, []).append(-math.inf if score is None else score)
  # max() takes the first of equals.
  return cell.grid[max(scores, key=lambda i: statistics.fmean(scores[i]))]


def known_runs(study: Study, cell: Cell, done: Rows) -> list[Run]:
  """The runs of a cell that are known by now: final ones once it is tuned."""
  point = winner(study, cell, done)
  last = [] if point is None else finals(study, cell, point)
  return [*trials(study, cell), *last]


def remaining(study: Study, cells: list[Cell], done: Rows) -> Iterator[Run]:
  """The runs that are known by now and not finished, cell by cell."""
  for cell in cells:
    for run in known_runs(study, cell, done):
      if run.key not in done:
        yield run


def complete(study: Study, cells: list[Cell], done: Rows) -> bool:
  """Whether nothing is left to run."""
  return all(
    winner(study, cell, done) is not None for cell in cells
  ) and not any(True for _ in remaining(study, cells, done))


def _landscape(study: Study, cell: Cell, seed: int) -> Landscape | None:
  """What is drawn of a final run, if it is among the chosen ones."""
  options = study.landscape
  if options is None or seed != options.seed:
    return None
  chosen = options.methods or study.labels
  return options if cell.label in chosen else None
