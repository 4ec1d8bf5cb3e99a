"""Reads the tensors of a PEFT folder, by the names that current PEFT writes."""

import pathlib
import re

import numpy as np

from bilora_jax import _files

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = ".base_layer."  # of a module that PEFT has wrapped
_PICKLE = "adapter_model.bin"
_MOST = 8

# Names may contain the adapter's name and the names of PEFT's wrappers.
_SPELLINGS = (
  (re.compile(r"(\.lora_[AB])\.[^.]+(\.(?:weight|bias))$"), r"\1\2"),
  (
    re.compile(
      r"(\.(?:lora_embedding_[AB]|lora_magnitude_vector"
      r"|trainable_tokens_delta))(?:\.[^.]+){1,2}$"
    ),
    r"\1",
  ),
  (re.compile(r"\.modules_to_save\.(?:(?=[^.]+$)|[^.]+\.)"), "."),
  (re.compile(r"\.token_adapter\.base_layer\."), BASE),
)
# Tensors that PEFT does not compute with: the originals of modules that were
# trained whole, and a part of a backward pass.
_UNUSED = re.compile(r"\.original_module\.|\.lora_velora_embed")

Tensors = dict[str, np.ndarray]


def read(folder: pathlib.Path) -> Tensors:
  """The tensors of a folder, by names without the prefix.

  Raises:
    ValueError: if the folder holds a pickle, names that are not PEFT's, several
      adapters, or numbers that are not finite.
  """
  path = folder / FILE
  if not path.is_file() and (folder / _PICKLE).is_file():
    raise ValueError(
      f"{folder} has its weights in {_PICKLE}, a pickle, which can run code "
      f"when it is read; save them as {FILE} with PEFT first."
    )
  found, _ = _files.read_tensors(path)
  other = [name for name in found if not name.startswith(PREFIX)]
  if other:
    raise ValueError(
      f"{path} is not by PEFT, whose names begin with {PREFIX}; got "
      f"{', '.join(other[:_MOST])}."
    )
  _files.require_finite(path, found)
  spelt: dict[str, str] = {}
  for name in found:
    if _UNUSED.search(name):
      continue
    now = name.removeprefix(PREFIX)
    for pattern, new in _SPELLINGS:
      now = pattern.sub(new, now)
    if not equal(found[spelt.setdefault(now, name)], found[name]):
      raise ValueError(
        f"{path} holds several adapters, but only one can be read: "
        f"{spelt[now]} and {name} belong to the same module. Save each in its "
        "own folder."
      )
  return {now: found[name] for now, name in spelt.items()}


def equal(x: np.ndarray, y: np.ndarray) -> bool:
  """Whether two tensors have the same shape and equal values."""
  return x.shape == y.shape and bool((x == y).all())
