"""A tiny DINOv2 in an ONNX file, named as PyTorch's exporter names it."""

import pathlib

import numpy as np
import onnx
from onnx import helper, numpy_helper

from train.models.vit import model as vit

# DINOv2's heads are 64 wide.
CONFIG = vit.VitConfig(
  patch_size=14,
  grid=5,
  hidden_size=128,
  num_layers=1,
  num_heads=2,
  intermediate_size=24,
)


def tensors(prefix: str = "") -> dict[str, np.ndarray]:
  """A drawn `Dinov2Model` by Hugging Face's names; a weight is (out, in)."""
  c, draws = CONFIG, np.random.default_rng(0)
  width, inner, side = c.hidden_size, c.intermediate_size, c.patch_size
  shapes = {
    "embeddings.cls_token": (1, 1, width),
    "embeddings.position_embeddings": (1, 1 + c.grid**2, width),
    "embeddings.patch_embeddings.projection.weight": (width, 3, side, side),
    "embeddings.patch_embeddings.projection.bias": (width,),
    "layernorm.weight": (width,),
    "layernorm.bias": (width,),
  }
  layer = "encoder.layer.0"
  for name, (out, into) in {
    "attention.attention.query": (width, width),
    "attention.attention.key": (width, width),
    "attention.attention.value": (width, width),
    "attention.output.dense": (width, width),
    "mlp.fc1": (inner, width),
    "mlp.fc2": (width, inner),
  }.items():
    shapes[f"{layer}.{name}.weight"] = (out, into)
    shapes[f"{layer}.{name}.bias"] = (out,)
  for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
    shapes[f"{layer}.{name}"] = (width,)
  for name in ("layer_scale1.lambda1", "layer_scale2.lambda1"):
    shapes[f"{layer}.{name}"] = (width,)
  return {
    prefix + name: draws.normal(
      # Scales are near one, so that there is something to learn from.
      float(("norm" in name and "weight" in name) or "lambda" in name),
      0.1,
      shape,
    ).astype(np.float32)
    for name, shape in shapes.items()
  }


def write(path: pathlib.Path, found: dict[str, np.ndarray]) -> pathlib.Path:
  """Writes tensors `backbone.*` of a model that also has a decoder.

  As the exporter does, linear weights are transposed and have no names, nor do
  the two parts of the positions.
  """
  stored, nodes = {"decoder.final.weight": np.zeros((2, 3), np.float32)}, []
  for name, value in found.items():
    module, _, leaf = name.rpartition(".")
    place = "/" + module.replace(".", "/").replace("layer/", "layer.")
    nameless = f"onnx::MatMul_{len(stored)}"
    if name.endswith("position_embeddings"):
      stored["onnx::Concat_9"], stored["onnx::Reshape_9"] = np.split(
        value, [1], 1
      )
      # The larger one comes first.
      nodes += [
        (f"{place}/Reshape_1", "Reshape", "onnx::Reshape_9"),
        (f"{place}/Concat_6", "Concat", "onnx::Concat_9"),
      ]
    elif leaf == "weight" and value.ndim == 2:
      stored[nameless] = np.ascontiguousarray(value.T)
      nodes.append((f"{place}/MatMul", "MatMul", nameless))
    else:
      stored[name] = value
      nodes.append((f"{place}/Add", "Add", name))
  # Of the decoder: it must not be taken for one of the backbone's.
  stored["onnx::MatMul_0"] = np.ones((2, 2), np.float32)
  nodes.append(("/decoder/MatMul", "MatMul", "onnx::MatMul_0"))
  graph = helper.make_graph(
    [
      helper.make_node(kind, ["x", name], [f"{place}_output_0"], name=place)
      for place, kind, name in nodes
    ],
    "main_graph",
    [],
    [],
    [numpy_helper.from_array(x, name) for name, x in stored.items()],
  )
  onnx.save(helper.make_model(graph), path)
  return path
