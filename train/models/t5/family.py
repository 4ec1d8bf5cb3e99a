"""The record of the family of T5s."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from ..family import Family, Kind, Pretrained
from . import generate, label_words, weights
from . import model as t5
from .config import MODEL_TYPES, T5Config


def _complete(found: Pretrained) -> Pretrained:
  config, notes = weights.with_own_head(found.config, found.tensors)
  return dataclasses.replace(
    found,
    config=config,
    pad_id=config.pad_id,
    eos_id=config.eos_id,
    stop_ids=(config.eos_id,),
    notes=notes,
  )


def _label_tokens(
  pretrained: Pretrained, words: Sequence[str], after: str
) -> tuple[tuple[int, ...], ...]:
  del after  # the encoder reads the prompt, so an answer is a separate text
  return label_words.tokens(
    pretrained.tokenizer, words, pretrained.config.eos_id
  )


def _classifier(
  config: T5Config, labels: Sequence[Sequence[int]], **options: Any
) -> label_words.T5LabelWords:
  return label_words.T5LabelWords(
    config, words=tuple(map(tuple, labels)), **options
  )


def _params(model, tensors, dtype, place) -> dict[str, Any]:
  return weights.params(
    model.config, tensors, scan=model.scan, dtype=dtype, place=place
  )


def _kind(model: t5.T5) -> Kind:
  names = dict(weights.modules(model.config, model.scan))
  name = model.config.model_type.upper()
  return Kind(f"{name}ForConditionalGeneration", names, "", "SEQ_2_SEQ_LM")


def _tensors(model: t5.T5, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  return weights.tensors(model.config, params, scan=model.scan)


def _exported(tensors: Mapping[str, Any]) -> dict[str, Any]:
  # transformers 5 writes that every T5's head is tied, which may be wrong.
  return {"tie_word_embeddings": "lm_head.weight" not in tensors}


FAMILY = Family(
  name="T5",
  reads="texts",
  answers="words",
  config=T5Config,
  modules=(t5.T5,),
  model_types=MODEL_TYPES,
  complete=_complete,
  classifier=_classifier,
  label_tokens=_label_tokens,
  language_model=t5.T5,
  params=_params,
  check=weights.check,
  # The inputs are the source's tokens, their mask, and the target's tokens.
  example_inputs=lambda _: (jax.ShapeDtypeStruct((1, 2), "int32"),) * 3,
  logical_axes=t5.logical_axes,
  generate=generate.greedy,
  generate_methods=("encode", "decode"),
  scans=True,
  own_head=lambda model: None if model.config.tied else "lm_head",
  kind=_kind,
  tensors=_tensors,
  exported=_exported,
)
