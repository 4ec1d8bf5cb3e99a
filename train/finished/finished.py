"""Opens a finished run: its tested model, its labels and its tokenizer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import pathlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bilora_jax

from ..data import label_words, objectives
from ..data import load as data_lib
from ..data.batching import Batch
from ..data.objectives import Items, Objective
from ..data.task import Task, Text
from ..errors import RunError, UsageError
from ..models import load
from ..models.family import Pretrained
from ..models.io import template as templates
from ..run import assemble, fingerprint, kept
from ..run import config as config_lib
from ..run.config import Config


@dataclasses.dataclass(frozen=True, eq=False)
class Finished:
  """A finished run; its weights are read when they are needed.

  Attributes:
    folder: the folder of the run.
    config: the configuration of the run.
    pretrained: the pretrained model.
    task: the task with its labels; it may have no source of rows.
    model: the model of the run.
    adapted: the model with adapters; None if the run trained parameters.
    objective: how the model reads a batch, and how its outputs are scored.
  """

  folder: pathlib.Path
  config: Config
  pretrained: Pretrained
  task: Task
  model: nn.Module
  adapted: bilora_jax.Adapted | None
  objective: Objective

  @property
  def labels(self) -> tuple[str, ...]:
    """The labels of a classification."""
    return self.task.labels

  @property
  def template(self) -> templates.Template | None:
    """The chat template of the run, or else of the model."""
    template, path = self.pretrained.template, self.folder / kept.TEMPLATE
    if template is None or not path.exists():
      return template
    return data_lib.read_template(str(path), template)

  @functools.cached_property
  def adapters(self) -> Mapping[str, Any]:
    """The run's adapters; empty if it trained parameters."""
    if self.adapted is None:
      return {}
    folder = self.folder / kept.ADAPTERS
    found = bilora_jax.load_adapters(folder, self.adapted)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(found)):
      raise RunError(f"the adapters in {folder} are not finite.")
    return found

  @functools.cached_property
  def variables(self) -> dict[str, Any]:
    """The variables of the model, with the parameters that the run trained.

    They have the dtype and the quantisation of the run. They are read one at a
    time.
    """
    spec = self.config.method.spec
    trained = {}
    if self.adapted is None:
      trained = jax.tree.map(jnp.asarray, kept.load_parameters(self.folder))
    if spec.trains == "parameters":
      return {"params": trained}
    found = self.pretrained.variables(
      self.model,
      self.config.optimisation.seed,
      self.config.model.param_dtype,
      adapted=self.adapted,
    )
    return {**found, "params": {**found["params"], **trained}}

  def apply(self) -> functools.partial:
    """Returns a partial of the model's `apply`, with its weights in `args`.

    Callers pass `args` to a jitted function, so that the weights are arguments
    and no constants of the program.
    """
    if self.adapted is None:
      return functools.partial(self.model.apply, self.variables)
    return functools.partial(self.adapted.apply, self.variables, self.adapters)

  def answer(self) -> Callable[[Batch], jax.Array]:
    """Returns a function from a batch to probabilities of labels, or values."""
    return self._compiled(lambda found, _: self.objective.answers(found))

  def items(self) -> Callable[[Batch], Items]:
    """Returns a function from a batch to its losses and predictions."""
    return self._compiled(self.objective.items)

  def _compiled(self, tell: Callable[[Any, Batch], Any]) -> Callable[..., Any]:
    apply = self.apply()

    @jax.jit
    def told(arguments, batch):
      found = apply.func(*arguments, *self.objective.inputs(batch))
      return tell(found, batch)

    return functools.partial(told, apply.args)

  def rows(
    self, data: str | Sequence[Text], task: Task, labelled: bool = False
  ) -> data_lib.Given:
    """Reads new rows for the model; see `data.load.rows_for`."""
    with reading():
      return data_lib.rows_for(
        task,
        data,
        self.pretrained,
        max_length=self.config.data.max_length,
        labelled=labelled,
        data_dir=self.config.data.data_dir or None,
      )

  def predict(
    self, data: str | Sequence[Text], batch_size: int = 0
  ) -> np.ndarray:
    """Returns the model's answers for rows.

    Args:
      data: a path, texts, or pairs of texts.
      batch_size: rows of a batch; 0: the number of the run.

    Returns:
      [rows, labels] probabilities, or [rows] values.

    Raises:
      ValueError: if the rows are invalid.
    """
    given = self.rows(data, self.task)
    return given.answers(self.answer(), batch_size or self.batch_size)

  @property
  def batch_size(self) -> int:
    """The number of rows that the run evaluated together."""
    return assemble.eval_rows(self.config)


