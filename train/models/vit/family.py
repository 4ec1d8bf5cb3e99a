"""DINOv2's vision transformers, as the program knows them.

transformers has no model with our head, but one computes the same: as the
`classifier` of a `Dinov2ForImageClassification`, whose other inputs, the mean
of the patches, have weights of zero.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

import jax
from jax import typing
import numpy as np

from bilora_jax import peft

from ..family import Family, Kind
from ..io import stored
from ..io import tensors as tensors_
from ..io import weights as files
from . import model as vit
from . import weights

_PREFIX = "dinov2."


def _read_file(path: pathlib.Path) -> tuple[Any, Any, Any]:
  tensors = weights.read(path)
  try:
    config = weights.config(tensors)
  except ValueError as error:
    raise files.WeightsError(f"{path}: {error}") from error
  return config, tensors, weights.hf_config(config)


def _classifier(
  config: vit.VitConfig,
  labels: int,
  *,
  dtype: typing.DTypeLike | None = None,
  remat: str = "none",
  **_: Any,
) -> vit.VitClassifier:
  # Weights are of the dtype that they are read in.
  return vit.VitClassifier(config, labels, dtype, remat)


def _params(model, tensors, dtype, place) -> dict[str, Any]:
  arrays = tensors_.read_all(tensors)
  encoder = {"encoder": weights.vit_params(model.config, arrays)}
  return stored.placed(encoder, dtype, place)


def _example_inputs(
  config: vit.VitConfig,
) -> tuple[jax.ShapeDtypeStruct, ...]:
  side = config.patch_size * config.grid
  shape = (1, side, side, vit.CHANNELS)
  return (jax.ShapeDtypeStruct(shape, "float32"),)


def _kind(model: vit.VitClassifier) -> Kind:
  names: dict[str, Any] = {
    f"encoder/{path}": f"{_PREFIX}{name}"
    if isinstance(name, str)
    else dataclasses.replace(name, module=f"{_PREFIX}{name.module}")
    for path, name in weights.modules(model.config).items()
  }
  width = model.config.hidden_size
  names["head/kernel"] = peft.Wider("classifier", width, width)
  names["head/bias"] = "classifier"
  return Kind("Dinov2ForImageClassification", names, _PREFIX, None)


def _tensors(
  model: vit.VitClassifier, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  encoder = weights.vit_tensors(model.config, params["encoder"])
  weight = np.asarray(params["head"]["kernel"]).T
  return {
    **{_PREFIX + name: value for name, value in encoder.items()},
    "classifier.weight": np.pad(
      weight, ((0, 0), (0, model.config.hidden_size))
    ),
    "classifier.bias": np.asarray(params["head"]["bias"]),
  }


FAMILY = Family(
  name="ViT",
  reads="images",
  answers="head",
  config=vit.VitConfig,
  modules=(vit.VitClassifier,),
  suffix=".onnx",
  read_file=_read_file,
  classifier=_classifier,
  params=_params,
  check=weights.check,
  example_inputs=_example_inputs,
  logical_axes=vit.logical_axes,
  kind=_kind,
  tensors=_tensors,
)
