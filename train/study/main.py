"""`python -m train study STUDY.toml`: methods x tasks x seeds."""

import argparse
from collections.abc import Sequence
import dataclasses
import pathlib
import re
from typing import Annotated

import tyro

from .. import command, locks
from .. import options as options_lib
from ..devices import launch
from ..errors import UsageError
from ..options import option
from . import plan, record, spec, workers
from .spec import Cell, Study


@dataclasses.dataclass(frozen=True)
class Options:
  """Runs a study, and writes its tables and plots.

  The same command continues a study that was interrupted.
  """

  study: Annotated[pathlib.Path, tyro.conf.Positional]
  """The TOML file of the study."""
  workers: int = option(1, least=1, below=2**10)
  """Number of processes that share the runs. Each has one device, or an equal
  share of the CPU's cores."""
  only: str = ""
  """Methods and tasks to run, as METHOD/TASK, METHOD/ or /TASK, separated by
  commas. Empty means all."""
  tune: bool = False
  """Run only the trials of the tuning. Nothing is tested."""
  dry_run: bool = False
  """List the runs with their steps and gradients, and run nothing."""
  report: bool = False
  """Write the tables and plots of the finished runs, and run nothing. Without
  this option they are written at the end."""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command.

  Returns:
    0; 1 if a worker failed; 2 if a worker had a UsageError.

  Raises:
    UsageError: if the study or the options are invalid.
    OSError: if a file cannot be written.
  """
  place, rest = _place().parse_known_args(argv)
  options = options_lib.parse(Options, rest, f"{command.NAME} study")
  study = spec.read(options.study)
  cells = select(study, options.only)
  if options.tune:
    cells = [dataclasses.replace(cell, seeds=()) for cell in cells]
  if options.dry_run:
    return _dry_run(study, cells)
  code = 0
  if not options.report:
    code = _run(options, place, study, cells)
  # The report of the finished runs is written even if a worker failed.
  if code != 2 and place.worker < 0:
    # Imported late, so that an error in the study's file is reported at once.
    from . import report

    print(f"report: {report.write(study)}")
  return code


def _place() -> argparse.ArgumentParser:
  """Returns a parser of the options that `workers.start` gives each worker."""
  place = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  place.add_argument("--worker", type=int, default=-1)
  place.add_argument("--cores", default="")
  return place


def _run(
  options: Options,
  place: argparse.Namespace,
  study: Study,
  cells: Sequence[Cell],
) -> int:
  if place.worker >= 0:
    # The parent is the command that holds the folder.
    launch.end_with_parent()
    cores = [core for core in place.cores.split(",") if core]
    if not all(re.fullmatch("[0-9]{1,6}", core) for core in cores):
      raise UsageError(
        f"--cores must be a list of numbers of cores; got {place.cores!r}."
      )
    workers.bind([int(core) for core in cores])
    from . import runs

    runs.work(study, cells, place.worker, options.workers)
    return 0
  with locks.held(study.folder / locks.FILE, f"the folder {study.folder}"):
    record.sweep(study.folder)
    if options.workers > 1:
      chosen = ["--only", options.only] if options.only else []
      chosen += ["--tune"] if options.tune else []
      return workers.start(options.study, chosen, options.workers)
    from . import runs

    runs.work(study, cells)
  return 0


def select(study: Study, only: str) -> list[Cell]:
  """Returns the cells that `--only` names; all cells if it is empty.

  Raises:
    UsageError: if a name fits no cell.
  """
  if not only:
    return list(study.cells)
  chosen: list[Cell] = []
  rest = only.split(",")
  while rest:
    # A label may contain commas, so the longest name that exists is taken.
    for count in range(len(rest), 0, -1):
      name = ",".join(rest[:count]).strip()
      label, _, task = name.partition("/")
      found = [
        cell
        for cell in study.cells
        if label in ("", cell.label) and task in ("", cell.task)
      ]
      if name and found:
        break
    else:
      raise UsageError(
        "--only must name some of "
        f"{', '.join(cell.name for cell in study.cells)}; got "
        f"{rest[0].strip()!r}."
      )
    chosen += [cell for cell in found if cell not in chosen]
    del rest[:count]
  return chosen


def _dry_run(study: Study, cells: Sequence[Cell]) -> int:
  from . import runs, training

  done = runs.load(study)
  total = 0.0
  print("method/task: trials + final runs, steps of each, gradients of all")
  for cell in cells:
    known = plan.known_runs(study, cell, done)
    tuned = plan.winner(study, cell, done) is not None
    finals = [run for run in known if run.stage == "final"]
    trials = [] if cell.point_of else plan.trials(study, cell)
    count = len(trials) + len(cell.seeds)
    own = finals if cell.point_of else known
    left = count - sum(run.key in done for run in own)
    steps = training.steps(cell.config)
    cost = left * steps * cell.config.method.gradients
    total += cost
    print(
      f"{cell.name}: {len(trials)} + {len(cell.seeds)} runs, {left} left, "
      f"{steps} steps, {cost:,.0f} gradients"
      + ("" if tuned and finals else ", to be tuned")
    )
  print(f"left: {total:,.0f} gradients")
  return 0
