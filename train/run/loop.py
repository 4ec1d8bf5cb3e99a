"""The training loop of runs and studies, and a run from start to end."""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import os
import platform
import resource
import statistics
import time
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilora_jax

from .. import files
from ..data import batching
from ..data import load as data_lib
from ..data import scores as evaluate
from ..devices import processes
from ..errors import RunError
from . import (
  after,
  assemble,
  claim,
  diagnostics,
  kept,
  monitor,
  report,
  samples,
  state_shardings,
  step,
)
from . import checkpoints as checkpoints_lib
from . import config as config_lib
from . import journal as journal_lib
from .assemble import Prepared
from .config import Config
from .loggers import jsonl
from .loggers.logger import Opened

_NONFINITE_IN_A_ROW = 10
_MAY_HELP = "A smaller --learning-rate or --dtype float32 may help."
# float32's fraction has 24 bits. If a larger number is added to a weight of
# about 1, the weight is lost.
_DROWNS = 2.0**24

Predict = Callable[[Any, str], evaluate.Evaluation]
"""From evaluated weights and the name of a split to their evaluation."""


class NonfiniteError(RunError):
  """Too many steps in a row were not finite.

  Attributes:
    step: the last of these steps.
    in_a_row: the number of these steps.
  """

  def __init__(self, sentence: str, step: int, in_a_row: int):
    super().__init__(sentence)
    self.step, self.in_a_row = step, in_a_row


class NothingLearnedError(RunError):
  """A run has ended without useful weights."""


class Programs(NamedTuple):
  """The compiled functions of a run.

  Attributes:
    step: from `(variables, state, batch)` to the next state and metrics.
    predict: evaluates a split.
    diagnose: from `(trained, batch)` to scalars, if the configuration asks for
      it.
    sample: shows generated answers for `(step, evaluated)`, if the
      configuration asks for it.
  """

  step: Callable[..., tuple[step.TrainState, step.Metrics]]
  predict: Predict
  diagnose: Callable[[Any, Any], dict[str, float]] | None = None
  sample: Callable[[int, Any], None] | None = None


class Kept(Protocol):
  """The place for weights: `checkpoints.Checkpoints`, or memory."""

  def save_best(self, step: int, evaluated: Any) -> None:
    """Keeps the weights with the best validation score so far."""
    ...

  def save_last(
    self, step: int, state: step.TrainState, loop: Mapping[str, Any]
  ) -> None:
    """Keeps the state that a resumed run needs."""
    ...


class Sinks(NamedTuple):
  """Where the results of steps go.

  Attributes:
    journal: gets numbers and sentences.
    kept: gets weights.
    log_every: the steps between lines of metrics.
    interrupted: from whether a step is logged to whether to stop after it.
  """

  journal: journal_lib.Journal
  kept: Kept
  log_every: int
  interrupted: Callable[[bool], bool] = lambda logs: False


class Trained(NamedTuple):
  """The results of training.

  Attributes:
    state: the state after the last step.
    best: the `step` with the best validation score, its `score`, the `value` of
      the metric, and all `numbers`.
    last: the numbers of the last validation of this call.
    ended: whether the run is finished; if not, it was interrupted.
    stopped_at: the step of an early stop, after `--patience` validations
      without a better score; else None.
  """

  state: step.TrainState
  best: dict[str, Any]
  last: dict[str, float]
  ended: bool
  stopped_at: int | None


