"""The record of the family of decoders."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from bilora_jax import peft

from ..family import Family, Kind, Pretrained
from ..io import special_tokens
from ..io import template as templates
from ..io import weights as weights_files
from . import config as configs
from . import generate, label_words, sizes, weights
from . import model as decoder

_NO_END = (
  "The model's files name no token that ends a text (eos_token of "
  "tokenizer_config.json or special_tokens_map.json, eos_token_id of "
  "generation_config.json or config.json): answers go on to their full length."
)


def _complete(found: Pretrained) -> Pretrained:
  config, notes = weights.with_own_head(found.config, found.tensors)
  notes = (*notes, *weights.left_out(config, found.tensors))
  template = templates.load_template(found.path)
  stop_ids = special_tokens.end_ids(found.path)
  if template.eos:
    eos_id = found.tokenizer.token_to_id(template.eos)
    if eos_id is None:
      raise weights_files.WeightsError(
        f"{found.path} has the eos_token {template.eos!r:.100}, and no such "
        "token in its tokenizer."
      )
    stop_ids = tuple(dict.fromkeys((eos_id, *stop_ids)))
  elif stop_ids:
    eos = found.tokenizer.id_to_token(stop_ids[0]) or ""
    template = dataclasses.replace(template, eos=eos)
  else:
    notes = (*notes, _NO_END)
  eos_id = stop_ids[0] if stop_ids else None
  # Any token can pad, because padding is never seen or learned.
  return dataclasses.replace(
    found,
    config=config,
    pad_id=eos_id or 0,
    eos_id=eos_id,
    stop_ids=stop_ids,
    template=template,
    notes=notes,
  )


def _exported(tensors: Mapping[str, Any]) -> dict[str, Any]:
  return {"tie_word_embeddings": "lm_head.weight" not in tensors}


def _label_tokens(
  pretrained: Pretrained, words: Sequence[str], after: str
) -> tuple[tuple[int, ...], ...]:
  return label_words.tokens(pretrained.tokenizer, words, after)


def _classifier(
  config: configs.DecoderConfig,
  labels: Sequence[Sequence[int]],
  **options: Any,
) -> label_words.LabelWords:
  first = tuple(tokens[0] for tokens in labels)
  return label_words.LabelWords(config, label_ids=first, **options)


def _params(model, tensors, dtype, place) -> dict[str, Any]:
  return weights.params(
    model.config, tensors, scan=model.scan, dtype=dtype, place=place
  )


def _kind(model: decoder.Decoder) -> Kind:
  names: dict[str, Any] = dict(weights.modules(model.config, model.scan))
  if model.config.tied:
    table = "embed_tokens/embedding"
    names[table] = peft.Tied(names[table], ("lm_head",))
  return Kind(
    model.config.architecture,
    names,
    model.config.bare_prefix,
    "CAUSAL_LM",
  )


def _tensors(
  model: decoder.Decoder, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  return weights.tensors(model.config, params, scan=model.scan)


FAMILY = Family(
  name="decoder",
  reads="texts",
  answers="token",
  config=configs.DecoderConfig,
  modules=(decoder.Decoder,),
  model_types=configs.MODEL_TYPES,
  complete=_complete,
  classifier=_classifier,
  label_tokens=_label_tokens,
  language_model=decoder.Decoder,
  params=_params,
  check=weights.check,
  # The input is tokens.
  example_inputs=lambda _: (jax.ShapeDtypeStruct((1, 2), "int32"),),
  logical_axes=decoder.logical_axes,
  converses=True,
  generate=generate.generate,
  generate_methods=("decode",),
  scans=True,
  splits_rows=True,
  own_head=lambda model: None if model.config.tied else "lm_head",
  sizes=sizes.PRESETS,
  kind=_kind,
  tensors=_tensors,
  carried=weights.carried,
  exported=_exported,
)
