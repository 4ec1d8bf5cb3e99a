"""A run of a study: the steps of `run.loop` without what a study ignores.

No checkpoints, TensorBoard or report of its own: the best weights stay in
memory, a run that is killed starts anew, and all that is kept is a row.
"""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import math
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

from ..data import load as data_lib
from ..data import scores as evaluate
from ..errors import RunError, UsageError
from ..methods import estimators
from ..models import load as models
from ..run import assemble, loop, step
from ..run.assemble import Prepared
from ..run.config import Config
from . import measure, plan, programs
from .programs import Kept, Programs

_POINTS = 48
_BROKEN = 10
_DIGESTED = 8


class Trained(NamedTuple):
  """What came of the steps.

  Attributes:
    best: what is evaluated of the step that did best on the validation rows.
    last: of the last step.
    score: of the best; higher is better.
    best_step: of it.
    validation: at the best and at the last step.
    curves: [step, value] by the name of what is logged.
    times: seconds of each step.
    tokens: in all steps.
  """

  best: Any
  last: Any
  score: float
  best_step: int
  validation: dict[str, dict[str, float]]
  curves: dict[str, list[list[float]]]
  times: list[float]
  tokens: int


def run(task: plan.Run, folder: pathlib.Path, kept: Kept) -> dict[str, Any]:
  """Trains, and tests and measures if the run is a final one.

  Args:
    task: what to run.
    folder: for what the run writes meanwhile; it is gone afterwards.
    kept: compiled functions of earlier runs, to which its own are added.

  Returns:
    The row of the run; its landscape, if one is to be drawn, is in it as
    "landscape".

  Raises:
    UsageError: if the run cannot be carried out as it was put.
  """
  start = time.perf_counter()
  config = dataclasses.replace(task.config, run_dir=str(folder))
  prepared = assemble.prepare(config)
  try:
    found = _outcome(task, prepared, kept)
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  row = {
    "key": task.key,
    "label": task.cell.label,
    "task": task.cell.task,
    "method": config.method,
    "stage": task.stage,
    "seed": config.seed,
    "point": dict(task.point),
    "steps": prepared.steps,
    "gradients_per_step": estimators.gradients(task.config),
    "rows": prepared.data.rows,
    "metric": prepared.data.metric,
    "data": digest(prepared.data),
    **found,
    "config": dataclasses.asdict(task.config),
    "sharpness_options": dataclasses.asdict(task.sharpness)
    if task.sharpness
    else None,
    "seconds": time.perf_counter() - start,
    "machine": _machine(),
    "jax": jax.__version__,
    "date": time.strftime("%Y-%m-%d"),
  }
  return _finite(row)


def steps(config: Config) -> int:
  """The steps of a run, from its data alone.

  Raises:
    UsageError: if the data are not to be had.
  """
  try:
    pretrained = models.open_pretrained(config.model)
    data = assemble.load_data(config, pretrained)
  except (ValueError, RuntimeError) as error:
    raise UsageError(str(error)) from error
  return config.epochs * data.steps_per_epoch


def digest(data: data_lib.Data) -> str:
  """Of the first training batches: what the rows are, and their order."""
  found = hashlib.sha256()
  for _, batch in zip(range(_DIGESTED), data.train_batches()):
    for name in sorted(batch):
      found.update(np.ascontiguousarray(batch[name]).tobytes())
  return found.hexdigest()[:16]


def correct_rows(packed: str, rows: int) -> np.ndarray:
  """Which rows were right, `[rows]` bool, from the text of a row."""
  bits = np.frombuffer(base64.b64decode(packed), np.uint8)
  return np.unpackbits(bits, count=rows).astype(bool)