def train(
  prepared: Prepared,
  programs: Programs,
  sinks: Sinks,
  state: step.TrainState,
  loop: Mapping[str, Any] | None = None,
) -> Trained:
  """Runs the remaining steps of a run.

  Args:
    prepared: the prepared run.
    programs: the compiled functions.
    sinks: where the results of steps go.
    state: the state before these steps.
    loop: the argument `loop` of the last `Kept.save_last`; None: a new run.

  Raises:
    RunError: if the run cannot continue, or has no useful result.
  """
  config, data, method = prepared.config, prepared.data, prepared.method
  journal, layout = sinks.journal, prepared.layout
  validates_every = config.evaluation.eval_every or data.steps_per_epoch
  patience = config.evaluation.patience or math.inf
  loop = loop or {"best": {"score": None, "step": 0}}
  best, waited = loop["best"], loop.get("waited", 0)
  batches = batching.Visited(
    data.train_batches(layout.part()), config.method.spec.visits
  )
  at, last = int(state.step), {}
  if "iterator" in loop and at < prepared.steps:
    batches.set_state(loop["iterator"])

  def validate() -> evaluate.Evaluation:
    evaluated = method.evaluated(state.trained)
    found = programs.predict(evaluated, "validation")
    numbers = {"loss": found.loss, **found.metrics}
    journal.log(at, **{f"validation_{k}": v for k, v in numbers.items()})
    if programs.sample is not None:
      programs.sample(at, evaluated)
    return found

  if config.evaluation.eval_first and not at:
    validate()
  window = monitor.Window(at)
  profile = monitor.Profile(
    prepared.folder / "profile", at + sinks.log_every, config.output.profile
  )
  interrupted = False
  try:
    while at < prepared.steps and waited < patience and not interrupted:
      profile.before(at)
      batch = next(batches)
      if programs.diagnose and (at + 1) % config.output.diagnose_every == 0:
        # The auxiliary is the one of this step, and has not seen these rows.
        journal.log(at + 1, **programs.diagnose(state.trained, batch))
        window.discard_time()
      state, metrics = programs.step(
        prepared.variables, state, layout.rows(batch)
      )
      at += 1
      journal.advance(at)
      window.add(metrics)
      if profile.after(at, metrics):
        window.discard_time()
      ends = at == prepared.steps
      # Asked only once a step, because the signal may come at any moment.
      logs = ends or at % sinks.log_every == 0
      interrupted = sinks.interrupted(logs)
      validates = ends or at % validates_every == 0
      saves = ends or interrupted or at % config.output.checkpoint_every == 0
      if logs or saves or (validates and patience < math.inf):
        # Before the save, so that a run that fails here cannot resume after
        # the failure.
        _check_finite(config, at, window.fresh(), journal)
      if logs:
        rows, times = window.close(at)
        journal.log(at, **_means(rows), **times)
      if validates:
        found = validate()
        last = {**found.metrics, "loss": found.loss}
        # Without finite logits, the prediction is always the first label, so
        # the accuracy means nothing.
        score = data.score(found) if math.isfinite(found.loss) else math.nan
        known = -math.inf if best["score"] is None else best["score"]
        waited += 1
        if score > known or not best["step"]:
          waited = 0
          best = {
            "score": score if math.isfinite(score) else None,
            "step": at,
            "value": found.metrics[data.metric],
            "numbers": last,
          }
          sinks.kept.save_best(at, method.evaluated(state.trained))
        window.discard_time()
      if saves or waited >= patience:
        sinks.kept.save_last(
          at,
          state,
          {"iterator": batches.get_state(), "best": best, "waited": waited},
        )
  finally:
    profile.close()
  # With --accept-changes, a run may have taken more steps than it now has.
  ended = at >= prepared.steps or waited >= patience
  if ended:
    _require_learned(state, best)
  stopped_at = at if at < prepared.steps and ended else None
  return Trained(state, best, last, ended, stopped_at)


def run(config: Config, command: Sequence[str]) -> dict[str, Any] | None:
  """Trains, tests and reports; resumes a run that an earlier call began.

  Args:
    config: the configuration of the run.
    command: the command line, for the report.

  Returns:
    The results, as in the run's `results.json`; None if the run was interrupted
    and its state saved.

  Raises:
    UsageError: if the options cannot be carried out.
    RunError: if the run cannot continue.
  """
  config_lib.check(config)
  with claim.claimed(config) as folder:
    done = report.results(folder)
    if done is not None:
      if processes.is_first():
        print(
          f"{folder} was finished on {done['date']}; nothing is left to do."
        )
    else:
      prepared = assemble.prepare(config)
      with processes.lost_ones_reported():
        done = _run(prepared, command)
    if done is not None and processes.is_first():
      report.write(folder)
      print(report.summary(done, folder))
    return done


