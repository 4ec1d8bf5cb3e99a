"""What a PEFT folder makes of the weights of a base, and its copies of some."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bilora_jax._peft_folder import Stored


def extra(
  stored: Stored, base: Mapping[str, Any] | None, prefix: str
) -> tuple[dict[str, np.ndarray], list[str]]:
  """The parameters that are trained as they are, by path, and what is wrong.

  Args:
    stored: what is in a folder.
    base: the base's tensors by Hugging Face's names, with the prefix or
      without; None if they are not at hand.
    prefix: what names of a bare model lack.
  """
  faults: list[str] = []
  tensors = _Base(base, prefix)
  for name, (there, copy) in stored.copies.items():
    faults += _copied(there, copy, tensors.get(name), base is None)
  found = dict(stored.whole)
  paths = stored.places.paths()
  for path in dict.fromkeys(paths[name] for name in stored.changes):
    values = {}
    for name in stored.places.tensor_names(path):
      own = tensors.get(name)
      if own is None:
        faults.append(
          f"{name} is changed, and not read as trained whole without the "
          "base's own, which is not in base="
        )
        continue
      own = own.astype(np.float32)
      try:
        values[name] = stored.changes.get(name, np.asarray)(own)
      except ValueError as error:
        faults.append(
          f"what is done to {name} does not fit the base's, of the shape "
          f"{own.shape}: {error}"
        )
    if len(values) == len(stored.places.tensor_names(path)):
      found[path] = stored.places.parameter(path, values)
  return found, faults


class _Base:
  """Tensors of a base, whole and by names that may lack a prefix."""

  def __init__(self, base: Mapping[str, Any] | None, prefix: str):
    self._base, self._prefix = base or {}, prefix

  def get(self, name: str) -> np.ndarray | None:
    for key in (name, self._prefix + name, name.removeprefix(self._prefix)):
      if key in self._base:
        found = self._base[key]
        # Of a file, nothing is read until it is indexed.
        return np.asarray(found[(slice(None),) * len(found.shape)])
    return None


def misfit(
  name: str, shape: tuple[int, ...], base_shape: tuple[int, ...]
) -> str:
  """A sentence's part for a weight whose shape is not the base's."""
  resized = ""
  if shape[1:] == base_shape[1:]:
    resized = (
      ": the base's vocabulary was resized; do it here as well, by "
      f"resize_token_embeddings({shape[0]}) of transformers, and take the "
      "folder that it is saved in as the base"
    )
  return f"{name} has the shape {shape}, and the base's {base_shape}{resized}"


def _copied(
  there: str, copy: np.ndarray, own: np.ndarray | None, unknown: bool
) -> list[str]:
  """What is wrong with a copy of a weight of the base."""
  if own is None:
    why = (
      "base= is not given, with which it is compared"
      if unknown
      else "the base has none"
    )
    return [f"{there} is there and not among modules_to_save, and {why}"]
  if copy.shape != own.shape:
    return [misfit(there, copy.shape, own.shape)]
  # Of a base in fewer bits, or saved in fewer.
  if not (copy == own.astype(copy.dtype)).all():
    return [
      f"{there} is a copy of another base's weight than this one's: take the "
      "base that the adapter was trained on"
    ]
  return []
