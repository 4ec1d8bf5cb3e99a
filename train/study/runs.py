"""Runs the unfinished runs of a study, alone or as one of several workers."""

from collections.abc import Sequence
import os
import time
from typing import Any

from ..errors import UsageError
from . import landscape_rows, plan, record, training
from .spec import Cell, Study

_POLL_SECONDS = 2.0


def work(
  study: Study, cells: Sequence[Cell], worker: int = 0, workers: int = 1
) -> None:
  """Runs until all runs are finished.

  Cells are sorted by method, because tasks of a method share compiled
  functions. Each worker begins at a different cell. When it has passed the last
  cell, it continues with the first.

  Args:
    study: the study.
    cells: the cells to run.
    worker: the number of this worker, from 0.
    workers: the number of workers.

  Raises:
    UsageError: if the options of a run cannot be carried out.
  """
  kept: training.Kept = {}
  finished = _Finished(study)
  parent = os.getppid()
  ordered = sorted(cells, key=lambda cell: study.labels.index(cell.label))
  start = len(ordered) * worker // workers
  mine = ordered[start:] + ordered[:start]
  while True:
    done = finished.load()
    if plan.complete(study, mine, done):
      return
    for run in plan.remaining(study, mine, done):
      with record.claimed(study.folder, run.key) as claimed:
        # Another worker may have finished it since the rows were read.
        if not claimed or run.key in finished.load():
          continue
        row = _run(study, run, kept)
        landscape = row.pop("landscape", {})
        # If the row exists, the run was repeated only for its landscape.
        there = finished.rows().get(run.key)
        if run.landscape is not None:
          recorded = row["key"] if there is None else there["key"]
          record.append(
            study.folder / landscape_rows.FILE,
            landscape_rows.row(run, recorded, landscape),
          )
        if there is None:
          record.append(study.folder / record.RUNS, row)
        print(_line(run, row), flush=True)
        break
    else:
      time.sleep(_POLL_SECONDS)  # other workers have claimed the rest
    if workers > 1 and os.getppid() != parent:
      raise UsageError("the process that started this worker is gone.")


def load(study: Study) -> dict[str, dict[str, Any]]:
  """Returns the finished runs by key, except those that lack a landscape."""
  return _Finished(study).load()


class _Finished:
  """The finished runs of a study; reads each row only once."""

  def __init__(self, study: Study):
    self._study = study
    self._new = record.Rows(study.folder / record.RUNS)
    self._rows: dict[str, dict[str, Any]] = {}

  def rows(self) -> dict[str, dict[str, Any]]:
    """Returns the finished runs by their keys."""
    self._rows |= plan.finished(self._new.new())
    return self._rows

  def load(self) -> dict[str, dict[str, Any]]:
    """As the function `load`."""
    study, done = self._study, dict(self.rows())
    if study.landscape is None:
      return done
    there = landscape_rows.keys(study)
    for cell in study.cells:
      for run in plan.known_runs(study, cell, self._rows):
        row = done.get(run.key)
        if (
          row
          and not row["failed"]
          and landscape_rows.due(run, row["key"], there)
        ):
          del done[run.key]
    return done


def _run(study: Study, run: plan.Run, kept: training.Kept) -> dict[str, Any]:
  folder = study.folder / record.RUNNING / run.key
  try:
    return training.run(run, folder, kept)
  except UsageError as error:
    raise UsageError(f"{run.name}: {error}") from error


def _line(run: plan.Run, row: dict[str, Any]) -> str:
  if row["failed"]:
    return f"{run.name}: broke off, {row['failed']}"
  text = f"{run.name}: validation {row['score']:.4f}"
  if "test" in row:
    text += f", test {row['test'][row['metric']]:.4f}"
  return f"{text} ({row['seconds']:.0f} s)"
