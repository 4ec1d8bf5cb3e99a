"""Converts Hugging Face's tensors to parameters of `DebertaClassifier`."""

from collections.abc import Mapping
from typing import Any

from jax import typing
import jax.numpy as jnp
import numpy as np

from .. import encoders
from ..io import stored
from ..io import tensors as tensors_
from .config import DebertaConfig

PREFIX = "deberta."
# Our module within a layer -> Hugging Face's, and whether it has a bias.
_AFTER = {
  "attention_out": ("attention.output.dense", True),
  "intermediate": ("intermediate.dense", True),
  "output": ("output.dense", True),
}
_FIRST = {
  "qkv": ("attention.self.in_proj", False),
  "position_key": ("attention.self.pos_proj", False),
  "position_query": ("attention.self.pos_q_proj", True),
}
_SECOND = {
  "query": ("attention.self.query_proj", True),
  "key": ("attention.self.key_proj", True),
  "value": ("attention.self.value_proj", True),
  "position_key": ("attention.self.pos_key_proj", True),
  "position_query": ("attention.self.pos_query_proj", True),
}
_NORMS = {
  "attention_norm": "attention.output.LayerNorm",
  "output_norm": "output.LayerNorm",
}
_PARTS = ("embeddings.", "encoder.")
_POSITIONS = "embeddings.position_embeddings.weight"
_BUFFERS = ("embeddings.position_ids",)


def params(
  config: DebertaConfig,
  tensors: Mapping[str, tensors_.Tensor],
  *,
  dtype: typing.DTypeLike = jnp.float32,
  place: stored.Place = stored.on_one_device,
) -> dict[str, Any]:
  """Reads the encoder's parameters from a Hugging Face checkpoint.

  Names may lack the prefix 'deberta.'. The pooler and any head are left out.

  Args:
    config: the sizes.
    tensors: the tensors by name; a linear weight is (out, in).
    dtype: the dtype of the parameters.
    place: makes a parameter; by default an array on one device.

  Returns:
    The `encoder` of a `DebertaClassifier`, which `place` made; a Dense kernel
    is (in, out).

  Raises:
    WeightsError: tensors are missing, have a wrong shape, are not floats, have
      two names, or are in the encoder but unknown. Nothing is read then.
  """
  check(config, tensors)
  return stored.read(_plan(config), _by_full_name(tensors), dtype, place)


def check(
  config: DebertaConfig, tensors: Mapping[str, tensors_.Tensor]
) -> None:
  """Refuses tensors that `params` cannot read.

  Raises:
    WeightsError: as `params`.
  """
  parts = tuple(f"{PREFIX}{part}" for part in _PARTS)
  # The pretraining's decoder alone used these positions.
  buffers = {f"{PREFIX}{name}" for name in (*_BUFFERS, _POSITIONS)}

  def ignored(name: str) -> bool:
    return not name.startswith(parts) or name in buffers

  stored.check_layers(config.num_layers, tensors, "DeBERTa")
  stored.check(_plan(config), _by_full_name(tensors), ignored, "DeBERTa")


def tensors(
  config: DebertaConfig, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns the encoder's tensors, by names with prefix; undoes `params`."""
  return stored.tensors(_plan(config), params)


def modules(config: DebertaConfig) -> dict[str, str | tuple[str, ...]]:
  """Returns the path of each parameter of the encoder, and its module."""
  return stored.modules(_plan(config))


def _by_full_name(
  tensors: Mapping[str, tensors_.Tensor],
) -> dict[str, tensors_.Tensor]:
  return encoders.by_full_name(tensors, PREFIX, _PARTS, "DeBERTa")


def _plan(config: DebertaConfig) -> dict[stored.Path, stored.Source]:
  """Returns the plan: from a parameter's path to where its values are."""
  width, inner = config.hidden_size, config.intermediate_size
  plan: dict[stored.Path, stored.Source] = {}

  def add(path: tuple[str, ...], name: str, *shape: int) -> None:
    plan["encoder", *path] = stored.Source(
      (f"{PREFIX}{name}",), shape, path[-1] == "kernel", False
    )

  def norm(path: tuple[str, ...], module: str) -> None:
    add((*path, "scale"), f"{module}.weight", width)
    add((*path, "bias"), f"{module}.bias", width)

  word = "embeddings.word_embeddings.weight"
  add(("embeddings", "word", "embedding"), word, config.vocab_size, width)
  if config.has_positions:
    path = "embeddings", "position", "embedding"
    add(path, _POSITIONS, config.max_positions, width)
  if config.type_vocab_size is not None:
    segments = "embeddings.token_type_embeddings.weight"
    path = "embeddings", "token_type", "embedding"
    add(path, segments, config.type_vocab_size, width)
  norm(("embeddings", "norm"), "embeddings.LayerNorm")
  distances = "encoder.rel_embeddings.weight"
  add(("distance", "embedding"), distances, 2 * config.span, width)
  if config.norms_positions:
    norm(("distance_norm",), "encoder.LayerNorm")
  is_first = config.model_type == "deberta"
  denses = {**(_FIRST if is_first else _SECOND), **_AFTER}
  for ours, kind in (("position_key", "c2p"), ("position_query", "p2c")):
    if config.shares_projections or kind not in config.attends:
      del denses[ours]
  for i in range(config.num_layers):
    source, layer = f"encoder.layer.{i}", f"layer_{i}"
    for ours, (module, has_bias) in denses.items():
      out = {"intermediate": inner, "qkv": 3 * width}.get(ours, width)
      into = inner if ours == "output" else width
      add((layer, ours, "kernel"), f"{source}.{module}.weight", out, into)
      if has_bias:
        add((layer, ours, "bias"), f"{source}.{module}.bias", out)
    if is_first:
      for name in ("q_bias", "v_bias"):
        add((layer, name), f"{source}.attention.self.{name}", width)
    for ours, module in _NORMS.items():
      norm((layer, ours), f"{source}.{module}")
  return plan
