"""What a study has found by now: its finished runs, by task and method."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .. import options
from . import plan
from .spec import Cell, Study

Row = Mapping[str, Any]


class Result(NamedTuple):
  """What there is of a method on a task.

  Attributes:
    point: of its grid, that won; None while it is not known.
    trials: the finished runs of each point of the grid, in its order.
    finals: the finished final runs that did not break off, by seed.
    failed: runs that broke off, of tuning too.
    finished: runs that are done, broken off or not.
    planned: runs in all.
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
    """A number of each final run by its seed; without runs that lack it.

    Args:
      names: the way to it in a row.

    Examples:
      `result.of("test", "accuracy")`
    """
    found = {seed: at(row, *names) for seed, row in self.finals.items()}
    for seed, value in found.items():
      # Rows are read without the names of their metrics being checked.
      place = f"the row {self.finals[seed]['key']} of runs.jsonl"
      options.checked(place, ", ".join(map(str, names)), value, float | None)
    return {seed: value for seed, value in found.items() if value is not None}


Results = dict[str, dict[str, Result]]
"""By the task, then by the method, in the order of the file."""


def collect(study: Study, done: plan.Rows) -> Results:
  """The results of a study.

  Args:
    study: what was to be run; rows of no run of it do not count.
    done: finished runs by their keys.
  """
  found: Results = {task: {} for task in study.tasks}
  for cell in study.cells:
    found[cell.task][cell.label] = _result(study, cell, done)
  return found


def at(row: Any, *names: str | int) -> Any:
  """What is in nested tables at some names; None if one is not there."""
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
