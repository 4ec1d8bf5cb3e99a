"""A checkpoint's tensors by name, which are read when they are indexed."""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
import safetensors

from ... import checked
from . import weights

# The format's names of one-byte dtypes -> those that ml_dtypes adds to NumPy.
_BYTES = {
  "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
  "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
}


class Tensor(Protocol):
  """An array in a file."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> np.dtype: ...

  def __getitem__(self, index: tuple[slice, ...], /) -> np.ndarray:
    """Reads a part; the index has a slice of step 1 for each axis."""
    ...


def open_safetensors(folder: pathlib.Path) -> Mapping[str, Tensor]:
  """Returns the tensors of a model folder, by the names in its files.

  This reads the headers of model.safetensors, or else of the shards in
  model.safetensors.index.json. Values are read from a file when they are
  indexed, in the dtype on disk (bfloat16 is that of ml_dtypes). Nothing is
  unpickled, so a folder with only pytorch_model.bin is refused.

  Raises:
    WeightsError: the file or a shard is missing, empty, cut short or damaged; a
      shard lacks a tensor that the index lists; or two shards have one tensor.
  """
  folder = pathlib.Path(folder)
  single = folder / "model.safetensors"
  index = folder / "model.safetensors.index.json"
  if checked.is_file(single):
    return _open_file(single)
  if checked.is_file(index):
    return _open_shards(index)
  pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
  if pickled:
    raise weights.WeightsError(
      f"{folder} holds only {pickled[0]}, a pickle, which can run code when it "
      "is read; convert it to model.safetensors first."
    )
  raise weights.WeightsError(
    f"{folder} has neither model.safetensors nor model.safetensors.index.json."
  )


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files that `open_safetensors` reads.

  Raises:
    WeightsError: the index is invalid.
  """
  single = folder / "model.safetensors"
  index = folder / "model.safetensors.index.json"
  if single.is_file() or not index.is_file():
    return [single]
  return [
    index,
    *(folder / shard for shard in sorted({*_weight_map(index).values()})),
  ]


def read_all(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
  """Reads all tensors, each whole."""
  return {
    name: tensor[(slice(None),) * len(tensor.shape)]
    for name, tensor in tensors.items()
  }


@dataclasses.dataclass(frozen=True)
class _Stored:
  """A tensor of a safetensors file, which the library keeps open."""

  part: Any  # the slice object of safetensors

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.part.get_shape())

  @property
  def dtype(self) -> np.dtype:
    try:
      return self[(slice(0, 0),) * len(self.shape)].dtype
    except (AttributeError, TypeError, safetensors.SafetensorError) as error:
      # The message is the file's name of the dtype, which NumPy lacks.
      raise weights.WeightsError(self.part.get_dtype()) from error

  def __getitem__(self, index: tuple[slice, ...], /) -> np.ndarray:
    return self.part[index]


def _open_file(path: pathlib.Path) -> dict[str, Tensor]:
  if not path.stat().st_size:
    raise weights.WeightsError(f"{path} is empty (0 bytes); copy it again.")
  try:
    file = safetensors.safe_open(path, framework="np")
    parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    bytes_ = {
      name: dtype
      for name, part in parts.items()
      if (dtype := _BYTES.get(part.get_dtype()))
    }
    return {
      **{name: _Stored(part) for name, part in parts.items()},
      **(_mapped(path, bytes_) if bytes_ else {}),
    }
  except (safetensors.SafetensorError, OSError) as error:
    raise weights.WeightsError(
      f"{path} is not a whole safetensors file ({weights.first_line(error)}); "
      f"it may have been cut short at its {path.stat().st_size} bytes, or be "
      "another kind of file."
    ) from error


def _mapped(
  path: pathlib.Path, dtypes: Mapping[str, np.dtype]
) -> dict[str, Tensor]:
  """Returns tensors of dtypes that the library cannot convert to NumPy."""
  # The format: the header's length in eight bytes, a JSON header, the values.
  data = np.memmap(path, np.uint8, "r")
  start = 8 + int(data[:8].view("<u8")[0])
  header = json.loads(data[8:start].tobytes())
  found = {}
  for name, dtype in dtypes.items():
    first, last = header[name]["data_offsets"]
    values = data[start + first : start + last].view(dtype)
    found[name] = values.reshape(header[name]["shape"])
  return found


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  shards = weights.read_json(index).get("weight_map")
  if not isinstance(shards, dict) or not all(
    isinstance(shard, str) and pathlib.PurePath(shard).name == shard
    for shard in shards.values()
  ):
    raise weights.WeightsError(
      f"{index} must have a weight_map from tensor names to file names in the "
      "same folder."
    )
  return shards


def _open_shards(index: pathlib.Path) -> dict[str, Tensor]:
  shards = _weight_map(index)
  tensors: dict[str, Tensor] = {}
  for shard in sorted(set(shards.values())):
    path = index.parent / shard
    if not checked.is_file(path):
      raise weights.WeightsError(
        f"{index.parent} lacks the shard {shard} that {index.name} lists."
      )
    found = _open_file(path)
    twice = [name for name in found if shards.get(name, shard) != shard]
    twice += [name for name in found if name in tensors and name not in twice]
    if twice:
      raise weights.WeightsError(
        f"{path} holds tensors that are another shard's, too, or by "
        f"{index.name}: {weights.listed(twice, ', ')}."
      )
    tensors |= found
  missing = sorted(shards.keys() - tensors.keys())
  if missing:
    raise weights.WeightsError(
      f"{index} lists tensors that its shards do not hold: "
      f"{weights.listed(missing, ', ')}."
    )
  return tensors
