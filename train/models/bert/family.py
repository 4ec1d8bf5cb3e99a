"""BERT, as the program knows it.

transformers has no model with our head, but one computes the same: as the
`classifier` of a `BertForTokenClassification`, the mean of whose logits over
the real tokens is ours.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
from jax import typing
import numpy as np

from ..family import Family, Kind, Pretrained
from ..io import tokenizer
from . import model as bert
from . import weights


def _classifier(
  config: bert.BertConfig,
  labels: int,
  *,
  dtype: typing.DTypeLike | None = None,
  remat: str = "none",
  **_: Any,
) -> bert.BertClassifier:
  # Weights are of the dtype that they are read in.
  return bert.BertClassifier(config, labels, dtype, remat)


def _params(model, tensors, dtype, place) -> dict[str, Any]:
  return weights.params(model.config, tensors, dtype=dtype, place=place)


def _kind(model: bert.BertClassifier) -> Kind:
  names = dict(weights.modules(model.config))
  names |= dict.fromkeys(("head/kernel", "head/bias"), "classifier")
  # The mean of the last hidden states needs no pooler.
  idle = ("pooler.dense",)
  return Kind("BertForTokenClassification", names, "bert.", "TOKEN_CLS", idle)


def _tensors(
  model: bert.BertClassifier, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  return {
    **weights.tensors(model.config, params),
    "classifier.weight": np.asarray(params["head"]["kernel"]).T,
    "classifier.bias": np.asarray(params["head"]["bias"]),
  }


def _complete(found: Pretrained) -> Pretrained:
  return dataclasses.replace(found, pad_id=tokenizer.pad_id(found.tokenizer))


FAMILY = Family(
  name="BERT",
  reads="texts",
  answers="head",
  config=bert.BertConfig,
  modules=(bert.BertClassifier,),
  model_types=("bert",),
  complete=_complete,
  classifier=_classifier,
  params=_params,
  check=weights.check,
  # Tokens, and their mask.
  example_inputs=lambda _: (jax.ShapeDtypeStruct((1, 2), "int32"),) * 2,
  logical_axes=bert.logical_axes,
  kind=_kind,
  tensors=_tensors,
)
