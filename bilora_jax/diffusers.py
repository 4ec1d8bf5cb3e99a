"""LoRA files of Hugging Face diffusers: from folders of PEFT, and to them.

A pipeline of diffusers keeps the LoRAs of all its models in one file,
`pytorch_lora_weights.safetensors`. The name of a tensor is the model's name,
such as `unet.` or `transformer.`, and then PEFT's name. PEFT's configurations
are JSON in the file's header, with the same beginnings. Older files have other
names, and no configuration.

Use `peft.save` and then `from_peft` to write adapters for a pipeline. Use
`to_peft` and then `peft.load` to read them.
"""

from collections.abc import Mapping
import json
import os
import pathlib
import re
from typing import Any

import numpy as np
import safetensors.numpy

from bilora_jax import (
  _files,
  _peft_config,
  _peft_folder,
  _peft_keys,
  _peft_tensors,
)

NAME = "pytorch_lora_weights.safetensors"
"""The name of the file that pipelines look for in a folder."""

_CONFIGS = "lora_adapter_metadata"  # of the header
_ENDS = (_peft_folder.A, _peft_folder.B, _peft_folder.MAGNITUDE)
_ALPHA = ".alpha"
# Spellings of older versions, and PEFT's; diffusers converts them in
# diffusers/utils/state_dict_utils.py.
_SPELLINGS = (
  (re.compile(r"\.processor\."), "."),
  (re.compile(r"\.to_out_lora(?=\.)"), ".to_out.0.lora"),
  (re.compile(r"\.(to_[qkv])_lora(?=\.)"), r".\1.lora"),
  (re.compile(r"\.lora(?:_linear_layer)?\.down\.weight$"), _peft_folder.A),
  (re.compile(r"\.lora(?:_linear_layer)?\.up\.weight$"), _peft_folder.B),
  (re.compile(r"\.lora_magnitude_vector\.weight$"), _peft_folder.MAGNITUDE),
)
_KOHYA = re.compile(r"lora_(?:unet|te\d?|transformer)_")
_MOST = 8


def from_peft(
  folder: str | os.PathLike[str],
  file: str | os.PathLike[str],
  model: str = "unet",
) -> None:
  """Writes a PEFT folder's LoRA as the LoRA of one model of a pipeline.

  `pipeline.load_lora_weights` of diffusers 0.34 and later reads the file. The
  LoRAs of other models in the file do not change.

  Args:
    folder: a folder with a LoRA, which PEFT or `peft.save` wrote.
    file: the file to write, or its folder; in a folder it gets the name that
      pipelines expect.
    model: the model's name in the pipeline, such as 'unet', 'transformer' or
      'text_encoder'.

  Raises:
    ValueError: if the folder holds no LoRA, or more than diffusers reads:
      modules that are trained whole, biases or embeddings; or if the file is
      damaged.
    OSError: if the file cannot be written.
  """
  _check_name(model)
  folder, file = pathlib.Path(folder), _place(file)
  config = _peft_keys.read(folder)
  tensors = _peft_tensors.read(folder)
  other = [name for name in tensors if not name.endswith(_ENDS)]
  if other or config.modules_to_save or config.bias != "none":
    raise ValueError(
      f"diffusers reads nothing but pairs of lora_A and lora_B, and DoRA's "
      f"magnitudes; {folder} also has {_listed(other) or 'trained biases'}."
    )
  if not tensors:
    raise ValueError(f"{folder} has no lora_A and no lora_B.")
  kept, configs = _read(file) if file.exists() else ({}, {})
  own = f"{model}."
  kept = {k: v for k, v in kept.items() if not k.startswith(own)}
  configs = {k: v for k, v in configs.items() if not k.startswith(own)}
  told = _files.read_json(folder / _peft_config.NAME)
  configs |= {own + key: value for key, value in told.items()}
  blob = safetensors.numpy.save(
    {**kept, **{own + k: np.ascontiguousarray(v) for k, v in tensors.items()}},
    {"format": "pt", _CONFIGS: json.dumps(configs, indent=2, sort_keys=True)},
  )
  file.parent.mkdir(parents=True, exist_ok=True)
  _files.write_all({file: blob})


