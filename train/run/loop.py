"""A run: training, validation, checkpoints, the test at the end."""

from collections.abc import Callable, Sequence
import functools
import math
import os
import platform
import resource
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

import bilora_jax

from ..data import load as data_lib
from ..data import scores as evaluate
from ..devices import processes
from ..errors import RunError
from ..methods import method as methods
from . import assemble, diagnostics, kept, report, step, watch
from . import checkpoints as checkpoints_lib
from . import config as config_lib
from . import journal as journal_lib
from .assemble import Prepared
from .config import Config

_NONFINITE_IN_A_ROW = 10


def run(config: Config, command: Sequence[str]) -> dict[str, Any] | None:
  """Trains, tests and reports; resumes what an earlier call began.

  Args:
    config: of the run.
    command: that started it, for the report.

  Returns:
    The results, as in the run's `results.json`; None if the run was
    interrupted and its state saved.

  Raises:
    UsageError: if the request cannot be carried out as it was put.
    RunError: if the run cannot go on.
  """
  prepared = assemble.prepare(config)
  done = report.results(prepared.folder)
  if done is None:
    with processes.lost_ones_reported():
      done = _train(prepared, command)
  if done is not None and processes.is_first():
    report.write(prepared.folder)
    print(report.summary(done, prepared.folder))
  return done


def _train(prepared: Prepared, command: Sequence[str]) -> dict[str, Any] | None:
  config, method, layout = prepared.config, prepared.method, prepared.layout
  data = prepared.data
  state, shardings = initial(prepared, jax.random.key(config.optimisation.seed))
  batches = data.train_batches(layout.part())
  checkpoints = checkpoints_lib.Checkpoints(prepared.folder / "checkpoints")
  best: dict[str, Any] = {"score": -math.inf, "step": 0}
  resumed = checkpoints.resume(state)
  if resumed is not None:
    state = resumed.state
    batches.set_state(resumed.loop["iterator"])
    best = resumed.loop["best"]
  at = int(state.step)
  journal = journal_lib.Silence()
  if processes.is_first():
    journal = journal_lib.Journal(prepared.folder, at, prepared.steps)
  for note in data.notes:
    journal.say(note)
  journal.say(_opening(prepared, state.trained))
  if resumed is not None:
    journal.say(f"resumed after step {at}")

  train_step = layout.within(
    step.make_train_step(
      method,
      data.objective,
      shardings and (shardings, layout.replicated),
      config.optimisation.accumulate,
    )
  )
  predict = _predictor(prepared)
  diagnose = _diagnoser(prepared) if config.output.diagnose_every else None
  if config.evaluation.eval_first and not at:
    _validate(prepared, predict, journal, state, at)
  window = watch.Window(at)
  profile = watch.Profile(
    prepared.folder / "profile",
    at + config.output.log_every,
    config.output.profile,
  )
  try:
    with watch.Interruption() as interruption:
      while at < prepared.steps:
        profile.before(at)
        batch = next(batches)
        if (
          diagnose is not None and (at + 1) % config.output.diagnose_every == 0
        ):
          # Of the auxiliary as this step meets it, on rows it has not seen.
          journal.log(at + 1, **diagnose(state.trained, batch))
          window.spoil()
        state, metrics = train_step(
          prepared.variables, state, layout.rows(batch)
        )
        at += 1
        journal.advance(at)
        window.add(metrics)
        if profile.after(at, metrics):
          window.spoil()
        last = at == prepared.steps
        # Read once: the signal may come at any moment of the step.
        logs = last or at % config.output.log_every == 0
        interrupted = _interrupted(interruption, logs)
        saves = last or interrupted or at % config.output.checkpoint_every == 0
        if logs or saves:
          # Before the save: a run that stops here must not resume beyond.
          _check_finite(config, at, window.fresh(), journal)
        if logs:
          rows, times = window.close(at)
          journal.log(at, **_means(method, rows), **times)
        if last or at % _eval_every(prepared) == 0:
          found = _validate(prepared, predict, journal, state, at)
          score = data.score(found)
          if score > best["score"]:
            best = {"score": score, "step": at}
            best["value"] = found.metrics[data.metric]
            checkpoints.save_best(at, method.evaluated(state.trained))
          window.spoil()
        if saves:
          checkpoints.save_last(
            at, state, {"iterator": batches.get_state(), "best": best}
          )
        if interrupted and not last:
          checkpoints.wait()
          journal.say(
            f"interrupted after step {at}, which is saved; the same command "
            "resumes there."
          )
          return None
    checkpoints.wait()
    evaluated = checkpoints.best(best["step"], method.evaluated(state.trained))
    return _finish(prepared, command, evaluated, best, predict, journal)
  finally:
    profile.close()
    journal.close()
    checkpoints.close()