def _outcome(task: plan.Run, prepared: Prepared, kept: Kept) -> dict[str, Any]:
  compiled = programs.of(prepared, task, kept)
  try:
    trained = _train(prepared, compiled)
  except RunError as error:
    return {"failed": str(error), "score": None}
  # The second half: by then every length has been compiled.
  times = trained.times[len(trained.times) // 2 :]
  found = {
    "failed": None,
    "score": trained.score,
    "best_step": trained.best_step,
    "validation": trained.validation,
    "step_seconds": statistics.median(times),
    "tokens": trained.tokens,
    "curves": trained.curves,
  }
  if task.stage == "final":
    test, correct = _evaluated(prepared, compiled, trained.best, "test")
    found |= {
      "test": _numbers(test) | {"rows": test.rows, "unit": test.unit},
      "correct": correct,
    }
    if compiled.measure is not None:
      start = time.perf_counter()
      found["sharpness"] = _measured(task, prepared, compiled, trained)
      found["sharpness_seconds"] = time.perf_counter() - start
    if compiled.draw is not None:
      found["landscape"] = _drawn(task, prepared, compiled, trained)
  return found


def _train(prepared: Prepared, compiled: Programs) -> Trained:
  config, data, method = prepared.config, prepared.data, prepared.method
  state, _ = loop.initial(prepared, jax.random.key(config.seed))
  numbers = {name: getattr(config, name) for name in compiled.traced}
  every = config.eval_every or data.steps_per_epoch
  width = max(1, prepared.steps // _POINTS)
  best, best_step, score = None, 0, -math.inf
  validation: dict[str, dict[str, float]] = {}
  curves: dict[str, list[list[float]]] = {}
  window: list[step.Metrics] = []
  times, tokens, before = [], 0, None
  for at, batch in enumerate(data.train_batches(), 1):
    if compiled.diagnose is not None and at % config.diagnose_every == 0:
      # Of the auxiliary as this step meets it, on rows that it has not seen.
      own = state.trained["auxiliary"]
      diagnosis = compiled.diagnose(
        prepared.variables,
        state.trained,
        own if before is None else before,
        batch,
      )
      _add(curves, at, jax.tree.map(float, diagnosis._asdict()))
      # A copy, since the next step donates it.
      before = jax.tree.map(jnp.copy, own)
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(
      compiled.step(numbers, prepared.variables, state, batch)
    )
    times.append(time.perf_counter() - start)
    metrics = jax.device_get(metrics)
    tokens += int(metrics.tokens)
    _check_finite(at, metrics, config.on_nonfinite)
    window.append(metrics)
    last = at == prepared.steps
    if last or at % width == 0:
      _add(curves, at, _means(window))
      window = []
    if last or at % every == 0:
      now = method.evaluated(state.trained)
      found, _ = _evaluated(prepared, compiled, now, "validation")
      numbers_now = _numbers(found)
      _add(curves, at, {f"validation_{k}": v for k, v in numbers_now.items()})
      if data.score(found) > score or best is None:
        score, best_step = data.score(found), at
        # A copy, since the next step donates it.
        best = jax.tree.map(jnp.copy, now)
        validation["best"] = numbers_now
      validation["last"] = numbers_now
  return Trained(
    best=best,
    last=method.evaluated(state.trained),
    score=score,
    best_step=best_step,
    validation=validation,
    curves=curves,
    times=times,
    tokens=tokens,
  )


def _check_finite(at: int, metrics: step.Metrics, rule: str) -> None:
  in_a_row = int(metrics.nonfinite)
  if in_a_row >= _BROKEN or (in_a_row and rule == "stop"):
    raise RunError(
      f"the loss or gradient of step {at} is not finite, {in_a_row} in a row"
    )


def _means(window: Sequence[step.Metrics]) -> dict[str, float]:
  """Means over some steps, without what is not finite, or not measured."""
  found = {}
  for name in step.Metrics._fields:
    if name in ("nonfinite", "tokens"):
      continue
    values = [float(getattr(metrics, name)) for metrics in window]
    finite = [value for value in values if math.isfinite(value)]
    if finite:
      found[name] = statistics.fmean(finite)
  if "c_over_rho" not in found:
    found.pop("clip_factor", None)
  return found


def _add(
  curves: dict[str, list[list[float]]], at: int, values: Mapping[str, float]
) -> None:
  for name, value in values.items():
    curves.setdefault(name, []).append([at, float(f"{value:.6g}")])


def _evaluated(
  prepared: Prepared, compiled: Programs, evaluated: Any, split: str
) -> tuple[evaluate.Evaluation, str | None]:
  """A split's evaluation, and which of its rows were right."""
  right = np.zeros(prepared.data.rows[split], bool)

  def predict(batch):
    items = jax.device_get(
      compiled.predict(prepared.variables, evaluated, batch)
    )
    if "index" in batch:
      real = batch["weights"] > 0
      right[batch["index"][real]] = items.right[real] > 0
    return items

  found = prepared.data.evaluate(predict, split)
  if found.unit != "rows":
    return found, None
  return found, base64.b64encode(np.packbits(right).tobytes()).decode()


def _measured(
  task: plan.Run, prepared: Prepared, compiled: Programs, trained: Trained
) -> dict[str, Any]:
  options = task.sharpness
  assert compiled.measure is not None and options is not None
  rows = _rows(prepared, options.rows)
  found = compiled.measure(
    prepared.variables,
    trained.last if options.at == "last" else trained.best,
    rows,
    jax.random.key(prepared.config.seed),
  )
  return _lists(found)


def _drawn(
  task: plan.Run, prepared: Prepared, compiled: Programs, trained: Trained
) -> dict[str, Any]:
  assert compiled.draw is not None and task.landscape is not None
  return _lists(
    compiled.draw(
      prepared.variables,
      trained.last,
      _rows(prepared, task.landscape.rows),
      jax.random.key(prepared.config.seed),
    )
  )


def _rows(prepared: Prepared, count: int) -> Any:
  return measure.batches(prepared.data, count, prepared.config.batch_size)


def _lists(found: Any) -> Any:
  return jax.tree.map(
    lambda x: np.asarray(x).astype(float).tolist(), jax.device_get(found)
  )


def _numbers(found: evaluate.Evaluation) -> dict[str, float]:
  return {**found.metrics, "loss": found.loss}


def _finite(value: Any) -> Any:
  """JSON has no NaN and no infinity: None."""
  match value:
    case float():
      return value if math.isfinite(value) else None
    case dict():
      return {key: _finite(x) for key, x in value.items()}
    case list() | tuple():
      return [_finite(x) for x in value]
  return value


def _machine() -> str:
  return (
    f"1 of {jax.device_count()} {jax.devices()[0].device_kind} device(s), "
    f"{_cores()} of {os.cpu_count()} CPU cores, {platform.machine()}"
  )


def _cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
