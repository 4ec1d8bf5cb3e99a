"""The record of the family of DeBERTas.

transformers' equivalent class is `DebertaForTokenClassification`, with our head
as its `classifier`; see train/models/bert/family.py.
"""

from collections.abc import Mapping
from typing import Any

from jax import typing
import numpy as np

from .. import encoders
from ..family import Family, Kind
from . import model as deberta
from . import weights
from .config import MODEL_TYPES, DebertaConfig

_ARCHITECTURES = {
  "deberta": "DebertaForTokenClassification",
  "deberta-v2": "DebertaV2ForTokenClassification",
}


def _classifier(
  config: DebertaConfig,
  labels: int,
  *,
  dtype: typing.DTypeLike | None = None,
  remat: str = "none",
  **_: Any,
) -> deberta.DebertaClassifier:
  # `param_dtype` has no effect, because weights keep the dtype of the reading.
  return deberta.DebertaClassifier(config, labels, dtype, remat)


def _params(model, tensors, dtype, place) -> dict[str, Any]:
  return weights.params(model.config, tensors, dtype=dtype, place=place)


def _kind(model: deberta.DebertaClassifier) -> Kind:
  return encoders.token_classifier(
    _ARCHITECTURES[model.config.model_type],
    weights.modules(model.config),
    weights.PREFIX,
    model.config.pooling,
  )


def _tensors(
  model: deberta.DebertaClassifier, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  return weights.tensors(model.config, params) | encoders.head(params)


FAMILY = Family(
  name="DeBERTa",
  reads="texts",
  answers="head",
  config=DebertaConfig,
  modules=(deberta.DebertaClassifier,),
  model_types=MODEL_TYPES,
  complete=encoders.complete,
  classifier=_classifier,
  params=_params,
  check=weights.check,
  example_inputs=encoders.example_inputs,
  logical_axes=deberta.logical_axes,
  kind=_kind,
  tensors=_tensors,
)
