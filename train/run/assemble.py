"""Prepares a run before its first step: checks, data, weights, method."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
from typing import Any

import jax

import bilora_jax

from ..data import label_words, objectives
from ..data import load as data_lib
from ..data.objectives import Objective
from ..devices import mesh as mesh_lib
from ..devices import processes
from ..errors import RunError, UsageError
from ..methods import initialisation
from ..methods import method as methods
from ..models import load as models
from ..models.family import Family, Pretrained
from . import config as config_lib
from . import fingerprint as fingerprints
from . import lowering, memory
from .config import Config


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Everything that a run needs before its first step.

  Attributes:
    opened: the opened pretrained model.
    variables: the variables of the model, placed on the devices. If there is a
      `start`, it was subtracted from them.
    shapes: the shapes of the variables, before they are quantised.
    axes: a tree like `shapes`, with the names of the axes.
    start: the first values of the adapters, if they were subtracted from the
      variables; else None.
    fingerprint: the fingerprint of rows, weights and tokenizer as they are now.
    changed: a sentence, if the fingerprint differs from that of the run's
      first start.
  """

  config: Config
  folder: pathlib.Path
  opened: Pretrained
  data: data_lib.Data
  model: Any
  variables: Any
  shapes: Any
  axes: Any
  layout: mesh_lib.Layout
  method: methods.Method
  start: Any = None
  fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)
  changed: str = ""

  @property
  def steps(self) -> int:
    return self.config.optimisation.epochs * self.data.steps_per_epoch

  @property
  def training_objective(self) -> Objective:
    """The objective of a step; validation and test have `data.objective`."""
    share = self.config.optimisation.label_smoothing
    if not share:
      return self.data.objective
    return objectives.smoothed(self.data.objective, share)

  def pretrained(self) -> Any:
    """The original variables of the pretrained model."""
    if self.start is None:
      return self.variables
    assert self.method.adapted is not None
    return self.method.adapted.merge(self.variables, self.start)

  def saved(self, evaluated: Any) -> tuple[bilora_jax.Adapted | None, Any]:
    """Returns what to save: adapters for the original variables, or parameters.

    Args:
      evaluated: the evaluated adapters or parameters.
    """
    if self.start is None:
      return self.method.adapted, evaluated
    assert self.method.adapted is not None
    batch = next(self.data.train_batches())
    return initialisation.on_original(
      self.method.adapted,
      self.model,
      self.data.objective.inputs(batch),
      evaluated,
      self.start,
    )


def prepare(config: Config) -> Prepared:
  """Checks a configuration, and loads data, weights and method.

  Args:
    config: the configuration of a run whose folder is claimed; see
      `claim.claimed`.

  Raises:
    UsageError: if the data, the weights or the method cannot be had.
    RunError: if weights are not finite.
  """
  folder = config.folder()
  try:
    prepared = _prepared(config, folder)
  except RunError:
    raise
  except (ValueError, RuntimeError) as error:
    raise UsageError(str(error)) from error
  return prepared


def _prepared(config: Config, folder: pathlib.Path) -> Prepared:
  config_lib.check(config)
  if config.devices.compilation_cache:
    _use_compilation_cache()
  optimisation = config.optimisation
  layout = mesh_lib.make(
    config.devices.mesh, optimisation.batch_size // optimisation.accumulate
  )
  _check_eval_batch(config, layout)
  pretrained = models.open_pretrained(
    config.model.name,
    config.model.hub_revision,
    fingerprints.commit(folder),
    config.model.head,
  )
  check_layout(layout, config.model.remat, pretrained.family)
  data = load_data(config, pretrained, layout)
  check_layout(layout, config.model.remat, pretrained.family, data.lengths)
  fingerprint = fingerprints.of(config, pretrained, data)
  changed = fingerprints.require_same(folder, config, fingerprint)
  if config.evaluation.samples and not isinstance(data, data_lib.Conversations):
    raise UsageError(
      "--samples is only for conversations (--task instructions), whose "
      f"prompts the model answers; got --task {config.data.task}, which has "
      "labels."
    )
  if optimisation.label_smoothing and not data.objective.of_classes:
    raise UsageError(
      "--label-smoothing is only for models that return a logit for each "
      f"class; got --task {config.data.task} with --model {config.model.name}."
    )
  model = _model(config, pretrained, data)
  inputs = data.objective.inputs(next(data.train_batches()))
  steps = optimisation.epochs * data.steps_per_epoch
  if steps >= 2**31:
    raise UsageError(
      f"--epochs {optimisation.epochs:,} of {data.steps_per_epoch:,} steps "
      "each are too many steps: they are counted in 31 bits."
    )
  # Only an adapter that is read from a folder is compared with the base. New
  # adapters do not depend on the base's tensors.
  base_tensors = pretrained.tensors if config.adapter.path else None
  method = method_of(config, model, inputs, steps, data.objective, base_tensors)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  axes = pretrained.logical_axes(shapes)
  base, state = lowering.abstract(config, method, layout, shapes, axes)
  memory.check(base, state)
  variables = pretrained.variables(
    model,
    optimisation.seed,
    config.model.param_dtype,
    layout.placer(axes["params"]),
    method.adapted,
  )
  started = initialisation.started(
    config.adapter.start,
    model,
    variables,
    method,
    data.objective,
    lambda: next(data.train_batches()),
  )
  return Prepared(
    config=config,
    folder=folder,
    opened=pretrained,
    data=data,
    model=model,
    variables=started.variables,
    shapes=shapes,
    axes=axes,
    layout=layout,
    method=started.method,
    start=started.start,
    fingerprint=fingerprint,
    changed=changed,
  )