@contextlib.contextmanager
def reading() -> Iterator[None]:
  """Turns the RuntimeErrors of unavailable data into UsageErrors."""
  try:
    yield
  except RuntimeError as error:
    raise UsageError(str(error)) from error


def open_run(
  folder: str | pathlib.Path, base: str = "", accept_changes: bool = False
) -> Finished:
  """Opens a finished run.

  Args:
    folder: the folder of the run, from this or an older version of the program.
    base: the model that gets the run's adapters; empty: the run's own model.
    accept_changes: whether the run's model may have changed since the run.

  Raises:
    ValueError: if the run does not exist, has not ended or kept no weights; or
      if its model is not available, or has changed.
  """
  folder = pathlib.Path(folder).expanduser()
  _check_folder(folder)
  config = config_lib.from_run(folder)
  _check_kept(folder, config)
  task = kept.task(folder, config)
  options = config.model
  if base:
    if not config.method.spec.has_adapters:
      raise UsageError(
        f"--model is only for runs with adapters; {folder} is a run of "
        f"--method {config.method.name}, which trained the model itself."
      )
    options = dataclasses.replace(options, name=base, hub_revision="")
    config = dataclasses.replace(config, model=options)
  begun = {} if base else fingerprint.read(folder)
  try:
    pretrained = load.open_pretrained(
      options.name,
      options.hub_revision,
      str(begun.get("commit") or ""),
      options.head,
    )
  except ValueError as error:
    raise UsageError(f"the model of {folder}: {error}") from error
  module = {**options.of_module, "remat": "none"}
  if task.kind == "conversations":
    model = pretrained.language_model(**module)
    objective = objectives.NEXT_TOKEN
  else:
    reader = data_lib.reader(task, pretrained, config.data.max_length)
    answers = label_words.answers(pretrained, task)
    model = pretrained.classifier(answers, **module)
    objective = reader.objective
  adapted = None
  if config.method.spec.has_adapters:
    spec = bilora_jax.load_spec(folder / kept.ADAPTERS)
    if not config.adapter.path:
      # The base may be another model, with another name of its head. Runs of
      # older versions exclude a head even if their model lacks it.
      head = pretrained.family.own_head(model)
      spec = dataclasses.replace(spec, exclude=head)
    adapted = bilora_jax.adapt(
      model,
      spec,
      *jax.eval_shape(objective.inputs, _BATCH),
      methods=("__call__", *pretrained.family.generate_methods),
    )
  finished = Finished(
    folder, config, pretrained, task, model, adapted, objective
  )
  if begun and not accept_changes:
    template = finished.template if task.kind == "conversations" else None
    fingerprint.require_same_base(folder, config, begun, pretrained, template)
  return finished


# A batch with every kind of input; an objective takes those of its model.
_TOKENS = jax.ShapeDtypeStruct((1, 2), "int32")
_BATCH = {
  **dict.fromkeys(("tokens", "mask", "token_types"), _TOKENS),
  **dict.fromkeys(("positions", "targets"), _TOKENS),
  "lengths": jax.ShapeDtypeStruct((1, 1), "int32"),
  "images": jax.ShapeDtypeStruct((1, 2, 2, 3), "uint8"),
}


def _check_folder(folder: pathlib.Path) -> None:
  if not folder.is_dir():
    raise UsageError(
      f"--run must be the folder of a finished run; {folder} does not exist."
    )
  is_run = (folder / "config.json").exists()
  if not is_run and (folder / "runs.jsonl").exists():
    raise UsageError(
      f"{folder} is the folder of a study, whose runs keep only their "
      "numbers; train the run that you want by itself, and give its folder."
    )


def _check_kept(folder: pathlib.Path, config: Config) -> None:
  """Refuses a run that kept no weights."""
  name = kept.ADAPTERS if config.method.spec.has_adapters else kept.PARAMETERS
  if (folder / name).exists():
    return
  if (folder / "results.json").exists():
    raise UsageError(
      f"{folder} has ended without {name}, which older versions did not keep "
      f"for --method {config.method.name}; repeat the run with --from-run "
      f"{folder}."
    )
  raise UsageError(
    f"{folder} has no {name}, which a run writes at its end; resume the run "
    f"with the command that started it, or with --from-run {folder} --run-dir "
    f"{folder}."
  )