def _run(prepared: Prepared, command: Sequence[str]) -> dict[str, Any] | None:
  config, method, layout = prepared.config, prepared.method, prepared.layout
  state, shardings = initial(prepared, jax.random.key(config.optimisation.seed))
  checkpoints = checkpoints_lib.Checkpoints(
    prepared.folder / checkpoints_lib.FOLDER, prepared.fingerprint
  )
  journal = journal_lib.Journal()
  try:
    resumed = checkpoints.resume(state, method.evaluated)
    loop = None
    if resumed is not None:
      state, loop = resumed.state, resumed.loop
    at = int(state.step)
    if processes.is_first():
      kept.begin(
        prepared.folder, config, prepared.data.task, prepared.fingerprint
      )
    journal = journal_lib.make(
      Opened(prepared.folder, at, prepared.steps, config_lib.flat(config)),
      config.output.loggers,
    )
    for note in (*prepared.opened.notes, *prepared.data.notes):
      journal.say(note)
    journal.say(_opening(prepared, state.trained))
    if resumed is not None:
      for note in filter(None, (*resumed.damaged, prepared.changed)):
        journal.say(note)
      journal.say(f"resumed after step {at}")
    train_step = layout.within(
      step.make_train_step(
        method,
        prepared.training_objective,
        shardings and (shardings, layout.replicated),
        config.optimisation.accumulate,
      )
    )
    predict = predictor(prepared)
    programs = Programs(
      step=train_step,
      predict=predict,
      diagnose=diagnoser(
        prepared,
        layout.within(diagnostics.make(method, prepared.data.objective)),
      )
      if config.output.diagnose_every
      else None,
      sample=samples.sampler(prepared, journal, at)
      if config.evaluation.samples
      else None,
    )
    with monitor.Interruption() as interruption:
      sinks = Sinks(
        journal,
        checkpoints,
        config.output.log_every,
        functools.partial(_interrupted, interruption),
      )
      trained = train(prepared, programs, sinks, state, loop)
      checkpoints.wait()
    at, best = int(trained.state.step), trained.best
    if not trained.ended:
      journal.say(
        f"interrupted after step {at}, which is saved; the same command "
        "resumes there."
      )
      return None
    if trained.stopped_at is not None:
      journal.say(
        f"stopped after step {at} of {prepared.steps}: "
        f"{config.evaluation.patience} validations were no better than that of "
        f"step {best['step']}"
      )
    evaluated = checkpoints.best(
      best["step"], method.evaluated(trained.state.trained)
    )
    return _finish(prepared, command, evaluated, trained, predict, journal)
  finally:
    journal.close()
    checkpoints.close()


def initial(
  prepared: Prepared, key: jax.Array
) -> tuple[step.TrainState, step.TrainState | None]:
  """Returns the first state, and its shardings if there is a mesh."""
  init = functools.partial(step.init, prepared.method)
  variables = prepared.variables
  shardings = state_shardings.of(
    prepared.layout,
    prepared.method,
    prepared.axes,
    prepared.shapes,
    jax.eval_shape(init, key, variables),
  )
  if shardings is None:
    return init(key, variables), None
  # With `out_shardings`, each device makes only its own shards.
  return jax.jit(init, out_shardings=shardings)(key, variables), shardings


def _interrupted(interruption: monitor.Interruption, logs: bool) -> bool:
  """Whether to stop after this step, the same in all processes."""
  if jax.process_count() == 1:
    return interruption.asked
  # To ask the other processes is to wait for the step. A line of metrics waits
  # anyway, so they are asked only then.
  return logs and processes.any_of(interruption.asked)


def _finish(
  prepared: Prepared,
  command: Sequence[str],
  evaluated: Any,
  trained: Trained,
  predict: Predict,
  journal: journal_lib.Journal,
) -> dict[str, Any]:
  config, data, layout = prepared.config, prepared.data, prepared.layout
  method, best = prepared.method, trained.best
  whole = layout.gather(evaluated)
  require_useful(whole)
  journal.say(f"testing the best weights, of step {best['step']}")
  test = predict(evaluated, "test")
  if processes.is_first():
    kept.save(prepared.folder, *prepared.saved(whole))
  baseline = None
  labelled = isinstance(data, data_lib.Labelled)
  if config.evaluation.baseline and labelled and not config.model.quantised:
    journal.say("fitting a logistic regression on the frozen features")
    features = layout.within(
      step.make_features(prepared.model, layout.replicated)
    )
    pretrained = prepared.pretrained()
    baseline = data.baseline(
      lambda batch: features(
        pretrained, *data.objective.inputs(layout.all_rows(batch))
      )
    )
  more = {}
  if config.evaluation.after:
    assert isinstance(data, data_lib.Labelled)
    journal.say(f"testing more: {config.evaluation.after}")
    last = method.evaluated(trained.state.trained)
    more["after"] = after.evaluations(
      prepared, whole, last, after.make(prepared), data.shifted
    )
  windows = [
    row for row in jsonl.read(prepared.folder) if "step_seconds" in row
  ]
  results = {
    "command": list(command),
    "config": config_lib.flat(config),
    "metric": data.metric,
    "best_step": best["step"],
    "validation": best["value"],
    "test": test.to_json(),
    "baseline": baseline.to_json() if baseline else None,
    **more,
    "trained_parameters": _count(evaluated),
    "base_parameters": _count(prepared.shapes),
    "steps": prepared.steps,
    "stopped_at": trained.stopped_at,
    "median_step_seconds": _median(windows, "step_seconds"),
    "median_tokens_per_second": _median(windows, "tokens_per_second"),
    "peak_host_memory_gib": _peak_memory_gib(),
    "machine": _machine(),
    "date": time.strftime("%Y-%m-%d"),
  }
  if processes.is_first():
    files.write_json(prepared.folder / report.RESULTS, results)
  return results


