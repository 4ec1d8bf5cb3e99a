"""The record of the family of BERT and similar encoders.

transformers has no model with our head, but its `BertForTokenClassification`
can compute the same. With our head as its `classifier`, the mean of its logits
over the real tokens is our logits. If a model pools by its first token, its
logits at the first token are our logits.
"""

from collections.abc import Mapping
from typing import Any

from jax import typing
import numpy as np

from .. import encoders
from ..family import Family, Kind
from . import model as bert
from . import weights
from .config import MODEL_TYPES, BertConfig


def _classifier(
  config: BertConfig,
  labels: int,
  *,
  dtype: typing.DTypeLike | None = None,
  remat: str = "none",
  **_: Any,
) -> bert.BertClassifier:
  # `param_dtype` has no effect, because weights keep the dtype of the reading.
  return bert.BertClassifier(config, labels, dtype, remat)


def _params(model, tensors, dtype, place) -> dict[str, Any]:
  return weights.params(model.config, tensors, dtype=dtype, place=place)


def _kind(model: bert.BertClassifier) -> Kind:
  config = model.config
  architecture, prefix = weights.names(config)
  names = dict(weights.modules(config))
  return encoders.token_classifier(architecture, names, prefix, config.pooling)


def _tensors(
  model: bert.BertClassifier, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  return weights.tensors(model.config, params) | encoders.head(params)


FAMILY = Family(
  name="BERT",
  reads="texts",
  answers="head",
  config=BertConfig,
  modules=(bert.BertClassifier,),
  model_types=MODEL_TYPES,
  complete=encoders.complete,
  classifier=_classifier,
  params=_params,
  check=weights.check,
  example_inputs=encoders.example_inputs,
  logical_axes=bert.logical_axes,
  kind=_kind,
  tensors=_tensors,
)
