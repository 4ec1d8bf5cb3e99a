"""Adapters alone, on disk: one safetensors file and a small JSON beside it."""

from collections.abc import Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import reprlib
import stat
import sys
from typing import Any
import uuid
import warnings

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from bilora_jax._adapted import Adapted
from bilora_jax._factors import Factors, is_factors
from bilora_jax._spec import LoraSpec

_VERSION = 1
_MOST = sys.float_info.max
_TENSORS, _CONFIG = "adapters.safetensors", "adapters.json"
# How the base is stored, in any form of which adapters fit; and what is left
# out, which the paths of the adapters say.
_NOT_COMPARED = {"base_dtype", "tile_size", "exclude"}


def save_adapters(
  folder: str | os.PathLike[str],
  adapted: Adapted,
  adapters: Any,
) -> None:
  """Writes adapters and their spec, so that a reader never sees half of them.

  Args:
    folder: is created; gets `adapters.safetensors`, arrays named as
      `primary/layer/query/kernel/a`, and `adapters.json`, with the spec, the
      scale of each pair and the version of the format.
    adapted: the model that they are for.
    adapters: all of them, or `primary(adapters)`.

  Raises:
    ValueError: if the adapters are not of this model and spec, or some are no
      plain pairs.
    OSError: if a file cannot be written; earlier files are then untouched.
  """
  adapted.check(adapters)
  _check_kinds(adapters)
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


def _check_kinds(adapters: Mapping[str, Any]) -> None:
  others = [
    f"{path} is an {type(leaf).__name__}"
    for path, leaf in _flatten(adapters).items()
    if is_factors(leaf) and type(leaf) is not Factors
  ]
  if others:
    raise ValueError(
      "save_adapters writes pairs that are Factors, and would lose what else "
      f"these are: {', '.join(others)}. Save without_auxiliary(adapters), or "
      "all by flax.serialization or Orbax."
    )


def load_spec(folder: str | os.PathLike[str]) -> LoraSpec:
  """The spec that a folder's adapters were made with.

  Args:
    folder: with `adapters.safetensors` and `adapters.json`.

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
      be put on one of floats, and merged there. Its `exclude` may be another
      that leaves the same modules.

  Returns:
    The adapters, as NumPy arrays.

  Raises:
    ValueError: if a file is missing or damaged, the spec is another, or the
      arrays are no floats or do not fit the model; every mismatch is named.
  """
  folder = pathlib.Path(folder)
  config, arrays = _read(folder)
  spec = _spec(folder / _CONFIG, config)
  _require_floats(folder / _TENSORS, arrays)
  ours, theirs = map(dataclasses.asdict, (adapted.spec, spec))
  differences = [
    f"{name} is {theirs[name]!r} there and {ours[name]!r} here"
    for name in ours.keys() - _NOT_COMPARED
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
  try:
    adapters = traverse_util.unflatten_dict(tree, sep="/")
  except (TypeError, AttributeError) as error:
    raise ValueError(
      f"{folder / _TENSORS} has a name that is the beginning of another, and "
      "no model has both."
    ) from error
  try:
    adapted.check(adapters)
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from error
  return adapters


def _read(
  folder: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The configuration and the arrays in a folder."""
  folder = pathlib.Path(folder)
  config = _checked(str(folder / _CONFIG), read_json(folder / _CONFIG))
  path = folder / _TENSORS
  arrays, metadata = read_tensors(path)
  if "bilora_jax" not in metadata:
    raise ValueError(f"{path} was not written by save_adapters.")
  where = f"the header of {path}"
  header = _checked(where, _parse(metadata["bilora_jax"], where))
  if header != config:
    # Where a crash came between the two files' replacements, or someone edited
    # the JSON: the header cannot be of other arrays.
    warnings.warn(
      f"{folder / _CONFIG} is not the configuration that {path} was saved "
      "with; the latter counts.",
      stacklevel=3,
    )
  return header, arrays


def _checked(where: str, config: Any) -> dict[str, Any]:
  """A configuration of this version, with a spec and scales.

  Raises:
    ValueError: if it is another value.
  """
  version = config.get("version") if isinstance(config, dict) else None
  if version != _VERSION or not {"spec", "scales"} <= set(config):
    raise ValueError(
      f"{where} is no configuration of adapters of version {_VERSION}; its "
      f"version is {shown(version)}."
    )
  for name in ("spec", "scales"):
    if not isinstance(config[name], dict):
      raise ValueError(
        f"{where}: {name} is a JSON object; got {shown(config[name])}."
      )
  for path, scale in config["scales"].items():
    # The bound is also false of NaN.
    if type(scale) not in (int, float) or not 0 < scale <= _MOST:
      raise ValueError(
        f"{where}: scales has positive numbers; got {shown(scale)} of "
        f"{shown(path)}."
      )
  return config


def _require_floats(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray]
) -> None:
  others = [
    f"{name} is of {array.dtype}"
    for name, array in arrays.items()
    if not jnp.issubdtype(array.dtype, jnp.floating)
  ]
  if others:
    raise ValueError(
      f"{path} holds what no adapter is, which has floats: "
      f"{', '.join(others[:8])}."
    )


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
  try:
    return LoraSpec(**config["spec"])
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


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
  _require_file(path)
  try:
    with safetensors.safe_open(path, "np") as file:  # pyright: ignore
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
      return arrays, file.metadata() or {}
  # Of a dtype that NumPy has not, it is one of the last two.
  except (
    safetensors.SafetensorError,
    OSError,
    TypeError,
    AttributeError,
  ) as error:
    raise ValueError(
      f"{path} is not a whole safetensors file: {str(error)[:300]}."
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
  _require_file(path)
  try:
    content = path.read_bytes()
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
  return _parse(content, str(path))


def shown(value: Any) -> str:
  """A value for a sentence, which is short whatever the value is."""
  return reprlib.repr(value)


def _parse(content: str | bytes, where: str) -> Any:
  """The value of a JSON text; if bytes, in UTF-8.

  Raises:
    ValueError: if it is none, or has a key twice with two values.
  """
  try:
    text = content if isinstance(content, str) else content.decode("utf-8-sig")
    return json.loads(text, object_pairs_hook=_object)
  except RecursionError as error:
    raise ValueError(f"{where} is nested too deeply.") from error
  except ValueError as error:
    raise ValueError(f"{where} is not JSON: {error}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  for name, value in pairs:
    if found[name] != value:
      raise ValueError(f"the key {shown(name)} is there twice")
  return found


def _require_file(path: pathlib.Path) -> None:
  """Refuses what a reader would wait for, as a pipe, or cannot open.

  Raises:
    ValueError: if there is no regular file at the path.
  """
  try:
    mode = path.stat().st_mode
  except (FileNotFoundError, NotADirectoryError):
    raise ValueError(f"{path} is missing.") from None
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
  if not stat.S_ISREG(mode):
    raise ValueError(f"{path} is not a file, but a folder, a pipe or a device.")


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
