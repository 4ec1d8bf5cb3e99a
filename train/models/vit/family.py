"""The record of the family of vision transformers.

The input of our head is the same as in transformers' image classifiers, except
for DINOv2. There, transformers appends the mean of the patches to the input. An
export gives these further inputs zero weights.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

import jax
from jax import typing
import numpy as np

from bilora_jax import peft

from ..family import Family, Kind, Pretrained
from ..io import stored
from ..io import tensors as tensors_
from ..io import weights as files
from . import config as configs
from . import model as vit
from . import onnx_file, processor, weights


def _read_file(path: pathlib.Path) -> tuple[Any, Any, Any]:
  tensors = onnx_file.read(path)
  try:
    config = onnx_file.config(tensors)
  except ValueError as error:
    raise files.WeightsError(f"{path}: {error}") from error
  return config, tensors, onnx_file.hf_config(config)


def _complete(found: Pretrained) -> Pretrained:
  nested, hf_config = found.config.tower.nested, found.hf_config
  if nested and nested not in hf_config:
    # The folder has the image tower alone; a classifier's config nests it.
    kind = found.config.model_type.removesuffix("_vision_model")
    hf_config = {"model_type": kind, nested: hf_config}
  return dataclasses.replace(
    found,
    config=processor.with_images(found.config, found.path),
    hf_config=hf_config,
  )


def _classifier(
  config: configs.VitConfig,
  labels: int,
  *,
  dtype: typing.DTypeLike | None = None,
  remat: str = "none",
  **_: Any,
) -> vit.VitClassifier:
  # `param_dtype` has no effect, because weights keep the dtype of the reading.
  return vit.VitClassifier(config, labels, dtype, remat)


def _params(model, tensors, dtype, place) -> dict[str, Any]:
  arrays = tensors_.read_all(tensors)
  encoder = {"encoder": weights.vit_params(model.config, arrays)}
  return stored.placed(encoder, dtype, place)


def _example_inputs(
  config: configs.VitConfig,
) -> tuple[jax.ShapeDtypeStruct, ...]:
  side = config.patch_size * config.grid
  shape = (1, side, side, configs.CHANNELS)
  return (jax.ShapeDtypeStruct(shape, "float32"),)


def _kind(model: vit.VitClassifier) -> Kind:
  tower = model.config.tower
  names: dict[str, Any] = {
    f"encoder/{path}": f"{tower.prefix}{name}"
    if isinstance(name, str)
    else dataclasses.replace(name, module=f"{tower.prefix}{name.module}")
    for path, name in weights.modules(model.config).items()
  }
  width, unused = model.config.hidden_size, _unused_inputs(model.config)
  names["head/kernel"] = (
    peft.Wider("classifier", width, unused) if unused else "classifier"
  )
  names["head/bias"] = "classifier"
  return Kind(tower.architecture, names, tower.prefix, None, idle=_IDLE)


# The modules of SigLIP's pooling head, which a classifier does not use.
_IDLE = ("head.mlp.fc1", "head.mlp.fc2", "head.attention.out_proj")


def _unused_inputs(config: configs.VitConfig) -> int:
  """Returns how many inputs of transformers' head our head lacks."""
  return config.hidden_size if config.tower.names == "dinov2" else 0


def _tensors(
  model: vit.VitClassifier, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  encoder = weights.vit_tensors(model.config, params["encoder"])
  weight = np.asarray(params["head"]["kernel"]).T
  prefix = model.config.tower.prefix
  return {
    **{prefix + name: value for name, value in encoder.items()},
    "classifier.weight": np.pad(
      weight, ((0, 0), (0, _unused_inputs(model.config)))
    ),
    "classifier.bias": np.asarray(params["head"]["bias"]),
  }


FAMILY = Family(
  name="ViT",
  reads="images",
  answers="head",
  config=configs.VitConfig,
  modules=(vit.VitClassifier,),
  model_types=tuple(configs.TOWERS),
  suffix=".onnx",
  read_file=_read_file,
  complete=_complete,
  classifier=_classifier,
  params=_params,
  check=weights.check,
  example_inputs=_example_inputs,
  logical_axes=vit.logical_axes,
  kind=_kind,
  tensors=_tensors,
  carried=weights.carried,
)
