"""Reads or refuses folders of weights that other programs have quantised.

Two kinds can be read: NF4 of bitsandbytes (Dettmers et al., arXiv 2305.14314),
and fp8 with one scale for each block, as in DeepSeek V3 and Qwen 3. Their
values are exact in the dtype that the model had before. A weight is dequantised
when it is read; `--base-dtype nf4` or `fp8` quantises it again.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import math
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from ... import options
from . import tensors as tensors_
from . import weights

# The format of quantised weights -> the names of its tensors.
_ENDS = {
  "bitsandbytes": re.compile(
    r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB"
    r"|quant_state(\..*)?)"
  ),
  "GPTQ": re.compile(r".*\.g_idx"),
  "AWQ or its like": re.compile(r".*\.(qweight|qzeros)"),
  "fp8 in blocks": re.compile(r".*\.weight_scale_inv"),
}
_STATE = ".quant_state.bitsandbytes__nf4"
_SCALE = "_scale_inv"
_BLOCK = (128, 128)  # if the config.json names no size

Dequantise = Callable[
  [pathlib.Path, Mapping[str, tensors_.Tensor]], dict[str, tensors_.Tensor]
]


def reader(folder: pathlib.Path, config: Mapping[str, Any]) -> Dequantise:
  """Returns a function that dequantises the tensors of a folder.

  Args:
    folder: the model's folder.
    config: the decoded JSON object of config.json.

  Returns:
    A function from the folder and its tensors to tensors of floats.

  Raises:
    WeightsError: if the kind of `quantization_config` cannot be read.
  """
  found = config.get("quantization_config")
  if not found:
    return _plain
  if not isinstance(found, Mapping):
    found = {}
  # Old files have no `quant_method`, because bitsandbytes was the only one.
  method = found.get("quant_method") or "bitsandbytes"
  if method == "bitsandbytes" and found.get("load_in_4bit"):
    if found.get("bnb_4bit_quant_type") == "nf4":
      return _nf4
    method = "bitsandbytes to fp4"
  if method == "fp8" and found.get("activation_scheme") != "static":
    sizes = found.get("weight_block_size", list(_BLOCK))
    if (
      options.fits(sizes, list)
      and len(sizes) == 2
      and all(options.fits(x, int) and x > 0 for x in sizes)
    ):
      return _Blocks(*sizes)
    method = "fp8 without blocks"
  _refuse(folder, method, "its config.json: quantization_config")
  raise AssertionError


def _plain(
  folder: pathlib.Path, tensors: Mapping[str, tensors_.Tensor]
) -> dict[str, tensors_.Tensor]:
  """Returns the tensors unchanged.

  Raises:
    WeightsError: if some names belong to quantised weights.
  """
  for method, ends in _ENDS.items():
    found = [name for name in tensors if ends.fullmatch(name)]
    if found:
      _refuse(folder, method, f"tensors: {weights.listed(found, ', ', 3)}")
  return dict(tensors)


def _nf4(
  folder: pathlib.Path, tensors: Mapping[str, tensors_.Tensor]
) -> dict[str, tensors_.Tensor]:
  """Dequantises the weights that have a quantisation state.

  Raises:
    WeightsError: if a state is not in the form of bitsandbytes.
  """
  rest = dict(tensors)
  found: dict[str, tensors_.Tensor] = {}
  for state in [name for name in tensors if name.endswith(_STATE)]:
    name = state.removesuffix(_STATE)
    parts: dict[str, Any] = {
      end: rest.pop(f"{name}.{end}")
      for end in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
      if f"{name}.{end}" in rest
    }
    parts["packed"] = rest.pop(name, None)
    found[name] = _nf4_tensor(f"{folder}: {state}", rest.pop(state), parts)
  return found | _plain(folder, rest)


@dataclasses.dataclass(frozen=True)
class _Nf4:
  """A matrix of four bits for each weight, in blocks, row after row.

  Attributes:
    shape: (out, in).
    dtype: the dtype of the values.
    packed: two weights in each byte, the first one in the upper half, uint8
      (N/2, 1).
    levels: the sixteen values, float32.
    absmax: the largest magnitude of each block, float32.
    block: the number of weights in a block.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  packed: tensors_.Tensor
  levels: np.ndarray
  absmax: np.ndarray
  block: int

  def __getitem__(self, index: tuple[slice, ...], /) -> np.ndarray:
    rows, *rest = index
    first, last, _ = rows.indices(self.shape[0])
    width = math.prod(self.shape[1:])
    start, stop = first * width, last * width
    bytes_ = self.packed[slice(start // 2, -(-stop // 2)), slice(None)].ravel()
    codes = np.stack([bytes_ >> 4, bytes_ & 15], -1).ravel()
    codes = codes[start % 2 :][: stop - start]
    blocks = slice(start // self.block, -(-stop // self.block))
    scales = self.absmax[blocks].repeat(self.block)[start % self.block :]
    scales = scales[: stop - start]
    values = (self.levels[codes] * scales).astype(self.dtype)
    whole = values.reshape(last - first, *self.shape[1:])
    return whole[(slice(None), *rest)]


def _nf4_tensor(
  where: str, state: tensors_.Tensor, parts: dict[str, Any]
) -> _Nf4:
  try:
    own = json.loads(state[(slice(None),)].tobytes())
    read = {
      name: parts[name][(slice(None),)] for name in parts if name != "packed"
    }
    absmax = read["absmax"]
    if "nested_absmax" in read:
      # Double quantisation: the blocks' scales have 8 bits themselves.
      block = np.arange(absmax.size) // own["nested_blocksize"]
      absmax = read["nested_quant_map"][absmax] * read["nested_absmax"][block]
      absmax += np.float32(own["nested_offset"])
    count = math.prod(own["shape"])
    found = _Nf4(
      tuple(own["shape"]),
      np.dtype(jnp.dtype(own["dtype"])),
      parts["packed"],
      read["quant_map"],
      absmax.astype(np.float32, copy=False),
      own["blocksize"],
    )
    fits = (
      tuple(found.packed.shape) == (-(-count // 2), 1)
      and found.absmax.shape == (-(-count // found.block),)
      and found.levels.shape == (16,)
    )
  except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
    raise weights.WeightsError(
      f"{where} is not as bitsandbytes writes it "
      f"({type(error).__name__}: {weights.first_line(error)})."
    ) from error
  if not fits:
    raise weights.WeightsError(
      f"{where} is not as bitsandbytes writes it: the arrays beside it are not "
      f"of a weight of {found.shape} in blocks of {found.block}."
    )
  return found


@dataclasses.dataclass(frozen=True)
class _Blocks:
  """Dequantises fp8 matrices that have a scale for each block.

  Attributes:
    rows: the rows of a block of an (out, in) matrix.
    columns: the columns of a block.
  """

  rows: int
  columns: int

  def __call__(
    self, folder: pathlib.Path, tensors: Mapping[str, tensors_.Tensor]
  ) -> dict[str, tensors_.Tensor]:
    """Dequantises the tensors that have scales, and returns all tensors.

    Raises:
      WeightsError: if the number of scales differs from the number of blocks.
    """
    rest = dict(tensors)
    found: dict[str, tensors_.Tensor] = {}
    for name in [x for x in tensors if x + _SCALE in tensors]:
      scales, codes = rest.pop(name + _SCALE), rest.pop(name)
      wanted = tuple(
        -(-size // block)
        for size, block in zip(codes.shape, (self.rows, self.columns))
      )
      if len(codes.shape) != 2 or tuple(scales.shape) != wanted:
        raise weights.WeightsError(
          f"{folder}: {name}{_SCALE} has shape {tuple(scales.shape)}, and a "
          f"weight of {tuple(codes.shape)} in blocks of {self.rows} x "
          f"{self.columns} has scales of {wanted}."
        )
      found[name] = _Fp8(codes, scales[:, :], self)
    return found | _plain(folder, rest)


@dataclasses.dataclass(frozen=True)
class _Fp8:
  """An fp8 matrix, (out, in), with its scales, one for each block."""

  codes: tensors_.Tensor
  scales: np.ndarray
  blocks: _Blocks

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape

  @property
  def dtype(self) -> np.dtype:
    # transformers also uses the dtype of the scales.
    return self.scales.dtype

  def __getitem__(self, index: tuple[slice, ...], /) -> np.ndarray:
    rows, columns = (
      np.arange(size)[part] for part, size in zip(index, self.shape)
    )
    scales = self.scales[
      np.ix_(rows // self.blocks.rows, columns // self.blocks.columns)
    ]
    values = self.codes[index].astype(np.float32) * scales.astype(np.float32)
    return values.astype(self.dtype)


def _refuse(folder: pathlib.Path, method: str, sign: str) -> None:
  raise weights.WeightsError(
    f"{folder} is a folder that holds weights quantised by {method} ({sign}), "
    "which cannot be read here. Give the model without quantisation: "
    "--base-dtype nf4, int8 or fp8 quantises it when it is read."
  )