def initial(
  prepared: Prepared, key: jax.Array
) -> tuple[step.TrainState, step.TrainState | None]:
  """The state before the first step, and its shardings if there is a mesh."""
  init = functools.partial(step.init, prepared.method)
  variables = prepared.variables
  shardings = prepared.layout.state_shardings(
    prepared.method,
    prepared.axes,
    prepared.shapes,
    jax.eval_shape(init, key, variables),
  )
  if shardings is None:
    return init(key, variables), None
  # Each device makes its own shards.
  return jax.jit(init, out_shardings=shardings)(key, variables), shardings


def _validate(
  prepared: Prepared,
  predict: Callable[[Any, str], evaluate.Evaluation],
  journal: journal_lib.Journal | journal_lib.Silence,
  state: step.TrainState,
  at: int,
) -> evaluate.Evaluation:
  found = predict(prepared.method.evaluated(state.trained), "validation")
  journal.log(
    at,
    validation_loss=found.loss,
    **{f"validation_{k}": v for k, v in found.metrics.items()},
  )
  return found


def _interrupted(interruption: watch.Interruption, logs: bool) -> bool:
  """Whether to stop after this step, the same in all processes."""
  if jax.process_count() == 1:
    return interruption.asked
  # A question to the others waits for the step; so does a line of metrics.
  return logs and processes.any_of(interruption.asked)


def _finish(
  prepared: Prepared,
  command: Sequence[str],
  evaluated: Any,
  best: dict[str, Any],
  predict: Callable[[Any, str], evaluate.Evaluation],
  journal: journal_lib.Journal | journal_lib.Silence,
) -> dict[str, Any]:
  config, data, layout = prepared.config, prepared.data, prepared.layout
  journal.say(f"testing the best, of step {best['step']}")
  test = predict(evaluated, "test")
  whole = layout.gather(evaluated)
  if processes.is_first():
    kept.save(prepared.folder, *prepared.saved(whole))
  baseline = None
  labelled = isinstance(data, data_lib.Labelled)
  if config.evaluation.baseline and labelled and not config.model.quantised:
    journal.say("fitting a logistic regression on the frozen features")
    features = layout.within(
      jax.jit(
        functools.partial(prepared.model.apply, method="features"),
        out_shardings=layout.replicated,
      )
    )
    pretrained = prepared.pretrained()
    baseline = data.baseline(
      lambda batch: features(
        pretrained, *data.objective.inputs(layout.all_rows(batch))
      )
    )
  windows = [
    row for row in journal_lib.read(prepared.folder) if "step_seconds" in row
  ]
  results = {
    "command": list(command),
    "config": config_lib.flat(config),
    "metric": data.metric,
    "best_step": best["step"],
    "validation": best["value"],
    "test": test.to_json(),
    "baseline": baseline.to_json() if baseline else None,
    "trained_parameters": _count(evaluated),
    "base_parameters": _count(prepared.shapes),
    "steps": prepared.steps,
    "median_step_seconds": _median(windows, "step_seconds"),
    "median_tokens_per_second": _median(windows, "tokens_per_second"),
    "peak_host_memory_gib": _peak_memory_gib(),
    "machine": _machine(),
    "date": time.strftime("%Y-%m-%d"),
  }
  if processes.is_first():
    journal_lib.write_json(prepared.folder / report.RESULTS, results)
  return results


