"""Hugging Face's BERT tensors as the parameters of `BertClassifier`."""

from collections.abc import Mapping
from typing import Any

from jax import typing
import jax.numpy as jnp
import numpy as np

from ..io import stored, weights
from ..io import tensors as tensors_
from .model import BertConfig

# Our module within a layer -> Hugging Face's.
_DENSES = {
  "query": "attention.self.query",
  "key": "attention.self.key",
  "value": "attention.self.value",
  "attention_out": "attention.output.dense",
  "intermediate": "intermediate.dense",
  "output": "output.dense",
}
_NORMS = {
  "attention_norm": "attention.output.LayerNorm",
  "output_norm": "output.LayerNorm",
}
_PREFIX = "bert."
_PARTS = (f"{_PREFIX}embeddings.", f"{_PREFIX}encoder.")
# Buffers, not weights; old checkpoints saved them.
_BUFFERS = (
  f"{_PREFIX}embeddings.position_ids",
  f"{_PREFIX}embeddings.token_type_ids",
)


def params(
  config: BertConfig,
  tensors: Mapping[str, tensors_.Tensor],
  *,
  dtype: typing.DTypeLike = jnp.float32,
  place: stored.Place = stored.on_one_device,
) -> dict[str, Any]:
  """Parameters of the encoder from a Hugging Face checkpoint, one at a time.

  Names may lack the prefix 'bert.', and layer norms have the older names gamma
  and beta. The pooler and any head (names outside embeddings and encoder) are
  left out: this project's classifier pools by itself and trains its own head.

  Args:
    config: the sizes.
    tensors: tensors by name; a linear weight is (out, in).
    dtype: of the parameters.
    place: makes a parameter; by default an array on one device.

  Returns:
    `encoder` of a `BertClassifier`, of what `place` made; a Dense kernel is
    (in, out).

  Raises:
    WeightsError: tensors are missing, of another shape than the configuration
      says, no floats, there by two names, or in the encoder and unknown to it;
      and nothing was read.
  """
  check(config, tensors)
  return stored.read(_plan(config), _by_full_name(tensors), dtype, place)


def check(config: BertConfig, tensors: Mapping[str, tensors_.Tensor]) -> None:
  """Refuses tensors that `params` cannot read.

  Raises:
    WeightsError: as `params`.
  """
  found = _by_full_name(tensors)

  def ignored(name: str) -> bool:
    return not name.startswith(_PARTS) or name in _BUFFERS

  stored.check_layers(config.num_layers, tensors, "BERT")
  stored.check(_plan(config), found, ignored, "BERT")


def tensors(
  config: BertConfig, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Undoes `params`: the encoder's tensors, by names that begin with 'bert.'.

  Args:
    config: the sizes.
    params: of `BertClassifier`.

  Returns:
    Arrays on the host, in the dtype of the parameters; a linear weight is
    (out, in).
  """
  return stored.tensors(_plan(config), params)


def modules(config: BertConfig) -> dict[str, str | tuple[str, ...]]:
  """The path of each of the encoder's parameters, and its module."""
  return stored.modules(_plan(config))


def _plan(config: BertConfig) -> dict[stored.Path, stored.Source]:
  """Path in the parameter tree -> where its values are."""
  width, inner = config.hidden_size, config.intermediate_size
  plan: dict[stored.Path, stored.Source] = {}

  def add(path: tuple[str, ...], name: str, *shape: int) -> None:
    plan["encoder", *path] = stored.Source(
      (f"{_PREFIX}{name}",), shape, path[-1] == "kernel", False
    )

  def norm(path: tuple[str, ...], module: str) -> None:
    add((*path, "scale"), f"{module}.weight", width)
    add((*path, "bias"), f"{module}.bias", width)

  for table, rows in (
    ("word", config.vocab_size),
    ("position", config.max_positions),
    ("token_type", config.type_vocab_size),
  ):
    name = f"embeddings.{table}_embeddings.weight"
    add(("embeddings", table, "embedding"), name, rows, width)
  norm(("embeddings", "norm"), "embeddings.LayerNorm")
  for i in range(config.num_layers):
    source, layer = f"encoder.layer.{i}", f"layer_{i}"
    for ours, theirs in _DENSES.items():
      out = inner if ours == "intermediate" else width
      into = inner if ours == "output" else width
      add((layer, ours, "kernel"), f"{source}.{theirs}.weight", out, into)
      add((layer, ours, "bias"), f"{source}.{theirs}.bias", out)
    for ours, theirs in _NORMS.items():
      norm((layer, ours), f"{source}.{theirs}")
  return plan


def _by_full_name(
  tensors: Mapping[str, tensors_.Tensor],
) -> dict[str, tensors_.Tensor]:
  found: dict[str, str] = {}
  for name in tensors:
    other = found.setdefault(_full_name(name), name)
    if other != name:
      raise weights.WeightsError(
        f"The tensors do not fit the BERT's configuration: {other} and {name} "
        "are two names of one."
      )
  return {full: tensors[name] for full, name in found.items()}


def _full_name(name: str) -> str:
  if name.startswith(("embeddings.", "encoder.")):
    name = _PREFIX + name
  for old, new in (("gamma", "weight"), ("beta", "bias")):
    if name.endswith(f".LayerNorm.{old}"):
      name = name.removesuffix(old) + new
  return name
