"""A DINOv2 out of an ONNX file as the parameters of `vit.Vit`."""

from collections.abc import Mapping
import math
import pathlib
import re
from typing import Any

from flax import traverse_util
from google.protobuf import message
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import numpy_helper

from bilora_jax import peft

from ..io import weights
from . import model as vit

# Hugging Face's module within a layer -> ours.
_DENSES = {
  "attention.attention.query": "query",
  "attention.attention.key": "key",
  "attention.attention.value": "value",
  "attention.output.dense": "attention_out",
  "mlp.fc1": "intermediate",
  "mlp.fc2": "output",
}
# The same in a checkpoint -> in the modules of transformers since 5.
_RENAMED = {
  "attention.attention.query": "attention.q_proj",
  "attention.attention.key": "attention.k_proj",
  "attention.attention.value": "attention.v_proj",
  "attention.output.dense": "attention.o_proj",
}
_NORMS = {"norm1": "attention_norm", "norm2": "output_norm"}
_SCALES = {
  "layer_scale1.lambda1": "attention_scale",
  "layer_scale2.lambda1": "output_scale",
}
_PARTS = ("embeddings", "encoder", "layernorm")
_CLS = "embeddings.cls_token"
_POSITIONS = "embeddings.position_embeddings"
_PATCH = "embeddings.patch_embeddings.projection"
_INNER = "encoder.layer.0.mlp.fc1.bias"
# What stands for a patch that is hidden in pre-training.
_UNUSED = "embeddings.mask_token"
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")
# In every size of DINOv2; no tensor says it.
_HEAD_SIZE = 64


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of the DINOv2 in an ONNX file, by Hugging Face's names.

  PyTorch's exporter folds the transposes of linear weights and slices of the
  positions, and so loses their names: they are known by the node that uses
  them. Tensors of other modules, as a decoder's on top, are left out.

  Args:
    path: of a file that was exported from a module with a
      `transformers.Dinov2Model` in it, which may have any name there.

  Returns:
    Arrays by the names that they have in a `Dinov2Model`; a linear weight is
    (out, in), the positions (1, 1 + grid², D).

  Raises:
    WeightsError: the file is no ONNX file, or there is no DINOv2 in it.
  """
  try:
    graph = onnx.load(path).graph
  except (
    message.DecodeError,
    onnx.checker.ValidationError,  # of data in files beside it
    OSError,
  ) as error:
    raise weights.WeightsError(
      f"{path} is not a whole ONNX file ({weights.first_line(error)})."
    ) from error
  # Of a tensor that is not as it says, ONNX and NumPy raise many types.
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
    positions.sort(key=lambda x: x.shape[1])  # that of the class token first
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


def config(tensors: Mapping[str, Any]) -> vit.VitConfig:
  """The sizes that a DINOv2's tensors have.

  Args:
    tensors: by Hugging Face's names; shapes are enough.

  Raises:
    WeightsError: those that tell them are missing, or tell what cannot be.
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
  return vit.VitConfig(
    patch_size=patch,
    grid=math.isqrt(tensors[_POSITIONS].shape[1] - 1),
    hidden_size=width,
    num_layers=len(layers),
    num_heads=width // _HEAD_SIZE,
    intermediate_size=len(tensors[_INNER]),
  )


def hf_config(config: vit.VitConfig) -> dict[str, Any]:
  """The config.json of a `Dinov2Model` of these sizes."""
  ratio = config.intermediate_size / config.hidden_size
  return {
    "model_type": "dinov2",
    "hidden_size": config.hidden_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    # transformers takes no float for it.
    "mlp_ratio": int(ratio) if ratio.is_integer() else ratio,
    "hidden_act": "gelu",
    "layer_norm_eps": config.layer_norm_eps,
    "image_size": config.patch_size * config.grid,
    "patch_size": config.patch_size,
    "num_channels": vit.CHANNELS,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "use_mask_token": False,
  }


