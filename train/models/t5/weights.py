"""Converts Hugging Face's T5 tensors to parameters of `T5`."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from jax import typing
import jax.numpy as jnp
import numpy as np

from ..io import stored, weights
from ..io import tensors as tensors_
from .config import T5Config

_HEAD = "lm_head.weight"
# The names of the one embedding, which is saved under one or more of them.
_TABLES = (
  "shared.weight",
  "encoder.embed_tokens.weight",
  "decoder.embed_tokens.weight",
)
# The first checkpoints have this tensor, but no T5 has used it.
_UNUSED = (
  "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
)


def with_own_head(
  config: T5Config, tensors: Mapping[str, tensors_.Tensor]
) -> tuple[T5Config, tuple[str, ...]]:
  """Returns the configuration of a checkpoint, untied if the head differs.

  transformers 5 writes into every config.json that the head is tied. For v1.1,
  it also writes that the head's input is not scaled.

  Returns:
    the configuration, and a sentence for the user if the head should be the
    embedding but is not.
  """
  if not config.tied or _HEAD not in tensors:
    return config, ()
  untied = dataclasses.replace(config, tied=False)
  if not config.scaled:
    return untied, ()
  table = tensors.get(_table(tensors))
  if table is None or stored.equal(tensors[_HEAD], table):
    return config, ()
  note = (
    f"{_HEAD} is not the embedding, though config.json says "
    "tie_word_embeddings: the head is used as it is in the file, untied."
  )
  return untied, (note,)


def params(
  config: T5Config,
  tensors: Mapping[str, tensors_.Tensor],
  *,
  scan: bool = False,
  dtype: typing.DTypeLike = jnp.float32,
  place: stored.Place = stored.on_one_device,
) -> dict[str, Any]:
  """Reads the parameters of `T5` from a Hugging Face checkpoint.

  Args:
    config: the sizes.
    tensors: the tensors by name; a linear weight is (out, in).
    scan: whether to stack the layers along a first axis, as `T5(scan=True)`
      does.
    dtype: the dtype of the parameters.
    place: makes a parameter; by default an array on one device.

  Returns:
    The tree of parameters that `place` made; a Dense kernel is (in, out).

  Raises:
    WeightsError: tensors are missing, have a wrong shape, are not floats, or
      are unknown. One message lists the first of them, and nothing is read.
  """
  check(config, tensors)
  return stored.read(
    _plan(config, scan, _table(tensors)), tensors, dtype, place
  )


def check(config: T5Config, tensors: Mapping[str, tensors_.Tensor]) -> None:
  """Refuses tensors that `params` cannot read.

  Raises:
    WeightsError: as `params`.
  """
  duplicates = (*_TABLES, *([_HEAD] if config.tied else []), _UNUSED)
  layers = config.num_layers + config.num_decoder_layers
  stored.check_layers(layers, tensors, "T5")
  stored.check(
    _plan(config, False, _table(tensors)),
    tensors,
    lambda name: name in duplicates,
    "T5",
  )
  table = _table(tensors)
  for name in (*_TABLES, *([_HEAD] if config.tied else [])):
    if name == table or name not in tensors:
      continue
    if not stored.equal(tensors[name], tensors[table]):
      raise weights.WeightsError(
        f"{name} is not {table}, and the configuration of this T5 has one "
        "array for both."
      )


def _table(tensors: Mapping[str, tensors_.Tensor]) -> str:
  return next((name for name in _TABLES if name in tensors), _TABLES[0])


def tensors(
  config: T5Config, params: Mapping[str, Any], *, scan: bool = False
) -> dict[str, np.ndarray]:
  """Returns a Hugging Face checkpoint's tensors; the inverse of `params`."""
  return stored.tensors(_plan(config, scan, _TABLES[0]), params)


def modules(
  config: T5Config, scan: bool = False
) -> dict[str, str | tuple[str, ...]]:
  """Returns the path of each parameter, and its module or stacked modules.

  The embeddings are left out, because PEFT has several names for them.
  """
  found = stored.modules(_plan(config, scan, _TABLES[0]))
  return {k: name for k, name in found.items() if not k.endswith("/embedding")}


def _plan(
  config: T5Config, scan: bool, table: str
) -> dict[stored.Path, stored.Source]:
  """Returns the plan: from a parameter's path to where its values are."""
  shape = (config.vocab_size, config.hidden_size)
  plan: dict[stored.Path, stored.Source] = {
    ("shared", "embedding"): stored.Source((table,), shape, False, False)
  }
  if not config.tied:
    plan["lm_head", "kernel"] = stored.Source((_HEAD,), shape, True, False)
  for stack, count in (
    ("encoder", config.num_layers),
    ("decoder", config.num_decoder_layers),
  ):
    plan |= _stack(config, scan, stack, count)
  return plan


def _stack(
  config: T5Config, scan: bool, stack: str, count: int
) -> dict[stored.Path, stored.Source]:
  width, inner = config.hidden_size, config.intermediate_size
  heads = config.num_heads * config.head_dim
  # For a layer: our module, Hugging Face's module, and its linear weights.
  attention = {"q": (heads, width), "k": (heads, width), "v": (heads, width)}
  attention["o"] = (width, heads)
  up = ("wi",) if config.feed_forward == "relu" else ("wi_0", "wi_1")
  parts = [
    ("self_attention", "SelfAttention", attention),
    ("cross_attention", "EncDecAttention", attention),
    (
      "feed_forward",
      "DenseReluDense",
      {**dict.fromkeys(up, (inner, width)), "wo": (width, inner)},
    ),
  ]
  if stack == "encoder":
    del parts[1]
  # Path -> the end of the tensor's name, and its shape.
  leaves: dict[stored.Path, tuple[str, tuple[int, ...]]] = {}
  for i, (ours, theirs, denses) in enumerate(parts):
    norm = f"layer.{i}.layer_norm.weight"
    leaves[f"{ours}_layer_norm", "scale"] = norm, (width,)
    for name, shape in denses.items():
      end = f"layer.{i}.{theirs}.{name}.weight"
      leaves[ours, name, "kernel"] = end, shape
  bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
  plan: dict[stored.Path, stored.Source] = {
    (stack, "final_layer_norm", "scale"): stored.Source(
      (f"{stack}.final_layer_norm.weight",), (width,), False, False
    ),
    (stack, "relative_attention_bias", "embedding"): stored.Source(
      (bias,), (config.num_buckets, config.num_heads), False, False
    ),
  }
  for path, (end, shape) in leaves.items():
    names = tuple(f"{stack}.block.{i}.{end}" for i in range(count))
    turned = path[-1] == "kernel"
    if scan:
      plan[stack, "layers", *path] = stored.Source(names, shape, turned, True)
      continue
    for i, name in enumerate(names):
      source = stored.Source((name,), shape, turned, False)
      plan[stack, f"layers_{i}", *path] = source
  return plan
