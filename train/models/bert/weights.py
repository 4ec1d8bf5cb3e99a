"""Converts Hugging Face's tensors to parameters of `BertClassifier`."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from jax import typing
import jax.numpy as jnp
import numpy as np

from .. import encoders
from ..io import stored
from ..io import tensors as tensors_
from .config import BertConfig


@dataclasses.dataclass(frozen=True)
class _Names:
  """The names of tensors in transformers.

  Attributes:
    model: the model's name in messages.
    architecture: the class that classifies tokens.
    prefix: the prefix of the encoder's names in this class.
    layers: the prefix of the layers' names.
    denses: our linear module within a layer -> theirs.
    norms: our norm within a layer -> theirs.
  """

  model: str
  architecture: str
  prefix: str
  layers: str
  denses: Mapping[str, str]
  norms: Mapping[str, str]


_BERT = _Names(
  model="BERT",
  architecture="BertForTokenClassification",
  prefix="bert.",
  layers="encoder.layer.",
  denses={
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
  },
  norms={
    "attention_norm": "attention.output.LayerNorm",
    "output_norm": "output.LayerNorm",
  },
)


def _like_bert(model: str, prefix: str, name: str) -> _Names:
  return dataclasses.replace(
    _BERT,
    model=model,
    architecture=f"{name}ForTokenClassification",
    prefix=prefix,
  )


_NAMES = {
  "bert": _BERT,
  "roberta": _like_bert("RoBERTa", "roberta.", "Roberta"),
  "xlm-roberta": _like_bert("XLM-R", "roberta.", "XLMRoberta"),
  "electra": _like_bert("ELECTRA", "electra.", "Electra"),
  "distilbert": _Names(
    model="DistilBERT",
    architecture="DistilBertForTokenClassification",
    prefix="distilbert.",
    layers="transformer.layer.",
    denses={
      "query": "attention.q_lin",
      "key": "attention.k_lin",
      "value": "attention.v_lin",
      "attention_out": "attention.out_lin",
      "intermediate": "ffn.lin1",
      "output": "ffn.lin2",
    },
    norms={
      "attention_norm": "sa_layer_norm",
      "output_norm": "output_layer_norm",
    },
  ),
}
_EMBEDDINGS, _PROJECTION = "embeddings.", "embeddings_project."
# Buffers, which old checkpoints saved.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def names(config: BertConfig) -> tuple[str, str]:
  """Returns transformers' token classifier, and its prefix of the encoder."""
  found = _NAMES[config.model_type]
  return found.architecture, found.prefix


def params(
  config: BertConfig,
  tensors: Mapping[str, tensors_.Tensor],
  *,
  dtype: typing.DTypeLike = jnp.float32,
  place: stored.Place = stored.on_one_device,
) -> dict[str, Any]:
  """Reads the encoder's parameters from a Hugging Face checkpoint.

  Names may lack the prefix, such as BERT's 'bert.'. Layer norms may have the
  older names gamma and beta. Names outside the embeddings and layers belong to
  the pooler and to heads. They are left out, because this project's classifier
  has its own pooling and trains its own head.

  Args:
    config: the sizes.
    tensors: the tensors by name; a linear weight is (out, in).
    dtype: the dtype of the parameters.
    place: makes a parameter; by default an array on one device.

  Returns:
    The `encoder` of a `BertClassifier`, which `place` made; a Dense kernel is
    (in, out).

  Raises:
    WeightsError: tensors are missing, have a wrong shape, are not floats, have
      two names, or are in the encoder but unknown. Nothing is read then.
  """
  check(config, tensors)
  found = _by_full_name(config, tensors)
  return stored.read(_plan(config), found, dtype, place)


def check(config: BertConfig, tensors: Mapping[str, tensors_.Tensor]) -> None:
  """Refuses tensors that `params` cannot read.

  Raises:
    WeightsError: as `params`.
  """
  theirs = _NAMES[config.model_type]
  found = _by_full_name(config, tensors)
  stack = theirs.layers.partition(".")[0]
  parts = (_EMBEDDINGS, _PROJECTION, f"{stack}.")
  parts = tuple(f"{theirs.prefix}{part}" for part in parts)
  buffers = [f"{theirs.prefix}{name}" for name in _BUFFERS]

  def ignored(name: str) -> bool:
    return not name.startswith(parts) or name in buffers

  stored.check_layers(config.num_layers, tensors, theirs.model)
  stored.check(_plan(config), found, ignored, theirs.model)


def tensors(
  config: BertConfig, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns the encoder's tensors, by names with prefix; undoes `params`.

  Args:
    config: the sizes.
    params: the parameters of `BertClassifier`.

  Returns:
    Arrays on the host, in the dtype of the parameters; a linear weight is
    (out, in).
  """
  return stored.tensors(_plan(config), params)


def modules(config: BertConfig) -> dict[str, str | tuple[str, ...]]:
  """Returns the path of each parameter of the encoder, and its module."""
  return stored.modules(_plan(config))


def _plan(config: BertConfig) -> dict[stored.Path, stored.Source]:
  """Returns the plan: from a parameter's path to where its values are."""
  theirs = _NAMES[config.model_type]
  width, inner = config.hidden_size, config.intermediate_size
  narrow = config.embedding_width
  plan: dict[stored.Path, stored.Source] = {}

  def add(path: tuple[str, ...], name: str, *shape: int) -> None:
    plan["encoder", *path] = stored.Source(
      (f"{theirs.prefix}{name}",), shape, path[-1] == "kernel", False
    )

  def norm(path: tuple[str, ...], module: str, size: int = width) -> None:
    add((*path, "scale"), f"{module}.weight", size)
    add((*path, "bias"), f"{module}.bias", size)

  for table, rows in (
    ("word", config.vocab_size),
    ("position", config.max_positions),
    ("token_type", config.type_vocab_size),
  ):
    if rows is not None:
      name = f"{_EMBEDDINGS}{table}_embeddings.weight"
      add(("embeddings", table, "embedding"), name, rows, narrow)
  norm(("embeddings", "norm"), f"{_EMBEDDINGS}LayerNorm", narrow)
  if config.embedding_size is not None:
    path = "embeddings", "projection"
    add((*path, "kernel"), f"{_PROJECTION}weight", width, narrow)
    add((*path, "bias"), f"{_PROJECTION}bias", width)
  for i in range(config.num_layers):
    source, layer = f"{theirs.layers}{i}", f"layer_{i}"
    for ours, module in theirs.denses.items():
      out = inner if ours == "intermediate" else width
      into = inner if ours == "output" else width
      add((layer, ours, "kernel"), f"{source}.{module}.weight", out, into)
      add((layer, ours, "bias"), f"{source}.{module}.bias", out)
    for ours, module in theirs.norms.items():
      norm((layer, ours), f"{source}.{module}")
  return plan


def _by_full_name(
  config: BertConfig, tensors: Mapping[str, tensors_.Tensor]
) -> dict[str, tensors_.Tensor]:
  theirs = _NAMES[config.model_type]
  parts = (_EMBEDDINGS, _PROJECTION, theirs.layers)
  return encoders.by_full_name(tensors, theirs.prefix, parts, theirs.model)
