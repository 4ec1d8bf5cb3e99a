"""The runs of a study, the next runs, and the winner of each grid."""

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
    stage: whether the run is a trial of the tuning, or a final run. Only final
      runs are tested.
    config: the whole configuration, except the folder.
    point: the point of the grid; empty if the method is not tuned.
    sharpness: the options of the measurement at the end; None: none.
    landscape: the options of the landscape at the end; None: none. It is not a
      part of the key, so a study can ask for it later without changing rows.
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
    """The name of the run in a line of output."""
    tried = "".join(f", {k} {v:g}" for k, v in self.point.items())
    seed = self.config.optimisation.seed
    return f"{self.cell.name}, {self.stage}{tried}, seed {seed}"


def key(stage: str, config: Config, sharpness: Sharpness | None) -> str:
  """Returns the digest of a run, 16 hexadecimal digits."""
  fields = {
    name: value
    for name, value in config_lib.flat(config).items()
    if name not in _NEUTRAL
  }
  measured = dataclasses.asdict(sharpness) if sharpness else None
  text = json.dumps([stage, fields, measured], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Returns the rows by the keys that their runs have today.

  If the configuration has a new field, old rows have its default. A row with a
  field that no longer exists is left out.
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
  """Returns the runs that tune a method on a task, point by point.

  If the cell takes over another cell's point, these are the other cell's runs.
  A trial only gives a score: it has no diagnosis and no test.
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
  """Returns the final runs of a method on a task, at a point of its grid."""
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
  """Returns the point with the best mean score over the seeds of tuning.

  Of equal points, the first one wins. A point with a run that broke off is
  worse than all others.

  Returns:
    The point; `{}` if the method is not tuned; None if a trial is missing. If
    the cell takes over another cell's point, it is the other cell's result.
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
  # max() returns the first of equal points.
  return cell.grid[max(scores, key=lambda i: statistics.fmean(scores[i]))]


def known_runs(study: Study, cell: Cell, done: Rows) -> list[Run]:
  """Returns the known runs of a cell; final runs are known after tuning."""
  point = winner(study, cell, done)
  last = [] if point is None else finals(study, cell, point)
  return [*trials(study, cell), *last]


def remaining(study: Study, cells: list[Cell], done: Rows) -> Iterator[Run]:
  """Yields the known runs that are not finished, cell by cell."""
  for cell in cells:
    for run in known_runs(study, cell, done):
      if run.key not in done:
        yield run


def complete(study: Study, cells: list[Cell], done: Rows) -> bool:
  """Whether all runs of these cells are finished."""
  return all(
    winner(study, cell, done) is not None for cell in cells
  ) and not any(True for _ in remaining(study, cells, done))


def _landscape(study: Study, cell: Cell, seed: int) -> Landscape | None:
  """Returns the landscape's options if a final run is chosen for one."""
  options = study.landscape
  if options is None or seed != options.seed:
    return None
  chosen = options.methods or study.labels
  return options if cell.label in chosen else None
