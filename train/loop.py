"""A run from its configuration to its report."""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import platform
import resource
import signal
import statistics
import time
from typing import Any

import jax

import bilora_jax
from train import checkpoints as checkpoints_lib
from train import config as config_lib
from train import evaluate, methods, report, step, tasks
from train import journal as journal_lib
from train.config import Config
from train.errors import RunError, UsageError
from train.models import load as models
from train.models import tokenizer as tokenizers
from train.tasks import pipeline

_NONFINITE_IN_A_ROW = 10


@dataclasses.dataclass(frozen=True)
class Prepared:
  """All that a run needs before its first step."""

  config: Config
  folder: pathlib.Path
  task: tasks.Task
  examples: dict[str, pipeline.Examples]
  pad_id: int
  model: Any
  variables: Any
  method: methods.Method
  steps_per_epoch: int

  @property
  def steps(self) -> int:
    return self.config.epochs * self.steps_per_epoch


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
  prepared = prepare(config)
  done = report.results(prepared.folder)
  if done is None:
    done = _train(prepared, command)
  if done is not None:
    report.write(prepared.folder)
    print(report.summary(done, prepared.folder))
  return done


def prepare(config: Config) -> Prepared:
  """Checks a configuration, and loads data, weights and method.

  Raises:
    UsageError: if any of them is not to be had, or the run's folder holds
      another run.
  """
  config_lib.check(config)
  if config.compilation_cache:
    _use_compilation_cache()
  folder = config.folder()
  _claim(folder, config)
  try:
    task = tasks.get(config.task)
    dtype = None if config.dtype == "float32" else config.dtype
    model, variables, tokenizer = models.load_bert(
      config.model, len(task.labels), config.seed, dtype
    )
    encode = functools.partial(tokenizers.encode, tokenizer)
    examples = {}
    for split in ("train", "validation", "test"):
      limit = config.train_rows if split == "train" else 0
      rows = pipeline.load(
        task, split, config.data_dir or None, limit or None, config.seed
      )
      examples[split] = pipeline.tokenize(rows, encode, config.max_length)
    pad_id = tokenizers.pad_id(tokenizer)
    steps_per_epoch = len(examples["train"]) // config.batch_size
    example = next(
      pipeline.train_batches(
        examples["train"], config.batch_size, config.seed, pad_id=pad_id
      )
    )
    method = methods.build(
      config,
      model,
      step.inputs(example),
      config.epochs * steps_per_epoch,
    )
  except (ValueError, RuntimeError) as error:
    with contextlib.suppress(OSError):
      folder.rmdir()  # if it was made for this run, and is empty
    raise UsageError(str(error)) from error
  journal_lib.write_atomically(
    folder / "config.json", config_lib.to_json(config)
  )
  return Prepared(
    config=config,
    folder=folder,
    task=task,
    examples=examples,
    pad_id=pad_id,
    model=model,
    variables=jax.device_put(variables),
    method=method,
    steps_per_epoch=steps_per_epoch,
  )


def _train(prepared: Prepared, command: Sequence[str]) -> dict[str, Any] | None:
  config, method = prepared.config, prepared.method
  init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
  state = step.init(method, init_key, prepared.variables)
  batches = pipeline.train_batches(
    prepared.examples["train"],
    config.batch_size,
    config.seed,
    config.epochs,
    jax.process_index(),
    jax.process_count(),
    pad_id=prepared.pad_id,
    group_by_length=config.group_by_length,
  )
  checkpoints = checkpoints_lib.Checkpoints(prepared.folder / "checkpoints")
  best: dict[str, Any] = {"metric": -math.inf, "step": 0}
  resumed = checkpoints.resume(state)
  if resumed is not None:
    state = resumed.state
    batches.set_state(resumed.loop["iterator"])
    best = resumed.loop["best"]
  at = int(state.step)
  journal = journal_lib.Journal(prepared.folder, at, prepared.steps)
  journal.say(_opening(prepared, state.trained))
  if resumed is not None:
    journal.say(f"resumed after step {at}")

  train_step = step.make_train_step(method, dropout_key)
  predict = _predictor(prepared)
  window = _Window(at)
  try:
    with _Interruption() as interruption:
      while at < prepared.steps:
        batch = next(batches)
        state, metrics = train_step(prepared.variables, state, batch)
        at += 1
        journal.advance(at)
        window.add(metrics)
        last = at == prepared.steps
        # Read once: the signal may come at any moment of the step.
        interrupted = interruption.asked
        logs = last or at % config.log_every == 0
        saves = last or interrupted or at % config.checkpoint_every == 0
        if logs or saves:
          # Before the save: a run that stops here must not resume beyond.
          _check_finite(config, at, window.fresh(), journal)
        if logs:
          rows, times = window.close(at)
          journal.log(at, **_means(method, rows), **times)
        if last or at % _eval_every(prepared) == 0:
          found = predict(method.evaluated(state.trained), "validation")
          metric = found.metrics[prepared.task.metrics[0]]
          journal.log(
            at,
            validation_loss=found.loss,
            **{f"validation_{k}": v for k, v in found.metrics.items()},
          )
          if metric > best["metric"]:
            best = {"metric": metric, "step": at}
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
    journal.close()
    checkpoints.close()


