"""Reads the PEFT folder that a run starts from: `--adapter`."""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp

import bilora_jax
from bilora_jax import peft

from ..models import registry
from ..models.family import Kind
from ..models.io import weights

_HEAD = "head/"
_SEQUENCE = "SEQ_CLS"


@dataclasses.dataclass(frozen=True)
class Folder:
  """A PEFT folder for a model.

  Attributes:
    path: the path of the folder.
    kind: how transformers and PEFT represent the model; without the head, if
      the run trains a new head.
    left_out: the ends of names of modules whose tensors are not read.
    base: the tensors of the base by their names in its files; None if they are
      not available.
  """

  path: str
  kind: Kind
  left_out: tuple[str, ...]
  base: Mapping[str, Any] | None

  def spec(self) -> bilora_jax.LoraSpec:
    """Returns the ranks, alphas, targets, rsLoRA and DoRA of the adapters.

    Raises:
      ValueError: if the folder has no readable LoRA for this model, or has a
        head for another task than the model's head.
    """
    found = peft.load_spec(
      self.path,
      self.kind.names,
      prefix=self.kind.prefix,
      left_out=self.left_out,
    )
    task = weights.read_json(
      pathlib.Path(self.path) / "adapter_config.json"
    ).get("task_type")
    heads = [path for path in self.kind.names if path.startswith(_HEAD)]
    if any(map(found.is_extra, heads)) and task != self.kind.task_type:
      raise ValueError(
        f"the head in {self.path} is for the task_type {task!r}, and the head "
        f"of this model is that of a {self.kind.architecture}, task_type "
        f"{self.kind.task_type!r}. "
        + "--head sequence makes a model of SEQ_CLS, and "
        * (task == _SEQUENCE)
        + "--new-head leaves out the head in the folder, and trains a new "
        "head."
      )
    return found

  def started(
    self, adapted: bilora_jax.Adapted
  ) -> Callable[[jax.Array, Any], dict[str, Any]]:
    """Returns `adapted.init`, with the folder's weights in place of new ones.

    Raises:
      ValueError: if the folder's adapters do not fit the model; the message
        names each fault.
    """
    loaded = peft.load(
      self.path,
      adapted,
      self.kind.names,
      prefix=self.kind.prefix,
      base=self.base,
      left_out=self.left_out,
    )
    flat = traverse_util.flatten_dict(jax.tree.map(jnp.asarray, loaded))

    def init(key, variables):
      new = traverse_util.flatten_dict(adapted.init(key, variables))
      return traverse_util.unflatten_dict(new | flat)

    return init


def of(
  path: str,
  model: nn.Module,
  base: Mapping[str, Any] | None = None,
  new_head: bool = False,
) -> Folder:
  """Returns the folder of `--adapter` for a model.

  Args:
    path: the path of the folder.
    model: the model to adapt.
    base: the model's tensors by their names in its files, if they are
      available.
    new_head: whether to leave out the head in the folder, and to train a new
      head.

  Raises:
    ValueError: if `new_head` is set, and the model has no new head.
  """
  family = registry.family_of(model)
  kind = family.kind_of(model)
  left_out = kind.idle
  if new_head:
    if not family.has_new_head:
      raise ValueError(
        f"--new-head is only for models that get a new head; a {family.name} "
        "answers with the head that it came with."
      )
    heads = [path for path in kind.names if path.startswith(_HEAD)]
    names = {k: x for k, x in kind.names.items() if k not in heads}
    kind = dataclasses.replace(kind, names=names)
    # PEFT's names of heads: `SEQ_CLS_HEAD_NAMES` of peft/utils/constants.py.
    left_out += ("classifier", "score")
  return Folder(path, kind, left_out, base)
