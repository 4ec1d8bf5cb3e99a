"""Reads the tensors and the sizes of a DINOv2 from an ONNX file."""

from collections.abc import Mapping
import math
import pathlib
import re
from typing import Any

from google.protobuf import message
import numpy as np
import onnx
from onnx import numpy_helper

from ..io import weights
from . import config as configs

_PARTS = ("embeddings", "encoder", "layernorm")
_CLS = "embeddings.cls_token"
_POSITIONS = "embeddings.position_embeddings"
_PATCH = "embeddings.patch_embeddings.projection"
_INNER = "encoder.layer.0.mlp.fc1.bias"
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")
# All sizes of DINOv2 have this width of a head, and no tensor shows it.
_HEAD_SIZE = 64


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the tensors of the DINOv2 in an ONNX file.

  PyTorch's exporter computes transposes of linear weights and slices of the
  positions, and loses the names of the results. The nodes that use these
  tensors show which they are. Tensors of other modules, such as a decoder, are
  left out.

  Args:
    path: a file that was exported from a module with a
      `transformers.Dinov2Model`, under any name.

  Returns:
    Arrays by their names in a `Dinov2Model`. Linear weights are (out, in), and
    the positions are (1, 1 + grid², D).

  Raises:
    WeightsError: the file is not an ONNX file, or has no DINOv2.
  """
  try:
    graph = onnx.load(path).graph
  except (
    message.DecodeError,
    onnx.checker.ValidationError,  # raised for data in separate files
    OSError,
  ) as error:
    raise weights.WeightsError(
      f"{path} is not a whole ONNX file ({weights.first_line(error)})."
    ) from error
  # For an invalid tensor, ONNX and NumPy raise many types.
  with weights.told_of(f"{path} has a tensor that cannot be read"):
    return _found(graph, path)


def _found(graph: onnx.GraphProto, path: pathlib.Path) -> dict[str, np.ndarray]:
  stored = {tensor.name: tensor for tensor in graph.initializer}
  prefixes = [x.removesuffix(_CLS) for x in stored if x.endswith(_CLS)]
  if len(prefixes) != 1:
    raise weights.WeightsError(
      f"{path} must hold one DINOv2, with a tensor whose name ends in {_CLS}; "
      f"it has {len(prefixes)}."
    )
  prefix = prefixes[0]
  parts = tuple(f"{prefix}{part}." for part in _PARTS)
  found = {
    name.removeprefix(prefix): _array(path, tensor)
    for name, tensor in stored.items()
    if name.startswith(parts)
  }
  positions = []
  for node in graph.node:
    module = node.name.rpartition("/")[0].strip("/").replace("/", ".") + "."
    if not module.startswith(parts):
      continue
    module = module.removeprefix(prefix)
    nameless = [
      _array(path, stored[name])
      for name in node.input
      if name in stored and not name.startswith(parts)
    ]
    if node.op_type == "MatMul":
      found |= {f"{module}weight": array.T for array in nameless}
    elif module == "embeddings.":
      positions += nameless
  if _POSITIONS not in found and {x.ndim for x in positions} == {3}:
    positions.sort(key=lambda x: x.shape[1])  # the class token's comes first
    if len({x.shape[2] for x in positions}) == 1:
      found[_POSITIONS] = np.concatenate(positions, 1)
  return found


def _array(path: pathlib.Path, tensor: onnx.TensorProto) -> np.ndarray:
  try:
    return numpy_helper.to_array(tensor)
  except (ValueError, TypeError, KeyError) as error:
    raise weights.WeightsError(
      f"{path} has a tensor, {tensor.name}, that cannot be read: {error}."
    ) from error


def config(tensors: Mapping[str, Any]) -> configs.VitConfig:
  """Returns a DINOv2's sizes, from the shapes of its tensors.

  Args:
    tensors: the tensors by Hugging Face's names, or their shapes.

  Raises:
    WeightsError: tensors are missing, or their shapes are impossible.
  """
  told = {f"{_PATCH}.weight": 4, _POSITIONS: 3, _INNER: 1}
  faults = [
    f"{name} is missing"
    if name not in tensors
    else f"{name} has shape {tensors[name].shape}"
    for name, ndim in told.items()
    if name not in tensors or len(tensors[name].shape) != ndim
  ]
  if faults:
    raise weights.WeightsError(
      f"The sizes of a DINOv2 cannot be told: {'; '.join(faults)}."
    )
  width, _, patch, _ = tensors[f"{_PATCH}.weight"].shape
  if width % _HEAD_SIZE:
    raise weights.WeightsError(
      f"DINOv2's heads are {_HEAD_SIZE} wide, and {_PATCH}.weight gives the "
      f"model a width of {width}, which is no multiple of it."
    )
  layers = {match[1] for match in map(_LAYER.match, tensors) if match}
  return configs.VitConfig(
    patch_size=patch,
    grid=math.isqrt(tensors[_POSITIONS].shape[1] - 1),
    hidden_size=width,
    num_layers=len(layers),
    num_heads=width // _HEAD_SIZE,
    intermediate_size=len(tensors[_INNER]),
  )


def hf_config(config: configs.VitConfig) -> dict[str, Any]:
  """Returns the config.json of a `Dinov2Model` of these sizes."""
  ratio = config.intermediate_size / config.hidden_size
  return {
    "model_type": "dinov2",
    "hidden_size": config.hidden_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    # transformers refuses a float here.
    "mlp_ratio": int(ratio) if ratio.is_integer() else ratio,
    "hidden_act": "gelu",
    "layer_norm_eps": config.layer_norm_eps,
    "image_size": config.patch_size * config.grid,
    "patch_size": config.patch_size,
    "num_channels": configs.CHANNELS,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "use_mask_token": False,
  }
