"""Pooling: from a text's hidden states to one vector."""

from collections.abc import Mapping
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from .. import checked, options
from .io import weights

CHOICES = ("mean", "cls", "max")
_MODULES = "modules.json"


def check(choice: Any) -> None:
  """Refuses a value that is not one of `CHOICES`.

  Raises:
    ValueError: if it is not; the message has the value.
  """
  if choice not in CHOICES:
    raise ValueError(
      f"pooling must be one of {', '.join(CHOICES)}, got "
      f"{options.shown(choice)}."
    )


def pooled(x_BxLxD: jax.Array, mask_BxL: jax.Array, choice: str) -> jax.Array:
  """Pools the real tokens of each row.

  Args:
    x_BxLxD: hidden states.
    mask_BxL: 1 or True at a real token, 0 or False at padding.
    choice: 'mean': the mean over tokens; 'cls': the first token; 'max': the
      largest value of each number. As sentence-transformers'
      models/Pooling.py.

  Returns:
    float32 (B, D). A row of padding gives zeros.
  """
  x_BxLxD = x_BxLxD.astype(jnp.float32)
  mask_BxLx1 = mask_BxL.astype(bool)[..., None]
  if choice == "cls":
    return jnp.where(mask_BxLx1[:, 0], x_BxLxD[:, 0], 0.0)
  if choice == "max":
    largest_BxD = jnp.where(mask_BxLx1, x_BxLxD, -jnp.inf).max(1)
    return jnp.where(mask_BxLx1.any(1), largest_BxD, 0.0)
  mask_BxLx1 = mask_BxLx1.astype(jnp.float32)
  count_Bx1 = jnp.maximum(mask_BxLx1.sum(1), 1.0)
  return (x_BxLxD * mask_BxLx1).sum(1) / count_Bx1


def read(folder: pathlib.Path, hf_config: Mapping[str, Any]) -> str:
  """Returns the pooling of a model folder.

  A folder of sentence-transformers has it in modules.json. A sequence
  classifier of transformers reads the first token. Other models pool by the
  mean.

  Args:
    folder: the model's folder.
    hf_config: the folder's config.json.

  Returns:
    One of `CHOICES`.

  Raises:
    ValueError: a file is invalid, or the folder pools in another way.
  """
  path = folder / _MODULES
  if checked.is_file(path):
    for module in checked.read_json(path, list):
      if not isinstance(module, Mapping):
        raise weights.WeightsError(f"{path} must be a list of objects.")
      kind = checked.field(str(path), module, "type", str)
      if kind.endswith(".Pooling"):
        name = checked.field(str(path), module, "path", str)
        if name in ("", "..") or pathlib.PurePath(name).name != name:
          raise weights.WeightsError(
            f"{path} must name folders beside itself, got {name!r:.100}."
          )
        return _by_sentence_transformers(folder / name / "config.json")
  names = hf_config.get("architectures")
  is_classifier = isinstance(names, list) and any(
    str(name).endswith("ForSequenceClassification") for name in names
  )
  return "cls" if is_classifier else "mean"


def _by_sentence_transformers(path: pathlib.Path) -> str:
  config = weights.read_json(path)
  found = config.get("pooling_mode")
  if found is None:
    found = [
      key.removeprefix("pooling_mode_").removesuffix("_tokens")
      for key, value in config.items()
      if key.startswith("pooling_mode_") and value
    ]
    found = ["cls" if mode == "cls_token" else mode for mode in found]
  modes = found if isinstance(found, list) else [found]
  if len(modes) != 1 or modes[0] not in CHOICES:
    raise weights.WeightsError(
      f"{path}: the pooling must be one of {', '.join(CHOICES)}, got "
      f"{options.shown(modes)}."
    )
  return modes[0]
