"""The rows of landscapes, one for each chosen method and task."""

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
  """Returns the steps at which losses are measured, `[points]`.

  A step of 1 is as long as the norm of the filters.
  """
  return np.linspace(-options.radius, options.radius, options.points)


def key(recorded: str, options: Landscape) -> str:
  """Returns a key of everything that decides a landscape.

  Args:
    recorded: the key in the row of the run. The run's key today may differ,
      because each new field of the configuration changes it.
    options: the options of the landscape.
  """
  measured = dataclasses.asdict(options)
  # A landscape does not depend on which other methods have one.
  del measured["methods"]
  return f"{recorded} {json.dumps(measured, sort_keys=True)}"


def row(
  run: plan.Run, recorded: str, found: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the row of a landscape, for `landscapes.jsonl`.

  It has no losses if the run broke off.
  """
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
  """Returns the keys of the landscapes that are recorded."""
  return {row["key"] for row in record.read(study.folder / FILE)}


def due(run: plan.Run, recorded: str, there: Collection[str]) -> bool:
  """Whether a run needs a landscape, and its key is not in `there`."""
  return run.landscape is not None and (
    key(recorded, run.landscape) not in there
  )


def collect(
  study: Study, found: Results, rows: list[dict[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
  """Returns the rows of the study's landscapes, by task and method."""
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
  """Returns the sentence that explains the plots of landscapes."""
  assert study.landscape is not None
  return (
    f"The loss of {study.landscape.rows} training rows around the weights "
    f"after the last step, seed {study.landscape.seed}, along random directions"
    " of the merged kernels, scaled to the norms of each method's own filters "
    "(Li et al, 2018); the same draws for all methods."
  )