def _finish(
  prepared: Prepared,
  command: Sequence[str],
  evaluated: Any,
  best: dict[str, Any],
  predict: Callable[[Any, str], evaluate.Evaluation],
  journal: journal_lib.Journal,
) -> dict[str, Any]:
  config, task = prepared.config, prepared.task
  journal.say(f"testing the best, of step {best['step']}")
  test = predict(evaluated, "test")
  if prepared.method.adapted is not None:
    bilora_jax.save_adapters(
      prepared.folder / "adapters", prepared.method.adapted, evaluated
    )
  baseline = None
  if config.baseline:
    journal.say("fitting a logistic regression on the frozen features")

    features = jax.jit(
      functools.partial(prepared.model.apply, method="features")
    )
    baseline = evaluate.logistic_regression(
      lambda batch: features(prepared.variables, *step.inputs(batch)),
      prepared.examples["train"],
      prepared.examples["validation"],
      prepared.examples["test"],
      config.batch_size,
      task.metrics,
      prepared.pad_id,
    )
  windows = [
    row for row in journal_lib.read(prepared.folder) if "step_seconds" in row
  ]
  results = {
    "command": list(command),
    "config": dataclasses.asdict(config),
    "metric": task.metrics[0],
    "best_step": best["step"],
    "validation": best["metric"],
    "test": _results(test),
    "baseline": _results(baseline) if baseline else None,
    "trained_parameters": _count(evaluated),
    "base_parameters": _count(prepared.variables),
    "steps": prepared.steps,
    "median_step_seconds": _median(windows, "step_seconds"),
    "median_tokens_per_second": _median(windows, "tokens_per_second"),
    "peak_host_memory_gib": _peak_memory_gib(),
    "machine": _machine(),
    "date": time.strftime("%Y-%m-%d"),
  }
  journal_lib.write_json(prepared.folder / report.RESULTS, results)
  return results


def _predictor(
  prepared: Prepared,
) -> Callable[[Any, str], evaluate.Evaluation]:
  eval_step = step.make_eval_step(prepared.method)

  def predict(evaluated: Any, split: str) -> evaluate.Evaluation:
    return evaluate.evaluate(
      lambda batch: eval_step(prepared.variables, evaluated, batch),
      prepared.examples[split],
      prepared.config.batch_size,
      prepared.task.metrics,
      prepared.pad_id,
    )

  return predict


class _Window:
  """The steps since the last line of metrics, and the time they took."""

  def __init__(self, at: int):
    self._restart(at)

  def _restart(self, at: int) -> None:
    self._start: float | None = time.perf_counter()
    self._at = at
    # Kept on the device, so that steps are dispatched ahead.
    self._rows: list[step.Metrics] = []
    self._seen = 0

  def add(self, metrics: step.Metrics) -> None:
    self._rows.append(metrics)

  def fresh(self) -> list[step.Metrics]:
    """The metrics of the steps since it was last called."""
    rows = jax.device_get(self._rows[self._seen :])
    self._seen = len(self._rows)
    return rows

  def spoil(self) -> None:
    """Leaves the time out: something else took some of it."""
    self._start = None

  def close(
    self, at: int
  ) -> tuple[list[step.Metrics], dict[str, float | None]]:
    """The metrics of each step, and times: none if the window is spoiled."""
    rows = jax.device_get(self._rows)
    times: dict[str, float | None] = {}
    if self._start is not None:
      seconds = time.perf_counter() - self._start
      times = {
        "step_seconds": seconds / (at - self._at),
        "tokens_per_second": sum(int(row.tokens) for row in rows) / seconds,
      }
    self._restart(at)
    return rows, times


class _Interruption:
  """SIGTERM and the first Ctrl-C ask the loop to save and to stop."""

  def __init__(self):
    self.asked = False

  def __enter__(self):
    self._before = {
      number: signal.signal(number, self._ask)
      for number in (signal.SIGTERM, signal.SIGINT)
    }
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _ask(self, number, frame):
    del frame
    if self.asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.asked = True


def _check_finite(
  config: Config,
  at: int,
  rows: Sequence[step.Metrics],
  journal: journal_lib.Journal,
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
    if config.on_nonfinite == "stop" or in_a_row >= _NONFINITE_IN_A_ROW:
      raise RunError(
        sentence + "; the run stops, and its last checkpoint is whole. A "
        "smaller --learning-rate or --dtype float32 may help."
      )
    journal.say(sentence + "; skipped.")


def _claim(folder: pathlib.Path, config: Config) -> None:
  """Makes the folder of the run, or refuses one that holds another run."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{os.getpid()}"
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise UsageError(
      f"the run's folder {folder} cannot be written: {error.strerror}."
    ) from error
  if not (folder / "config.json").exists():
    return
  changed = config_lib.differences(config_lib.from_run(folder), config)
  if changed:
    listed = "; ".join(
      f"{name} is {old!r} there and {new!r} here"
      for name, (old, new) in changed.items()
    )
    raise UsageError(
      f"{folder} holds a run of another configuration: {listed}. Give the "
      "same options to resume it, or another --run-dir."
    )


def _use_compilation_cache() -> None:
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(cache) / "bilora_jax/jax")
  )
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _eval_every(prepared: Prepared) -> int:
  return prepared.config.eval_every or prepared.steps_per_epoch


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
  rows = {name: len(x) for name, x in prepared.examples.items()}
  parts = (
    bilora_jax.count_parameters(trained)
    if prepared.method.adapted is not None
    else {"all": _count(trained)}
  )
  counts = ", ".join(f"{name} {count:,}" for name, count in parts.items())
  return (
    f"{config.method} on {config.task}: rows {rows}; trained parameters: "
    f"{counts}; base {_count(prepared.variables):,}; {prepared.steps} steps"
  )


def _median(rows: Sequence[dict[str, Any]], name: str) -> float | None:
  return statistics.median([row[name] for row in rows]) if rows else None


def _results(found: evaluate.Evaluation) -> dict[str, Any]:
  return {
    **found.metrics,
    "loss": found.loss,
    "rows": found.rows,
    "accuracy_95": found.interval(),
  }


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
