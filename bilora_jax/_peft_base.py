"""Applies a PEFT folder's changes to a base, and checks the folder's copies."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bilora_jax._peft_folder import Stored


def extra(
  stored: Stored, base: Mapping[str, Any] | None, prefix: str
) -> tuple[dict[str, np.ndarray], list[str]]:
  """The parameters that are trained whole, by path, and a list of faults.

  Args:
    stored: the content of a folder.
    base: the base's tensors by Hugging Face's names, with or without the
      prefix; None if there are none.
    prefix: beginning of names that the names of a bare model lack.
  """
  faults: list[str] = []
  tensors = _Base(base, prefix)
  for name, (there, copy) in stored.copies.items():
    faults += _copied(there, copy, tensors.get(name), base is None)
  parameters = dict(stored.whole)
  paths = stored.places.paths()
  for path in dict.fromkeys(paths[name] for name in stored.changes):
    values = {}
    for name in stored.places.tensor_names(path):
      tensor = tensors.get(name)
      if tensor is None:
        faults.append(
          f"the folder changes {name}, and reading it needs the base's own "
          f"tensor, which is not in base="
        )
        continue
      tensor = tensor.astype(np.float32)
      try:
        values[name] = stored.changes.get(name, np.asarray)(tensor)
      except ValueError as error:
        faults.append(
          f"the change of {name} does not fit the base's tensor of the shape "
          f"{tensor.shape}: {error}"
        )
    if len(values) == len(stored.places.tensor_names(path)):
      parameters[path] = stored.places.parameter(path, values)
  return parameters, faults


class _Base:
  """Tensors of a base, by names that may lack a prefix."""

  def __init__(self, base: Mapping[str, Any] | None, prefix: str):
    self._base, self._prefix = base or {}, prefix

  def get(self, name: str) -> np.ndarray | None:
    for key in (name, self._prefix + name, name.removeprefix(self._prefix)):
      if key in self._base:
        tensor = self._base[key]
        # Slices of safetensors files are read when they are indexed.
        return np.asarray(tensor[(slice(None),) * len(tensor.shape)])
    return None


def misfit(
  name: str, shape: tuple[int, ...], base_shape: tuple[int, ...]
) -> str:
  """What to say of a weight whose shape is not that of the base's weight."""
  resized = ""
  if shape[1:] == base_shape[1:]:
    resized = (
      ": the vocabulary was resized before training; resize the base with "
      f"resize_token_embeddings({shape[0]}) of transformers, save it, and use "
      "the saved folder as the base"
    )
  return (
    f"{name} has the shape {shape}, but the base's weight has "
    f"{base_shape}{resized}"
  )


def _copied(
  there: str, copy: np.ndarray, own: np.ndarray | None, unknown: bool
) -> list[str]:
  """The faults of a copy of a base's weight."""
  if own is None:
    why = (
      "base=, to compare it with, is not given"
      if unknown
      else "the base has no such weight"
    )
    return [
      f"the folder has {there}, which is not among modules_to_save, and {why}"
    ]
  if copy.shape != own.shape:
    return [misfit(there, copy.shape, own.shape)]
  # In the copy's dtype, as the base or the copy may have fewer bits.
  if not (copy == own.astype(copy.dtype)).all():
    return [
      f"{there} is a copy of another base's weight: use the base that the "
      "adapter was trained on"
    ]
  return []