def _predictor(
  prepared: Prepared,
) -> Callable[[Any, str], evaluate.Evaluation]:
  layout = prepared.layout
  eval_step = layout.within(
    step.make_eval_step(
      prepared.method, prepared.data.objective, layout.replicated
    )
  )

  def predict(evaluated: Any, split: str) -> evaluate.Evaluation:
    return prepared.data.evaluate(
      lambda batch: eval_step(
        prepared.variables, evaluated, layout.all_rows(batch)
      ),
      split,
    )

  return predict


def _diagnoser(
  prepared: Prepared,
) -> Callable[[Any, Any], dict[str, float]]:
  """From what is trained, and a batch, to scalars; it remembers the last."""
  layout = prepared.layout
  diagnose = layout.within(
    diagnostics.make(prepared.method, prepared.data.objective)
  )
  before = None

  def diagnosis(trained: Any, batch: Any) -> dict[str, float]:
    nonlocal before
    own = trained["auxiliary"]
    found = diagnose(
      prepared.variables,
      trained,
      own if before is None else before,
      layout.rows(batch),
    )
    # A copy, since the next step donates it.
    before = jax.tree.map(jnp.copy, own)
    return {name: float(x) for name, x in found._asdict().items()}

  return diagnosis


def _check_finite(
  config: Config,
  at: int,
  rows: Sequence[step.Metrics],
  journal: journal_lib.Journal | journal_lib.Silence,
) -> None:
  """Reports steps that were skipped, and ends a run that skips on."""
  for number, row in enumerate(rows, at - len(rows) + 1):
    in_a_row = int(row.nonfinite)
    if not in_a_row:
      continue
    sentence = (
      f"the loss or gradient of step {number} is not finite (loss "
      f"{float(row.loss):.4g}), {in_a_row} in a row"
    )
    if (
      config.optimisation.on_nonfinite == "stop"
      or in_a_row >= _NONFINITE_IN_A_ROW
    ):
      raise RunError(
        sentence + "; the run stops, and its last checkpoint is whole. A "
        "smaller --learning-rate or --dtype float32 may help."
      )
    journal.say(sentence + "; skipped.")


def _eval_every(prepared: Prepared) -> int:
  return prepared.config.evaluation.eval_every or prepared.data.steps_per_epoch


def _means(
  method: methods.Method, rows: Sequence[step.Metrics]
) -> dict[str, float | None]:
  """Means over the steps, without those that were not finite."""
  names = ["loss", "accuracy"]
  if method.rho is not None:
    names += ["c_over_rho", "clip_factor"]
  found = {}
  for name in names:
    values = (float(getattr(row, name)) for row in rows)
    finite = [value for value in values if math.isfinite(value)]
    found[name] = statistics.fmean(finite) if finite else None
  return found


def _opening(prepared: Prepared, trained: Any) -> str:
  config = prepared.config
  parts = (
    bilora_jax.count_parameters(trained)
    if prepared.method.adapted is not None
    else {"all": _count(trained)}
  )
  counts = ", ".join(f"{name} {count:,}" for name, count in parts.items())
  left_out = prepared.data.left_out
  return (
    f"{config.method.name} on {config.data.task}: rows {prepared.data.rows}"
    + (f", left out as too long {left_out}" if left_out else "")
    + f"; trained parameters: {counts}; base {_count(prepared.shapes):,}; "
    f"{prepared.steps} steps"
  )


def _median(rows: Sequence[dict[str, Any]], name: str) -> float | None:
  return statistics.median([row[name] for row in rows]) if rows else None


def _count(tree: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _peak_memory_gib() -> float:
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Linux counts in KiB, macOS in bytes.
  return peak / (2**30 if platform.system() == "Darwin" else 2**20)


def _machine() -> str:
  device = jax.devices()[0]
  return (
    f"{jax.device_count()} {device.device_kind} device(s), "
    f"{os.cpu_count()} CPU cores, {platform.machine()}, "
    f"Python {platform.python_version()}, jax {jax.__version__}"
  )
