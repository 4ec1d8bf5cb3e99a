"""The rows of landscapes: drawn once for each chosen method, and kept."""

from collections.abc import Collection, Mapping
import dataclasses
import json
from typing import Any

import numpy as np

from . import plan, record
from .results import Results
from .spec import Landscape, Study

FILE = "landscapes.jsonl"


def steps(options: Landscape) -> np.ndarray:
  """Where the losses are taken, `[points]`, as shares of the filters' norms."""
  return np.linspace(-options.radius, options.radius, options.points)


def key(recorded: str, options: Landscape) -> str:
  """What decides a landscape: the run, and what is drawn.

  Args:
    recorded: the key in the row of the run. Today's own may be another: it
      changes with each new field of the configuration.
    options: of the landscape.
  """
  measured = dataclasses.asdict(options)
  # Who else is drawn does not matter.
  del measured["methods"]
  return f"{recorded} {json.dumps(measured, sort_keys=True)}"


def row(
  run: plan.Run, recorded: str, found: Mapping[str, Any]
) -> dict[str, Any]:
  """The row of a landscape, for `landscapes.jsonl`; bare if a run broke off."""
  assert run.landscape is not None
  return {
    "key": key(recorded, run.landscape),
    "label": run.cell.label,
    "task": run.cell.task,
    "seed": run.config.optimisation.seed,
    "steps": steps(run.landscape).tolist(),
    **found,
  }


def keys(study: Study) -> set[str]:
  """Those of the landscapes that are there."""
  return {row["key"] for row in record.read(study.folder / FILE)}


def due(run: plan.Run, recorded: str, there: Collection[str]) -> bool:
  """Whether a run is to be drawn, and is not among those there."""
  return run.landscape is not None and (
    key(recorded, run.landscape) not in there
  )


def collect(
  study: Study, found: Results, rows: list[dict[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
  """The rows that are of the study, by task and method."""
  if study.landscape is None:
    return {}
  known = {x["key"]: x for x in rows if "line" in x}
  drawn: dict[str, dict[str, dict[str, Any]]] = {task: {} for task in found}
  for task, of_task in found.items():
    for label, result in of_task.items():
      if result.point is None:
        continue
      for run in plan.finals(study, result.cell, result.point):
        own = result.finals.get(run.config.optimisation.seed)
        if run.landscape is None or own is None:
          continue
        if (name := key(own["key"], run.landscape)) in known:
          drawn[task][label] = known[name]
  return drawn


def note(study: Study) -> str:
  """What the plots of landscapes are of."""
  assert study.landscape is not None
  return (
    f"The loss of {study.landscape.rows} training rows around the weights "
    f"after the last step, seed {study.landscape.seed}, along random directions"
    " of the merged kernels, scaled to the norms of each method's own filters "
    "(Li et al, 2018); the same draws for all methods."
  )