def vit_params(
  config: vit.VitConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Parameters of `vit.Vit` from a DINOv2's tensors.

  Args:
    config: the sizes.
    tensors: arrays by Hugging Face's names, as `read` gives them.

  Returns:
    A tree of float32 arrays on the host; a Dense kernel is (in, out).

  Raises:
    WeightsError: tensors are missing, of another shape than the configuration
      says, no floats, or unknown to it; the first are named together.
  """
  check(config, tensors)
  flat: dict[tuple[str, ...], np.ndarray] = {}
  for name, (path, _) in _plan(config).items():
    value = np.asarray(tensors[name], np.float32)
    if name == _POSITIONS:
      flat["embeddings", "cls_position"] = value[0, 0]
      value = value[0, 1:].reshape(config.grid, config.grid, -1)
    elif name == _CLS:
      value = value.reshape(-1)
    elif name == f"{_PATCH}.weight":
      # (D, C, P, P): pixels of a patch come row by row, channels last.
      value = value.transpose(2, 3, 1, 0).reshape(-1, config.hidden_size)
    elif path[-1] == "kernel":
      value = value.T
    flat[path] = value
  return traverse_util.unflatten_dict(flat)


def check(config: vit.VitConfig, tensors: Mapping[str, Any]) -> None:
  """Refuses tensors that `vit_params` cannot read.

  Raises:
    WeightsError: as `vit_params`.
  """
  plan = _plan(config)
  faults = [f"{name} is missing" for name in plan if name not in tensors]
  faults += [
    f"{name} has shape {tensors[name].shape}, expected {shape}"
    for name, (_, shape) in plan.items()
    if name in tensors and tensors[name].shape != shape
  ]
  faults += [
    f"{name} is of {tensors[name].dtype}, and weights are floats"
    for name in plan
    if name in tensors and not jnp.issubdtype(tensors[name].dtype, jnp.floating)
  ]
  faults += [
    f"{name} has no place in it"
    for name in tensors
    if name not in plan and name != _UNUSED
  ]
  if faults:
    raise weights.WeightsError(
      "The tensors do not fit the ViT's configuration: "
      f"{weights.listed(faults)}."
    )


def vit_tensors(
  config: vit.VitConfig, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Undoes `vit_params`: tensors by the names that they have in a Dinov2Model.

  Args:
    config: the sizes.
    params: of `vit.Vit`.

  Returns:
    Arrays on the host, in the dtype of the parameters.
  """
  flat = {
    path: np.asarray(value)
    for path, value in traverse_util.flatten_dict(dict(params)).items()
  }
  found = {}
  for name, (path, shape) in _plan(config).items():
    value = flat[path]
    if name == _POSITIONS:
      first = flat["embeddings", "cls_position"].reshape(1, -1)
      rest = value.reshape(-1, config.hidden_size)
      value = np.concatenate([first, rest])[None]
    elif name == f"{_PATCH}.weight":
      side = config.patch_size
      value = value.reshape(side, side, vit.CHANNELS, -1).transpose(3, 2, 0, 1)
    elif path[-1] == "kernel":
      value = value.T
    found[name] = value.reshape(shape)
  return found


def modules(config: vit.VitConfig) -> dict[str, str | peft.Convolution]:
  """The path of each kernel, and its module in a Dinov2Model.

  Those of transformers 5, which has other names for some modules than their
  weights have in its checkpoints.
  """
  side = config.patch_size
  found: dict[str, str | peft.Convolution] = {}
  for name, (path, _) in _plan(config).items():
    if path[-1] == "kernel":
      module = name.removesuffix(".weight")
      for old, new in _RENAMED.items():
        if module.endswith(f".{old}"):
          module = module.removesuffix(old) + new
      is_patch = module == _PATCH
      found["/".join(path)] = (
        peft.Convolution(module, side, side) if is_patch else module
      )
  return found


def _plan(
  config: vit.VitConfig,
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
  """Tensor name -> path in the parameter tree, and the tensor's shape."""
  width, inner = config.hidden_size, config.intermediate_size
  side = config.patch_size
  plan: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    _CLS: (("embeddings", "cls"), (1, 1, width)),
    _POSITIONS: (("embeddings", "position"), (1, 1 + config.grid**2, width)),
    f"{_PATCH}.weight": (
      ("embeddings", "patch", "kernel"),
      (width, vit.CHANNELS, side, side),
    ),
    f"{_PATCH}.bias": (("embeddings", "patch", "bias"), (width,)),
  }

  def norm(source: str, *path: str) -> None:
    plan[f"{source}.weight"] = ((*path, "scale"), (width,))
    plan[f"{source}.bias"] = ((*path, "bias"), (width,))

  norm("layernorm", "norm")
  for i in range(config.num_layers):
    source, layer = f"encoder.layer.{i}", f"layer_{i}"
    for theirs, ours in _DENSES.items():
      out = inner if ours == "intermediate" else width
      into = inner if ours == "output" else width
      plan[f"{source}.{theirs}.weight"] = ((layer, ours, "kernel"), (out, into))
      plan[f"{source}.{theirs}.bias"] = ((layer, ours, "bias"), (out,))
    for theirs, ours in _NORMS.items():
      norm(f"{source}.{theirs}", layer, ours)
    for theirs, ours in _SCALES.items():
      plan[f"{source}.{theirs}"] = ((layer, ours), (width,))
  return plan