def predictor(
  prepared: Prepared,
  eval_step: Callable[[Any, Any, Any], Any] | None = None,
  look: Callable[[Any, Any], None] = lambda batch, items: None,
) -> Predict:
  """Returns a function that evaluates splits.

  Args:
    prepared: the prepared run.
    eval_step: from `step.make_eval_step`; None: it is made here.
    look: is called with each batch and its items.
  """
  layout = prepared.layout
  if eval_step is None:
    eval_step = layout.within(
      step.make_eval_step(
        prepared.method, prepared.data.objective, layout.replicated
      )
    )

  def predict(evaluated: Any, split: str) -> evaluate.Evaluation:
    def items_of(batch):
      items = jax.device_get(
        eval_step(prepared.variables, evaluated, layout.all_rows(batch))
      )
      look(batch, items)
      return items

    return prepared.data.evaluate(items_of, split)

  return predict


def diagnoser(
  prepared: Prepared, diagnose: Callable[..., diagnostics.Diagnosis]
) -> Callable[[Any, Any], dict[str, float]]:
  """Returns a function from trained arrays and a batch to scalars.

  The function keeps the auxiliary of its last call.

  Args:
    prepared: the prepared run.
    diagnose: from `diagnostics.make`.
  """
  before = None

  def diagnosis(trained: Any, batch: Any) -> dict[str, float]:
    nonlocal before
    own = trained["auxiliary"]
    found = diagnose(
      prepared.variables,
      trained,
      own if before is None else before,
      prepared.layout.rows(batch),
    )
    # A copy, because the next step donates these arrays.
    before = jax.tree.map(jnp.copy, own)
    return {name: float(x) for name, x in found._asdict().items()}

  return diagnosis


def _check_finite(
  config: Config,
  at: int,
  rows: Sequence[step.Metrics],
  journal: journal_lib.Journal,
) -> None:
  """Reports steps that were skipped, and ends a run that skips too many."""
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
      raise NonfiniteError(
        f"{sentence}; the run stops, and its last checkpoint is whole. "
        f"{_MAY_HELP}",
        number,
        in_a_row,
      )
    journal.say(sentence + "; skipped.")


def _require_learned(state: step.TrainState, best: Mapping[str, Any]) -> None:
  """Refuses a run that took no step, or was never finite."""
  at = int(state.step)
  if int(optax.tree.get(state.opt_state, "total_notfinite")) >= at:
    raise NothingLearnedError(
      f"nothing was learned: the loss or gradient of all {at} steps was not "
      f"finite, so the weights never changed. {_MAY_HELP}"
    )
  if not best.get("step", at):
    # With --accept-changes, a run may have taken more steps than it now has.
    raise NothingLearnedError(
      f"the run has no steps left after step {at}, and was never validated; "
      "give another --run-dir."
    )
  # Runs of older versions have no numbers.
  loss = best.get("numbers", {}).get("loss", 0.0)
  if loss is None or not math.isfinite(loss):
    raise NothingLearnedError(
      "nothing was learned: the loss of the validation rows was never finite. "
      f"{_MAY_HELP}"
    )


def require_useful(evaluated: Any) -> None:
  """Refuses weights that are not finite, or too large.

  If a weight is too large, float32 loses the weight that it is added to.

  Raises:
    NothingLearnedError: if there is such a weight.
  """
  found = [
    float(np.max(np.abs(x), initial=0))
    for x in jax.tree.leaves(jax.device_get(evaluated))
  ]
  largest = max(found, key=lambda x: math.inf if math.isnan(x) else x)
  if not largest < _DROWNS:
    raise NothingLearnedError(
      "nothing of use was learned: the largest weight that was trained is "
      f"{largest:.4g}, and one of {_DROWNS:.3g} or more is so large that "
      f"float32 loses what it is added to. {_MAY_HELP}"
    )


def _means(rows: Sequence[step.Metrics]) -> dict[str, float]:
  """Returns means over steps, without values that are not finite."""
  found = {}
  for name in step.Metrics._fields:
    if name in ("nonfinite", "tokens"):
      continue
    values = (float(getattr(row, name)) for row in rows)
    finite = [value for value in values if math.isfinite(value)]
    if finite:
      found[name] = statistics.fmean(finite)
  if "c_over_rho" not in found:
    found.pop("clip_factor", None)
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
    + (f", {left_out} left out because they are too long" if left_out else "")
    + f"; trained parameters: {counts}; parameters of the base: "
    f"{_count(prepared.shapes):,}; {prepared.steps} steps"
  )


def _median(rows: Sequence[dict[str, Any]], name: str) -> float | None:
  known = [row[name] for row in rows if row.get(name) is not None]
  return statistics.median(known) if known else None


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
