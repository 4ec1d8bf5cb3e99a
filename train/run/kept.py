"""The files that a run keeps: its task, and what it has trained."""

from collections.abc import Mapping
import pathlib
from typing import Any

from flax import traverse_util
import numpy as np
import safetensors
import safetensors.numpy

import bilora_jax

from .. import checked, files, options
from ..data import registry as tasks
from ..data import scores
from ..data.task import Task
from ..errors import RunError, UsageError
from . import fingerprint as fingerprints
from .config import Config

ADAPTERS = "adapters"
PARAMETERS = "parameters.safetensors"
"""The file of trained parameters, for methods without adapters."""
TASK = "task.json"
TEMPLATE = "chat_template.jinja"
"""The file of the chat template, if the run has its own."""


def begin(
  folder: pathlib.Path,
  config: Config,
  task: Task,
  fingerprint: Mapping[str, Any],
) -> None:
  """Writes a run's task, fingerprint and template, before its first step."""
  files.write_json(folder / TASK, task.description())
  fingerprints.begin(folder, fingerprint)
  if config.data.chat_template:
    source = pathlib.Path(config.data.chat_template).expanduser()
    files.write_atomically(folder / TEMPLATE, checked.read_text(source))


def task(folder: pathlib.Path, config: Config) -> Task:
  """Returns the task of a run, with labels, columns and metrics.

  Raises:
    UsageError: if its file cannot be read.
  """
  path = folder / TASK
  if not checked.is_file(path):
    # Older runs have no file, and their tasks are those of the program.
    try:
      return tasks.get(config.data.task)
    except ValueError as error:
      raise UsageError(f"the run in {folder}: {error}") from error
  found = Task.from_description(str(path), checked.read_json(path))
  unknown = sorted(set(found.metrics) - set(scores.METRICS))
  if unknown and found.kind != "conversations":
    raise UsageError(
      f"{path}: metrics must be some of {', '.join(scores.METRICS)}; got "
      f"{options.listed(unknown)}."
    )
  return found


def save_parameters(folder: pathlib.Path, parameters: Any) -> None:
  """Writes parameters by paths such as `encoder/layer_0/query/kernel`.

  Raises:
    OSError: if they cannot be written; then there is no file.
  """
  flat: dict[str, Any] = traverse_util.flatten_dict(parameters, sep="/")
  files.save_tensors(folder / PARAMETERS, flat)


def load_parameters(folder: pathlib.Path) -> dict[str, Any]:
  """Returns saved parameters, nested as in the model, in their saved dtypes.

  Raises:
    UsageError: if the file is damaged.
    RunError: if a parameter is not finite.
  """
  path = folder / PARAMETERS
  checked.is_file(path)
  try:
    flat = safetensors.numpy.load_file(path)
    nested = traverse_util.unflatten_dict(flat, sep="/")
  except (safetensors.SafetensorError, OSError) as error:
    raise UsageError(
      f"{path} is not a whole safetensors file: {str(error)[:300]}."
    ) from error
  # NumPy may lack a dtype, and a path may be the beginning of another path.
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UsageError(
      f"{path} does not hold the parameters of a model: {str(error)[:300]}."
    ) from error
  for name, x in flat.items():
    if not np.isfinite(x).all():
      raise RunError(f"{path}: {name} has values that are not finite.")
  return nested


def save(
  folder: pathlib.Path, adapted: bilora_jax.Adapted | None, trained: Any
) -> None:
  """Writes trained adapters, or trained parameters if there are no adapters."""
  if adapted is None:
    save_parameters(folder, trained)
  else:
    bilora_jax.save_adapters(folder / ADAPTERS, adapted, trained)
