"""The record of the family of ModernBERTs."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from jax import typing
import numpy as np

from .. import encoders
from ..family import Family, Kind, Pretrained
from . import model as modernbert
from . import weights
from .config import MODEL_TYPE, ModernBertConfig


def _complete(found: Pretrained) -> Pretrained:
  """Adds the pretraining's head and its pooling, if the folder has the head."""
  found = encoders.complete(found)
  if weights.PREDICTION not in found.tensors:
    return found
  how = found.hf_config.get("classifier_pooling", "cls")
  config = dataclasses.replace(found.config, prediction=True, pooling=how)
  return dataclasses.replace(found, config=config)


def _classifier(
  config: ModernBertConfig,
  labels: int,
  *,
  dtype: typing.DTypeLike | None = None,
  remat: str = "none",
  **_: Any,
) -> modernbert.ModernBertClassifier:
  # `param_dtype` has no effect, because weights keep the dtype of the reading.
  return modernbert.ModernBertClassifier(config, labels, dtype, remat)


def _params(model, tensors, dtype, place) -> dict[str, Any]:
  return weights.params(model.config, tensors, dtype=dtype, place=place)


def _kind(model: modernbert.ModernBertClassifier) -> Kind:
  if not model.config.prediction:
    raise ValueError(
      "transformers has no classifier of a ModernBERT without the head of its "
      f"pretraining, and this model's folder has no {weights.PREDICTION}."
    )
  names = dict(weights.modules(model.config))
  names |= dict.fromkeys(("head/kernel", "head/bias"), "classifier")
  architecture = "ModernBertForSequenceClassification"
  return Kind(architecture, names, weights.PREFIX, "SEQ_CLS")


def _tensors(
  model: modernbert.ModernBertClassifier, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  return weights.tensors(model.config, params) | encoders.head(params)


FAMILY = Family(
  name="ModernBERT",
  reads="texts",
  answers="head",
  config=ModernBertConfig,
  modules=(modernbert.ModernBertClassifier,),
  model_types=(MODEL_TYPE,),
  complete=_complete,
  classifier=_classifier,
  params=_params,
  check=weights.check,
  example_inputs=encoders.example_inputs,
  logical_axes=modernbert.logical_axes,
  kind=_kind,
  tensors=_tensors,
)
