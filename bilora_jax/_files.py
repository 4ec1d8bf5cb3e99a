"""Adapters on disk, without the base: one safetensors file and a small JSON."""

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
# Adapters fit any stored form of the base, and their paths show which modules
# were excluded.
_NOT_COMPARED = {"base_dtype", "tile_size", "exclude"}


def save_adapters(
  folder: str | os.PathLike[str],
  adapted: Adapted,
  adapters: Any,
) -> None:
  """Writes adapters and their spec; a reader never sees a part of them.

  Args:
    folder: where to write, created if it is missing: `adapters.safetensors`,
      with arrays named like `primary/layer/query/kernel/a`, and
      `adapters.json`, with the spec, the scale of each pair and the version of
      the format.
    adapted: the model of the adapters.
    adapters: all adapters, or `primary(adapters)`.

  Raises:
    ValueError: if the adapters do not fit this model and spec, or some adapters
      are not plain pairs.
    OSError: if a file cannot be written; earlier files are then unchanged.
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
  # In the order of the spec: the first of its targets that matches counts.
  text = json.dumps(config, indent=2)
  # The header of the tensors has the configuration too: tensors and
  # configuration then always fit, whichever file was replaced last.
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
      "save_adapters writes only adapters of the class Factors, and would lose "
      f"the class of these: {', '.join(others)}. Save "
      "without_auxiliary(adapters), or save all with flax.serialization or "
      "Orbax."
    )


def load_spec(folder: str | os.PathLike[str]) -> LoraSpec:
  """Reads the spec with which a folder's adapters were made.

  Args:
    folder: a folder with `adapters.safetensors` and `adapters.json`.

  Raises:
    ValueError: if a file is missing, or has another format or a newer version.
  """
  return _spec(pathlib.Path(folder) / _CONFIG, _read(folder)[0])


def load_adapters(
  folder: str | os.PathLike[str], adapted: Adapted
) -> dict[str, Any]:
  """Reads adapters that `save_adapters` wrote.

  Args:
    folder: a folder with `adapters.safetensors` and `adapters.json`.
    adapted: the model of the adapters. Its spec must equal the saved spec,
      except for `base_dtype` and `tile_size`: adapters trained on a quantised
      base can be merged into a base of floats. `exclude` may differ if it
      leaves the same modules.

  Returns:
    The adapters, as NumPy arrays.

  Raises:
    ValueError: if a file is missing or damaged, the spec differs, or the arrays
      are not floats or do not fit the model; the message names every mismatch.
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
      f"{folder / _TENSORS} has an array whose name is also the path of other "
      "arrays, which no model has."
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
    # A crash came between the replacements of the two files, or someone edited
    # the JSON. The header always belongs to the arrays.
    warnings.warn(
      f"{folder / _CONFIG} is not the configuration that {path} was saved "
      "with; the latter counts.",
      stacklevel=3,
    )
  return header, arrays


def _checked(where: str, config: Any) -> dict[str, Any]:
  """Returns a configuration if it has this version, a spec and scales.

  Raises:
    ValueError: if it has not.
  """
  version = config.get("version") if isinstance(config, dict) else None
  if version != _VERSION or not {"spec", "scales"} <= set(config):
    raise ValueError(
      f"{where} is not a configuration of adapters of version {_VERSION}; its "
      f"version is {shown(version)}."
    )
  for name in ("spec", "scales"):
    if not isinstance(config[name], dict):
      raise ValueError(
        f"{where}: {name} is a JSON object; got {shown(config[name])}."
      )
  for path, scale in config["scales"].items():
    # The comparison is also false for NaN.
    if type(scale) not in (int, float) or not 0 < scale <= _MOST:
      raise ValueError(
        f"{where}: scales has positive numbers; got {shown(scale)} for "
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
      f"{path} holds arrays that are not floats, as adapters are: "
      f"{', '.join(others[:8])}."
    )


def _spec(path: pathlib.Path, config: dict[str, Any]) -> LoraSpec:
  unknown = config["spec"].keys() - {
    field.name for field in dataclasses.fields(LoraSpec)
  }
  if unknown:
    raise ValueError(
      f"{path} has a spec with fields that this version does not have: "
      f"{sorted(unknown)}."
    )
  # A file has all fields of its version. Newer fields get their defaults, which
  # are the behaviour before them.
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
    ValueError: if the file is missing or damaged.
  """
  _require_file(path)
  try:
    with safetensors.safe_open(path, "np") as file:  # pyright: ignore
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
      return arrays, file.metadata() or {}
  # A dtype that NumPy lacks raises one of the last two.
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
  """Refuses arrays that contain NaN or infinity.

  Raises:
    ValueError: if there are any; the message names them.
  """
  faults = [name for name, x in arrays.items() if not np.isfinite(x).all()]
  if faults:
    more = f", ... ({len(faults)} in all)" if len(faults) > 8 else ""
    raise ValueError(
      f"{path} has values that are not finite in {', '.join(faults[:8])}{more}."
    )


def read_json(path: pathlib.Path) -> Any:
  """The content of a JSON file.

  Raises:
    ValueError: if the file is missing or damaged.
  """
  _require_file(path)
  try:
    content = path.read_bytes()
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
  return _parse(content, str(path))


def shown(value: Any) -> str:
  """A short form of any value, for a sentence."""
  return reprlib.repr(value)


def _parse(content: str | bytes, where: str) -> Any:
  """The value of a JSON text; bytes are UTF-8.

  Raises:
    ValueError: if the text is not JSON, or a key has two different values.
  """
  try:
    text = content if isinstance(content, str) else content.decode("utf-8-sig")
    return json.loads(text, object_pairs_hook=_object)
  except RecursionError as error:
    raise ValueError(f"{where} is nested too deeply.") from error
  except ValueError as error:
    raise ValueError(f"{where} is not JSON: {error}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  merged = dict(pairs)
  for name, value in pairs:
    if merged[name] != value:
      raise ValueError(f"the key {shown(name)} is there twice")
  return merged


def _require_file(path: pathlib.Path) -> None:
  """Refuses a path that cannot be opened, or where a reader waits, as a pipe.

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
  """Writes files completely to the disk, and then replaces the old files."""
  # Not with `tempfile`, whose files no other user may read.
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
