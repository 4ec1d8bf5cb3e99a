"""The PEFT folder that a run starts from: `--adapter`."""

from collections.abc import Callable
import pathlib
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

import bilora_jax
from bilora_jax import peft

from ..models import registry
from ..models.io import weights


def spec(folder: str, model: nn.Module) -> bilora_jax.LoraSpec:
  """The spec of a folder's adapters: ranks, alphas, targets and rsLoRA.

  Raises:
    ValueError: if the folder is no LoRA of this model that can be read, or has
      a head that means something else here.
  """
  kind = registry.of(model).kind_of(model)
  found = peft.load_spec(folder, kind.names, prefix=kind.prefix)
  task = weights.read_json(pathlib.Path(folder) / "adapter_config.json").get(
    "task_type"
  )
  if found.extra is not None and task != kind.task_type:
    raise ValueError(
      f"the head in {folder} is for the task_type {task!r}, and that of this "
      f"model is a {kind.architecture}'s, task_type {kind.task_type!r}. To "
      "train a new head, leave modules_to_save out of the folder."
    )
  return found


def started(
  folder: str,
  adapted: bilora_jax.Adapted,
  model: nn.Module,
) -> Callable[[jax.Array, Any], dict[str, Any]]:
  """`adapted.init`, with what is in the folder in place of new factors.

  Raises:
    ValueError: if the folder's adapters do not fit; each fault is named.
  """
  kind = registry.of(model).kind_of(model)
  loaded = peft.load(folder, adapted, kind.names, prefix=kind.prefix)

  def init(key, variables):
    return adapted.init(key, variables) | jax.tree.map(jnp.asarray, loaded)

  return init
