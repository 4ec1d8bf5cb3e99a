"""Converts Hugging Face's tensors to parameters of `ModernBertClassifier`."""

from collections.abc import Mapping
from typing import Any

from jax import typing
import jax.numpy as jnp
import numpy as np

from .. import encoders
from ..io import stored
from ..io import tensors as tensors_
from .config import ModernBertConfig

PREFIX = "model."
PREDICTION = "head.dense.weight"
_PARTS = ("embeddings.", "layers.", "final_norm.")


def params(
  config: ModernBertConfig,
  tensors: Mapping[str, tensors_.Tensor],
  *,
  dtype: typing.DTypeLike = jnp.float32,
  place: stored.Place = stored.on_one_device,
) -> dict[str, Any]:
  """Reads a classifier's parameters from a Hugging Face checkpoint.

  Names may lack the prefix 'model.'. The new head is left out.

  Args:
    config: the sizes.
    tensors: the tensors by name; a linear weight is (out, in).
    dtype: the dtype of the parameters.
    place: makes a parameter; by default an array on one device.

  Returns:
    The `encoder`, and `prediction` if the configuration has it, which `place`
    made; a Dense kernel is (in, out).

  Raises:
    WeightsError: tensors are missing, have a wrong shape, are not floats, have
      two names, or are in the encoder but unknown. Nothing is read then.
  """
  check(config, tensors)
  return stored.read(_plan(config), _by_full_name(tensors), dtype, place)


def check(
  config: ModernBertConfig, tensors: Mapping[str, tensors_.Tensor]
) -> None:
  """Refuses tensors that `params` cannot read.

  Raises:
    WeightsError: as `params`.
  """
  parts = tuple(f"{PREFIX}{part}" for part in _PARTS)

  def ignored(name: str) -> bool:
    return not name.startswith(parts)

  stored.check_layers(config.num_layers, tensors, "ModernBERT")
  stored.check(_plan(config), _by_full_name(tensors), ignored, "ModernBERT")


def tensors(
  config: ModernBertConfig, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns the tensors by names with prefix; undoes `params`."""
  return stored.tensors(_plan(config), params)


def modules(config: ModernBertConfig) -> dict[str, str | tuple[str, ...]]:
  """Returns each parameter's path and module, without the new head."""
  return stored.modules(_plan(config))


def _by_full_name(
  tensors: Mapping[str, tensors_.Tensor],
) -> dict[str, tensors_.Tensor]:
  return encoders.by_full_name(tensors, PREFIX, _PARTS, "ModernBERT")


def _plan(config: ModernBertConfig) -> dict[stored.Path, stored.Source]:
  """Returns the plan: from a parameter's path to where its values are."""
  width, inner = config.hidden_size, config.intermediate_size
  plan: dict[stored.Path, stored.Source] = {}

  def add(path: tuple[str, ...], name: str, *shape: int) -> None:
    turned = path[-1] == "kernel"
    plan[path] = stored.Source((f"{name}.weight",), shape, turned, False)

  def norm(path: tuple[str, ...], name: str) -> None:
    add((*path, "scale"), name, width)

  encoder = "encoder"
  words = f"{PREFIX}embeddings.tok_embeddings"
  add((encoder, "word", "embedding"), words, config.vocab_size, width)
  norm((encoder, "embedding_norm"), f"{PREFIX}embeddings.norm")
  norm((encoder, "final_norm"), f"{PREFIX}final_norm")
  for i in range(config.num_layers):
    layer, theirs = (encoder, f"layer_{i}"), f"{PREFIX}layers.{i}"
    if i:
      norm((*layer, "attention_norm"), f"{theirs}.attn_norm")
    norm((*layer, "mlp_norm"), f"{theirs}.mlp_norm")
    for ours, name, *shape in (
      ("qkv", "attn.Wqkv", 3 * width, width),
      ("attention_out", "attn.Wo", width, width),
      ("intermediate", "mlp.Wi", 2 * inner, width),
      ("output", "mlp.Wo", width, inner),
    ):
      add((*layer, ours, "kernel"), f"{theirs}.{name}", *shape)
  if config.prediction:
    add(("prediction", "dense", "kernel"), "head.dense", width, width)
    norm(("prediction", "norm"), "head.norm")
  return plan