def load_data(
  config: Config,
  pretrained: Pretrained,
  layout: mesh_lib.Layout | None = None,
) -> data_lib.Data:
  """Loads the data of a run; the first process may prepare them for all."""
  optimisation = config.optimisation
  mesh = layout.mesh if layout is not None else None
  shared = mesh.shape["data"] * mesh.shape["fsdp"] if mesh is not None else 1
  with processes.first_before_others():
    return data_lib.load(
      config.data,
      pretrained,
      batch_size=optimisation.batch_size,
      eval_batch_size=eval_rows(config),
      epochs=optimisation.epochs,
      seed=optimisation.seed,
      multiple=optimisation.accumulate * shared,
    )


def method_of(
  config: Config,
  model: Any,
  inputs: tuple[Any, ...],
  steps: int,
  objective: Objective,
  base: Mapping[str, Any] | None = None,
) -> methods.Method:
  """Returns the method of a configuration; see `methods.method.build`."""
  return methods.build(
    config.method,
    config.adapter,
    config.optimisation,
    model,
    inputs,
    steps,
    objective,
    config.model.quantised,
    base,
  )


def _model(config: Config, pretrained: Pretrained, data: data_lib.Data) -> Any:
  options = config.model.of_module
  if isinstance(data, data_lib.Labelled):
    answers = label_words.answers(pretrained, data.task)
    return pretrained.classifier(answers, **options)
  return pretrained.language_model(**options)


def check_layout(
  layout: mesh_lib.Layout,
  remat: str,
  family: Family,
  lengths: Sequence[int] = (),
) -> None:
  """Checks that the devices support the layout and `remat`.

  Args:
    layout: the layout of the run.
    remat: what a layer's backward pass computes again.
    family: the family of the model.
    lengths: the lengths, in tokens, that a batch may have.

  Raises:
    UsageError: if the family's models cannot share the tokens of a row, if the
      devices along `context` do not divide a length, or if products cannot be
      kept in the host's memory.
  """
  if remat == "offload" and not layout.offloads:
    raise UsageError(
      "--remat offload keeps products in the host's pinned memory, which "
      "these devices do not reach; use --remat base, which keeps them on the "
      "devices."
    )
  if layout.context == 1:
    return
  if not family.splits_rows:
    raise UsageError(
      f"context in --mesh is only for decoders; got context={layout.context} "
      f"with a {family.name}, whose rows cannot be divided."
    )
  odd = [x for x in lengths if x % layout.context]
  if odd:
    raise UsageError(
      f"context={layout.context} in --mesh must divide the tokens of every "
      "row (--max-length, to which --pack fills all rows); there may be rows "
      f"of {odd[0]}."
    )


def eval_rows(config: Config) -> int:
  """Returns the number of rows of an evaluation batch."""
  optimisation = config.optimisation
  return (
    config.evaluation.eval_batch_size
    or optimisation.batch_size // optimisation.accumulate
  )


def _check_eval_batch(config: Config, layout: mesh_lib.Layout) -> None:
  if layout.mesh is None:
    return
  share = layout.mesh.shape["data"] * layout.mesh.shape["fsdp"]
  if eval_rows(config) % share:
    raise UsageError(
      "--eval-batch-size must be a multiple of data times fsdp, which is "
      f"{share} in --mesh {config.devices.mesh}; got {eval_rows(config)}."
    )


def _use_compilation_cache() -> None:
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(cache) / "bilora_jax/jax")
  )
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
