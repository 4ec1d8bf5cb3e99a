"""What a run leaves for later: what its task was, and what it has trained."""

import json
import pathlib
from typing import Any

from flax import traverse_util
import safetensors
import safetensors.numpy

import bilora_jax

from .. import files
from ..data import registry as tasks
from ..data.task import Task
from ..errors import UsageError
from .config import Config

ADAPTERS = "adapters"
PARAMETERS = "parameters.safetensors"
"""In place of adapters, what a method without them has trained."""
TASK = "task.json"
TEMPLATE = "chat_template.jinja"
"""Of the conversations, if the run has its own."""


def begin(folder: pathlib.Path, config: Config, task: Task) -> None:
  """Writes what a run is of, before its first step."""
  files.write_json(folder / TASK, task.description())
  if config.data.chat_template:
    source = pathlib.Path(config.data.chat_template).expanduser()
    files.write_atomically(folder / TEMPLATE, source.read_text("utf-8"))


def task(folder: pathlib.Path, config: Config) -> Task:
  """The task of a run: its labels, columns and metrics.

  Raises:
    UsageError: if its file cannot be read.
  """
  path = folder / TASK
  if not path.exists():
    # Older runs have none; their tasks come with the program.
    return tasks.get(config.data.task)
  try:
    return Task.from_description(json.loads(path.read_text()))
  except (OSError, ValueError) as error:
    raise UsageError(f"{path} cannot be read: {error}") from error


def save_parameters(folder: pathlib.Path, parameters: Any) -> None:
  """Writes parameters by their paths, as `encoder/layer_0/query/kernel`.

  Raises:
    OSError: if they cannot be written; there is then no file.
  """
  flat = traverse_util.flatten_dict(parameters, sep="/")
  files.save_tensors(folder / PARAMETERS, flat)


def load_parameters(folder: pathlib.Path) -> dict[str, Any]:
  """Parameters, nested as a model has them, in the dtypes they were saved in.

  Raises:
    UsageError: if their file is damaged.
  """
  path = folder / PARAMETERS
  try:
    flat = safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as error:
    raise UsageError(
      f"{path} is not a whole safetensors file: {error}."
    ) from error
  return traverse_util.unflatten_dict(flat, sep="/")


def save(
  folder: pathlib.Path, adapted: bilora_jax.Adapted | None, trained: Any
) -> None:
  """Writes what was trained: adapters of a model, or else its parameters."""
  if adapted is None:
    save_parameters(folder, trained)
  else:
    bilora_jax.save_adapters(folder / ADAPTERS, adapted, trained)
