"""A run of a study: the loop of `run.loop`, with its results in memory.

Such a run has no checkpoints and no report. If it is killed, it starts again.
Only a row is kept.
"""

import base64
from collections.abc import Callable, Mapping
import dataclasses
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import files
from ..data import load as data_lib
from ..errors import UsageError
from ..models import load as models
from ..run import after, assemble, claim, loop, step
from ..run import config as config_lib
from ..run.assemble import Prepared
from ..run.config import Config
from ..run.journal import Journal
from ..run.loggers.logger import Logger
from . import measure, plan, programs
from .programs import Kept, Programs

_POINTS = 48
_DIGESTED = 8


class Curves(Logger):
  """Keeps logged values as [step, value] by name, rounded to 6 digits."""

  def __init__(self):
    self.found: dict[str, list[list[float]]] = {}

  def log(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      # A study has its own times, see `Timed`.
      if name not in ("step_seconds", "tokens_per_second"):
        rounded = float(f"{value:.6g}")
        self.found.setdefault(name, []).append([step, rounded])


class Memory:
  """Keeps the best weights, but nothing to resume from."""

  best: Any = None

  def save_best(self, step: int, evaluated: Any) -> None:
    """As `run.loop.Kept.save_best`."""
    # A copy, because the next step donates these arrays.
    self.best = jax.tree.map(jnp.copy, evaluated)

  def save_last(
    self, step: int, state: step.TrainState, loop: Mapping[str, Any]
  ) -> None:
    """As `run.loop.Kept.save_last`."""


class Timed:
  """A step that blocks until it ends; keeps its seconds and counts tokens."""

  def __init__(self, train_step: Callable[..., Any]):
    self._step = train_step
    self.seconds: list[float] = []
    self.tokens = 0

  def __call__(self, *arguments: Any) -> tuple[step.TrainState, step.Metrics]:
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(self._step(*arguments))
    self.seconds.append(time.perf_counter() - start)
    self.tokens += int(metrics.tokens)
    return state, metrics


class Weights(NamedTuple):
  """The evaluated weights at the best step, and at the last step."""

  best: Any
  last: Any


def run(task: plan.Run, folder: pathlib.Path, kept: Kept) -> dict[str, Any]:
  """Trains a run; a final run is also tested and measured.

  Args:
    task: the run.
    folder: the folder for temporary files, which is removed at the end.
    kept: compiled functions of earlier runs; those of this run are added.

  Returns:
    The row of the run. Its landscape, if it has one, is in "landscape".

  Raises:
    UsageError: if the options of the run cannot be carried out.
  """
  start = time.perf_counter()
  config = config_lib.replace(task.config, run_dir=str(folder))
  with claim.claimed(config):
    try:
      prepared = assemble.prepare(config)
      found = _outcome(task, prepared, kept)
    finally:
      shutil.rmtree(folder, ignore_errors=True)
  row = {
    "key": task.key,
    "label": task.cell.label,
    "task": task.cell.task,
    "method": config.method.name,
    "stage": task.stage,
    "seed": config.optimisation.seed,
    "point": dict(task.point),
    "steps": prepared.steps,
    "gradients_per_step": task.config.method.gradients,
    "rows": prepared.data.rows,
    "metric": prepared.data.metric,
    "data": digest(prepared.data),
    **found,
    "config": config_lib.flat(task.config),
    "sharpness_options": dataclasses.asdict(task.sharpness)
    if task.sharpness
    else None,
    "seconds": time.perf_counter() - start,
    "machine": _machine(),
    "jax": jax.__version__,
    "date": time.strftime("%Y-%m-%d"),
  }
  return files.finite(row)


def steps(config: Config) -> int:
  """Returns the number of steps of a run, without preparing the run.

  Raises:
    UsageError: if the model or the data cannot be read.
  """
  try:
    pretrained = models.open_pretrained(
      config.model.name, config.model.hub_revision, head=config.model.head
    )
    data = assemble.load_data(config, pretrained)
  except (ValueError, RuntimeError) as error:
    raise UsageError(str(error)) from error
  return config.optimisation.epochs * data.steps_per_epoch


def digest(data: data_lib.Data) -> str:
  """Returns a digest of the first training batches: rows and order."""
  found = hashlib.sha256()
  for _, batch in zip(range(_DIGESTED), data.train_batches()):
    for name in sorted(batch):
      found.update(np.ascontiguousarray(batch[name]).tobytes())
  return found.hexdigest()[:16]


def _outcome(task: plan.Run, prepared: Prepared, kept: Kept) -> dict[str, Any]:
  compiled = programs.of(prepared, task, kept)
  config = prepared.config
  values = config_lib.flat(config)
  numbers = {name: values[name] for name in compiled.traced}
  timed = Timed(functools.partial(compiled.step, numbers))
  curves, memory = Curves(), Memory()
  state, _ = loop.initial(prepared, jax.random.key(config.optimisation.seed))
  try:
    trained = loop.train(
      prepared,
      loop.Programs(
        timed,
        loop.predictor(prepared, compiled.predict),
        compiled.diagnose and loop.diagnoser(prepared, compiled.diagnose),
      ),
      loop.Sinks(Journal([curves]), memory, max(1, prepared.steps // _POINTS)),
      state,
    )
    loop.require_useful(memory.best)
  except loop.NonfiniteError as error:
    sentence = (
      f"the loss or gradient of step {error.step} is not finite, "
      f"{error.in_a_row} in a row"
    )
    return {"failed": sentence, "score": None}
  except loop.NothingLearnedError as error:
    return {"failed": str(error), "score": None}
  weights = Weights(
    memory.best, prepared.method.evaluated(trained.state.trained)
  )
  # Only the second half counts, because it has no compilations.
  times = timed.seconds[len(timed.seconds) // 2 :]
  found = {
    "failed": None,
    "score": trained.best["score"],
    "best_step": trained.best["step"],
    "validation": {"best": trained.best["numbers"], "last": trained.last},
    "step_seconds": statistics.median(times),
    "tokens": timed.tokens,
    "curves": curves.found,
  }
  if config.evaluation.patience:
    found["stopped_at"] = trained.stopped_at
  if task.stage == "final":
    found |= _tested(prepared, compiled, weights.best)
    if compiled.after is not None:
      found["after"] = after.evaluations(
        prepared, *weights, compiled.after, compiled.shifted
      )
    if compiled.measure is not None:
      start = time.perf_counter()
      found["sharpness"] = _measured(task, prepared, compiled, weights)
      found["sharpness_seconds"] = time.perf_counter() - start
    if compiled.draw is not None:
      found["landscape"] = _drawn(task, prepared, compiled, weights)
  return found


def _tested(
  prepared: Prepared, compiled: Programs, evaluated: Any
) -> dict[str, Any]:
  """Tests a model, and returns a bit for each row that was right.

  There are no bits if the task predicts values or tokens.
  """
  right = np.zeros(prepared.data.rows["test"], bool)

  def look(batch, items):
    if "index" in batch:
      real = batch["weights"] > 0
      right[batch["index"][real]] = items.right[real] > 0

  test = loop.predictor(prepared, compiled.predict, look)(evaluated, "test")
  packed = base64.b64encode(np.packbits(right).tobytes()).decode()
  numbers = {**test.metrics, "loss": test.loss}
  return {
    "test": numbers | {"rows": test.rows, "unit": test.unit},
    "correct": packed if test.unit == "rows" else None,
  }


def _measured(
  task: plan.Run, prepared: Prepared, compiled: Programs, weights: Weights
) -> dict[str, Any]:
  options = task.sharpness
  assert compiled.measure is not None and options is not None
  rows = _rows(prepared, options.rows)
  found = compiled.measure(
    prepared.variables,
    weights.last if options.at == "last" else weights.best,
    rows,
    jax.random.key(prepared.config.optimisation.seed),
  )
  return _lists(found)


def _drawn(
  task: plan.Run, prepared: Prepared, compiled: Programs, weights: Weights
) -> dict[str, Any]:
  assert compiled.draw is not None and task.landscape is not None
  return _lists(
    compiled.draw(
      prepared.variables,
      weights.last,
      _rows(prepared, task.landscape.rows),
      jax.random.key(prepared.config.optimisation.seed),
    )
  )


def _rows(prepared: Prepared, count: int) -> Any:
  return measure.batches(
    prepared.data, count, prepared.config.optimisation.batch_size
  )


def _lists(found: Any) -> Any:
  return jax.tree.map(
    lambda x: np.asarray(x).astype(float).tolist(), jax.device_get(found)
  )


def _machine() -> str:
  return (
    f"1 of {jax.device_count()} {jax.devices()[0].device_kind} device(s), "
    f"{_cores()} of {os.cpu_count()} CPU cores, {platform.machine()}"
  )


def _cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
