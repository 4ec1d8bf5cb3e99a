"""Keeps compiled functions for all runs that differ only in numbers.

The compilation of a run, once for each length of a batch, takes longer than the
run itself. So compiled functions are kept from one run to the next. Runs with
different seeds share them. Different points of a grid share them too, if the
tuned fields need not be constants of the step.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax

from .. import options
from ..data import load as data_lib
from ..methods import method as methods
from ..run import after as after_lib
from ..run import assemble, diagnostics, step
from ..run import config as config_lib
from ..run.assemble import Prepared
from ..run.config import Config
from . import landscapes, measure, plan

_KEPT = 2
# Fields of the training alone. A trained model does not depend on them except
# by its weights.
_OF_STEPS = ("learning_rate", "rho", "weight_decay", "warmup_ratio", "clip")
# Fields that decide rows and labels, which compiled functions do not depend on.
_OF_ROWS = (
  *("seed", "train_rows", "eval_rows", "label_noise", "label_noise_kind"),
  *("one_rater", "noisy_validation", "imbalance"),
)


@dataclasses.dataclass(frozen=True)
class Programs:
  """The compiled functions of runs.

  Attributes:
    step: from `(numbers, variables, state, batch)` to the next state and
      metrics.
    traced: the fields of the configuration that `numbers` holds.
    predict: from `(variables, evaluated, batch)` to the items.
    measure: the function of `study.measure.make`; None: nothing is measured.
    diagnose: the function of `diagnostics.make`, if the configuration asks for
      it.
    draw: the function of `landscapes.make`; None: no landscape is drawn.
    after: the functions of `after.make`, if the configuration asks for them.
    shifted: returns the shifted test sets for `after.evaluations`.
  """

  step: Callable[..., Any]
  traced: tuple[str, ...]
  predict: Callable[..., Any]
  measure: measure.Measure | None
  diagnose: Callable[..., Any] | None
  draw: landscapes.Draw | None
  after: after_lib.Programs | None
  shifted: Callable[[], after_lib.Shifted]


Kept = dict[Any, Any]
"""Compiled functions by the values that decide them, the latest last."""


def of(prepared: Prepared, run: plan.Run, kept: Kept) -> Programs:
  """Returns the functions of a run, and reuses kept functions if possible.

  Args:
    prepared: the prepared run.
    run: the run; other runs differ from it in the fields of its point.
    kept: the kept functions of a few runs, which this call changes.
  """
  names = tuple(
    name for name, value in run.point.items() if isinstance(value, float)
  )
  traced = _keep(
    kept,
    ("traced", _same(prepared, names)),
    lambda: _traceable(prepared, names),
  )
  same = _same(prepared, (*_OF_STEPS, *traced))
  options, landscape = run.sharpness, run.landscape
  return Programs(
    step=_keep(
      kept,
      ("step", traced, _same(prepared, traced)),
      lambda: _step(prepared, traced),
    ),
    traced=traced,
    # A validation does not depend on rho.
    predict=_keep(
      kept,
      ("predict", same),
      lambda: step.make_eval_step(prepared.method, prepared.data.objective),
    ),
    measure=None
    if options is None
    else _keep(
      kept,
      ("measure", options, same),
      lambda: _in_kernels(measure.make, prepared, options),
    ),
    diagnose=None
    if not prepared.config.output.diagnose_every
    else _keep(
      kept,
      ("diagnose", same),
      lambda: diagnostics.make(prepared.method, prepared.data.objective),
    ),
    draw=None
    if landscape is None
    else _keep(
      kept,
      ("draw", landscape, same),
      lambda: _in_kernels(landscapes.make, prepared, landscape),
    ),
    after=None
    if not prepared.config.evaluation.after
    # These run the plain model, so all methods share them.
    else _keep(
      kept,
      ("after", prepared.config.evaluation, _data(prepared), prepared.model),
      lambda: after_lib.make(prepared),
    ),
    shifted=lambda: _keep(
      kept, ("shifted", *_test(prepared)), lambda: _shifted(prepared)
    ),
  )


def _data(prepared: Prepared) -> Any:
  """Returns the options of data that decide how batches are read and scored."""
  of_rows = dict.fromkeys(_OF_ROWS)
  return tuple({**options.values(prepared.config.data), **of_rows}.items())


def _test(prepared: Prepared) -> Any:
  """Returns the options that decide the test rows and their reading."""
  config = prepared.config
  # Without a limit, the rows are the same for all seeds.
  rows = config.data.eval_rows
  seed = config.optimisation.seed if rows else 0
  return _data(prepared), rows, seed, config.model.name


def _shifted(prepared: Prepared) -> after_lib.Shifted:
  assert isinstance(prepared.data, data_lib.Labelled)
  return prepared.data.shifted()


def _keep(kept: Kept, key: Any, make: Callable[[], Any]) -> Any:
  kept[key] = kept.pop(key) if key in kept else make()
  own = [other for other in kept if other[0] == key[0]]
  for old in own[:-_KEPT]:
    del kept[old]
  return kept[key]


def _same(prepared: Prepared, but: Sequence[str]) -> tuple[Any, ...]:
  """Returns what runs that share a program have in common, except `but`."""
  # Trials and final runs differ in these fields, but share their programs.
  of_loop = (
    *("run_dir", "eval_every", "log_every", "patience", "after"),
    "diagnose_every",
  )
  ignored = (*_OF_ROWS, *of_loop, *but)
  same = config_lib.flat(prepared.config)
  for name in ignored:
    same.pop(name, None)
  return tuple(same.items()), prepared.steps, prepared.model


def _step(prepared: Prepared, traced: tuple[str, ...]) -> Callable[..., Any]:
  build = functools.partial(_build, prepared)

  def train_step(numbers, variables, state, batch):
    method = prepared.method
    if traced:
      method = build(config_lib.replace(prepared.config, **numbers))
    one = step.make_train_step(
      method,
      prepared.training_objective,
      accumulate=prepared.config.optimisation.accumulate,
    )
    return one(variables, state, batch)

  return jax.jit(train_step, donate_argnums=2)


def _traceable(prepared: Prepared, names: tuple[str, ...]) -> tuple[str, ...]:
  """Returns the fields that need not be constants of the step."""
  state = jax.eval_shape(
    functools.partial(step.init, prepared.method),
    jax.random.key(0),
    prepared.variables,
  )
  batch = next(prepared.data.train_batches())

  own = config_lib.flat(prepared.config)

  def goes(fields):
    numbers = {name: own[name] for name in fields}
    try:
      jax.eval_shape(
        _step(prepared, fields), numbers, prepared.variables, state, batch
      )
    except TypeError:  # JAX raises its subclasses if a value is not known
      return False
    return True

  if not names or goes(names):
    return names
  return tuple(name for name in names if len(names) > 1 and goes((name,)))


def _in_kernels(
  make: Callable[..., Any], prepared: Prepared, options: Any
) -> Callable[..., Any]:
  """Returns a measurement in the space of the kernels that have adapters."""
  adapted = prepared.method.adapted
  if adapted is None:
    # Full space has the kernels that would have adapters.
    plain = config_lib.replace(prepared.config, method="lora")
    adapted = _build(prepared, plain).adapted
  assert adapted is not None
  return make(
    prepared.method,
    prepared.model,
    list(adapted.targets),
    prepared.data.objective,
    options,
  )


def _build(prepared: Prepared, config: Config) -> methods.Method:
  inputs = prepared.data.objective.inputs(next(prepared.data.train_batches()))
  return assemble.method_of(
    config,
    prepared.model,
    inputs,
    prepared.steps,
    prepared.data.objective,
    prepared.opened.tensors,
  )
