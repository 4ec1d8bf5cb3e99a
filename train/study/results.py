"""The results of a study: its finished runs, by task and method."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .. import options
from . import plan
from .spec import Cell, Study

Row = Mapping[str, Any]


class Result(NamedTuple):
  """The finished runs of a method on a task.

  Attributes:
    point: the winning point of the grid; None if it is not known yet.
    trials: the finished runs of each point of the grid, in its order.
    finals: the finished final runs that did not break off, by seed.
    failed: the runs that broke off, trials too.
    finished: the number of runs that ended, also of those that broke off.
    planned: the number of all runs.
  """

  cell: Cell
  point: Mapping[str, Any] | None
  trials: list[tuple[Mapping[str, Any], list[Row]]]
  finals: dict[int, Row]
  failed: list[Row]
  finished: int
  planned: int

  @property
  def label(self) -> str:
    """The method's name."""
    return self.cell.label

  def of(self, *names: str | int) -> dict[int, float]:
    """Returns a number of each final run by its seed.

    Runs that lack the number are left out.

    Args:
      names: the path of the number in a row.

    Examples:
      `result.of("test", "accuracy")`
    """
    found = {seed: at(row, *names) for seed, row in self.finals.items()}
    for seed, value in found.items():
      # The reader of rows does not check metrics.
      place = f"the row {self.finals[seed]['key']} of runs.jsonl"
      options.checked(place, ", ".join(map(str, names)), value, float | None)
    return {seed: value for seed, value in found.items() if value is not None}


Results = dict[str, dict[str, Result]]
"""Results by task, then by method, in the order of the study's file."""


def collect(study: Study, done: plan.Rows) -> Results:
  """Returns the results of a study.

  Args:
    study: the study; rows of other runs are ignored.
    done: finished runs by their keys.
  """
  found: Results = {task: {} for task in study.tasks}
  for cell in study.cells:
    found[cell.task][cell.label] = _result(study, cell, done)
  return found


def at(row: Any, *names: str | int) -> Any:
  """Returns the value at a path in nested tables; None if it is missing."""
  for name in names:
    try:
      row = row[name]
    except (KeyError, IndexError, TypeError):
      return None
  return row


def _result(study: Study, cell: Cell, done: plan.Rows) -> Result:
  point = plan.winner(study, cell, done)
  trials = [] if cell.point_of else plan.trials(study, cell)
  finals = [] if point is None else plan.finals(study, cell, point)
  rows = [done[run.key] for run in (*trials, *finals) if run.key in done]
  return Result(
    cell=cell,
    point=point,
    trials=[
      (
        tried,
        [
          done[run.key]
          for run in trials
          if run.point == tried and run.key in done
        ],
      )
      for tried in cell.grid
    ],
    finals={
      run.config.optimisation.seed: done[run.key]
      for run in finals
      if run.key in done and not done[run.key]["failed"]
    },
    failed=[row for row in rows if row["failed"]],
    finished=len(rows),
    planned=len(trials) + len(cell.seeds),
  )
