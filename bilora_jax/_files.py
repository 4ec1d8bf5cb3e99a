"""Adapters alone, on disk: one safetensors file and a small JSON beside it."""

from collections.abc import Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any
import uuid
import warnings

from flax import traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy

from bilora_jax._adapt import Adapted
from bilora_jax._factors import Factors, is_factors
from bilora_jax._spec import LoraSpec

_VERSION = 1
_TENSORS, _CONFIG = "adapters.safetensors", "adapters.json"
# How the base is stored. Adapters fit it in any form.
_BASE_FIELDS = {"base_dtype", "tile_size"}


def save_adapters(
  folder: str | os.PathLike[str],
  adapted: Adapted,
  adapters: Mapping[str, Any],
) -> None:
  """Writes adapters and their spec, so that a reader never sees half of them.

  Args:
    folder: is created; gets `adapters.safetensors`, arrays named as
      `primary/layer/query/kernel/a`, and `adapters.json`, with the spec, the
      scale of each pair and the version of the format.
    adapted: the model that they are for.
    adapters: all of them, or `primary(adapters)`.

  Raises:
    ValueError: if the adapters are not of this model and spec.
    OSError: if a file cannot be written; earlier files are then untouched.
  """
  adapted.check(adapters)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  arrays, scales = {}, {}
  for path, leaf in _flatten(adapters).items():
    if is_factors(leaf):
      scales[path] = leaf.scale
      arrays[f"{path}/a"], arrays[f"{path}/b"] = leaf.a, leaf.b
    else:
      arrays[path] = leaf
  config = {
    "format": "bilora_jax adapters",
    "version": _VERSION,
    "spec": dataclasses.asdict(adapted.spec),
    "scales": scales,
  }
  # In the order of the spec: of its targets, the first that matches counts.
  text = json.dumps(config, indent=2)
  # The configuration also travels in the tensors' header: the two are one file
  # to a reader, whichever of them was replaced last.
  blob = safetensors.numpy.save(
    {k: np.ascontiguousarray(v) for k, v in jax.device_get(arrays).items()},
    metadata={"bilora_jax": text},
  )
  write_all({folder / _TENSORS: blob, folder / _CONFIG: text.encode() + b"\n"})


def load_spec(folder: str | os.PathLike[str]) -> LoraSpec:
  """The spec that a folder's adapters were made with.

  Raises:
    ValueError: if a file is missing, is not of this format, or too new.
  """
  return _spec(pathlib.Path(folder) / _CONFIG, _read(folder)[0])


def load_adapters(
  folder: str | os.PathLike[str], adapted: Adapted
) -> dict[str, Any]:
  """Reads adapters that `save_adapters` wrote.

  Args:
    folder: with `adapters.safetensors` and `adapters.json`.
    adapted: the model they are for, with a spec equal to the saved one, except
      for `base_dtype` and `tile_size`: adapters trained on a quantised base can
      be put on one of floats, and merged there.

  Returns:
    The adapters, as NumPy arrays.

  Raises:
    ValueError: if a file is missing or damaged, the spec is another, or the
      arrays do not fit the model; every mismatch is named.
  """
  folder = pathlib.Path(folder)
  config, arrays = _read(folder)
  spec = _spec(folder / _CONFIG, config)
  ours, theirs = map(dataclasses.asdict, (adapted.spec, spec))
  differences = [
    f"{name} is {theirs[name]!r} there and {ours[name]!r} here"
    for name in ours.keys() - _BASE_FIELDS
    if ours[name] != theirs[name]
  ]
  if differences:
    raise ValueError(
      f"the adapters in {folder} were made with another spec: "
      f"{'; '.join(sorted(differences))}."
    )
  tree: dict[str, Any] = {}
  for name, scale in config["scales"].items():
    ends = (f"{name}/a", f"{name}/b")
    lost = [end for end in ends if end not in arrays]
    if lost:
      raise ValueError(f"{folder / _TENSORS} lacks {', '.join(lost)}.")
    a, b = map(arrays.pop, ends)
    tree[name] = Factors(a, b, scale)
  tree |= arrays
  adapters = traverse_util.unflatten_dict(tree, sep="/")
  adapted.check(adapters)
  return adapters


def _read(
  folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The configuration and the arrays in a folder."""
  folder = pathlib.Path(folder)
  config = _config(folder / _CONFIG)
  path = folder / _TENSORS
  arrays, metadata = read_tensors(path)
  header = json.loads(metadata.get("bilora_jax", "null"))
  if header is None:
    raise ValueError(f"{path} was not written by save_adapters.")
  if header != config:
    # Where a crash came between the two files' replacements, or someone edited
    # the JSON: the header cannot be of other arrays.
    warnings.warn(
      f"{folder / _CONFIG} is not the configuration that {path} was saved "
      "with; the latter counts.",
      stacklevel=3,
    )
  return header, arrays


def _config(path: pathlib.Path) -> dict[str, Any]:
  config = read_json(path)
  version = config.get("version") if isinstance(config, dict) else None
  if version != _VERSION or not {"spec", "scales"} <= set(config):
    raise ValueError(
      f"{path} is no configuration of adapters of version {_VERSION}; its "
      f"version is {version!r}."
    )
  return config


def _spec(path: pathlib.Path, config: dict[str, Any]) -> LoraSpec:
  unknown = config["spec"].keys() - {
    field.name for field in dataclasses.fields(LoraSpec)
  }
  if unknown:
    raise ValueError(
      f"{path} has another spec than this version knows: it differs in "
      f"{sorted(unknown)}."
    )
  # A file has all fields of its time: what it lacks is newer, and at its
  # default, which is what there was before.
  return LoraSpec(**config["spec"])


def _flatten(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(
    tree, sep="/", is_leaf=lambda _, x: is_factors(x)
  )


def read_tensors(
  path: pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """The arrays of a safetensors file, and the strings of its header.

  Raises:
    ValueError: if it is missing or damaged.
  """
  try:
    with safetensors.safe_open(path, "np") as file:  # pyright: ignore
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
      return arrays, file.metadata() or {}
  except FileNotFoundError:
    raise ValueError(f"{path} is missing.") from None
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} is not a whole safetensors file: {error}."
    ) from error


def require_finite(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray]
) -> None:
  """Refuses arrays with NaN or infinity in them.

  Raises:
    ValueError: that names those arrays.
  """
  faults = [name for name, x in arrays.items() if not np.isfinite(x).all()]
  if faults:
    more = f", ... ({len(faults)} in all)" if len(faults) > 8 else ""
    raise ValueError(
      f"{path} has values that are not finite in {', '.join(faults[:8])}{more}."
    )


def read_json(path: pathlib.Path) -> Any:
  """What is in a JSON file.

  Raises:
    ValueError: if it is missing or damaged.
  """
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise ValueError(f"{path} is missing.") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is not JSON: {error}.") from error


def write_all(contents: Mapping[pathlib.Path, bytes]) -> None:
  """Replaces files by what is safely on the disk already."""
  # Not of `tempfile`, whose files nobody else may read.
  names = {path: path.with_name(f".{uuid.uuid4().hex}") for path in contents}
  try:
    for path, content in contents.items():
      with open(names[path], "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    for path, name in names.items():
      os.replace(name, path)
  except BaseException:
    for name in names.values():
      with contextlib.suppress(OSError):
        os.unlink(name)
    raise