def to_peft(
  file: str | os.PathLike[str],
  folder: str | os.PathLike[str],
  model: str = "unet",
) -> None:
  """Writes the LoRA of one model of a pipeline as a folder of PEFT.

  A file without configurations has a rank for each pair, and an alpha that
  equals it unless the file says another, as diffusers reads it.

  Args:
    file: a file that diffusers wrote, or the file's folder.
    folder: where to write, created if it is missing; files of the same names
      are replaced.
    model: the model's name in the pipeline.

  Raises:
    ValueError: if the file is missing or damaged, has no LoRA of this model, or
      was written by another program.
    OSError: if a file cannot be written.
  """
  _check_name(model)
  file, folder = _place(file), pathlib.Path(folder)
  found, configs = _read(file)
  if any(map(_KOHYA.match, found)):
    raise ValueError(
      f"{file} has names as kohya's scripts write them; load it in a pipeline "
      "of diffusers, and save it there with save_lora_weights."
    )
  own = f"{model}."
  given = {
    key.removeprefix(own): value
    for key, value in configs.items()
    if key.startswith(own)
  }
  tensors, alphas, other = {}, {}, []
  for full, value in found.items():
    if not full.startswith(own):
      continue
    name = _spelt(full.removeprefix(own))
    if name.endswith(_ENDS):
      tensors[name] = value
    elif name.endswith(_ALPHA):
      alphas[_spelt(name.removesuffix(_ALPHA))] = float(value)
    else:
      other.append(full)
  if other:
    raise ValueError(
      f"{file} has tensors that are no LoRA's: {_listed(other)}."
    )
  if not tensors:
    parts = sorted({name.partition(".")[0] for name in found})
    raise ValueError(
      f"{file} has no LoRA of {model!r}; it has those of {_listed(parts)}."
    )
  text = (
    json.dumps(given, indent=2) if given else _config(file, tensors, alphas)
  )
  blob = safetensors.numpy.save(
    {_peft_tensors.PREFIX + k: v for k, v in tensors.items()}, {"format": "pt"}
  )
  folder.mkdir(parents=True, exist_ok=True)
  _files.write_all(
    {
      folder / _peft_tensors.FILE: blob,
      folder / _peft_config.NAME: text.encode(),
    }
  )


def _place(file: str | os.PathLike[str]) -> pathlib.Path:
  path = pathlib.Path(file)
  return path if path.suffix == ".safetensors" else path / NAME


def _check_name(model: str) -> None:
  if not re.fullmatch(r"\w+", model):
    raise ValueError(
      "model must be a name in a pipeline, such as 'unet' or 'transformer'; "
      f"got {model!r}."
    )


def _read(
  file: pathlib.Path,
) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
  """The tensors of a file, and the configurations in its header."""
  tensors, header = _files.read_tensors(file)
  try:
    configs = json.loads(header.get(_CONFIGS, "{}"))
  except ValueError as error:
    raise ValueError(f"{file}: {_CONFIGS} must be JSON: {error}.") from error
  if not isinstance(configs, dict):
    raise ValueError(
      f"{file}: {_CONFIGS} must be a JSON object; got {_files.shown(configs)}."
    )
  return tensors, configs


def _spelt(name: str) -> str:
  for pattern, spelling in _SPELLINGS:
    name = pattern.sub(spelling, name)
  return name


def _config(
  file: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  alphas: Mapping[str, float],
) -> str:
  """The text of PEFT's configuration, from the tensors alone."""
  sizes = {}
  for name, value in tensors.items():
    if name.endswith(_peft_folder.A):
      module, rank = name.removesuffix(_peft_folder.A), int(value.shape[0])
      sizes[module] = rank, alphas.get(module, float(rank))
  if unknown := [module for module in alphas if module not in sizes]:
    raise ValueError(f"{file} has alphas without a lora_A: {_listed(unknown)}.")
  config = _peft_config.of(
    sizes,
    modules_to_save=(),
    dora=any(name.endswith(_peft_folder.MAGNITUDE) for name in tensors),
  )
  return config.to_json("")


def _listed(names: list[str]) -> str:
  more = f", ... ({len(names)} in all)" if len(names) > _MOST else ""
  return ", ".join(names[:_MOST]) + more
