"""Hugging Face's Llama and Qwen 2 tensors as the parameters of `Decoder`."""

from collections.abc import Mapping
import re
from typing import Any

from jax import typing
import jax.numpy as jnp
import numpy as np

from ..io import stored
from ..io import tensors as tensors_
from .config import DecoderConfig

# A buffer, not a weight; old checkpoints saved it.
_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def params(
  config: DecoderConfig,
  tensors: Mapping[str, tensors_.Tensor],
  *,
  scan: bool = False,
  dtype: typing.DTypeLike = jnp.float32,
  place: stored.Place = stored.on_one_device,
) -> dict[str, Any]:
  """Parameters of `Decoder` from a Hugging Face checkpoint, one at a time.

  A tensor is read when its parameter is placed and in the parts that `place`
  asks for, so that the host never holds more than one part of one parameter.

  Args:
    config: the sizes.
    tensors: tensors by name; a linear weight is (out, in).
    scan: stack the layers along a first axis, as `Decoder(scan=True)` does.
    dtype: of the parameters.
    place: makes a parameter; by default an array on one device.

  Returns:
    The tree of what `place` made; a Dense kernel is (in, out).

  Raises:
    WeightsError: tensors are missing, of another shape than the configuration
      says, no floats, or unknown to it; the first are named together, and
      nothing was read.
  """
  check(config, tensors)
  return stored.read(_plan(config, scan), tensors, dtype, place)


def check(
  config: DecoderConfig, tensors: Mapping[str, tensors_.Tensor]
) -> None:
  """Refuses tensors that `params` cannot read.

  Raises:
    WeightsError: as `params`.
  """

  def ignored(name: str) -> bool:
    # Some checkpoints hold the head that is tied as well.
    duplicate = config.tied and name == "lm_head.weight"
    return duplicate or _BUFFER.fullmatch(name) is not None

  stored.check_layers(config.num_layers, tensors, "decoder")
  stored.check(_plan(config, False), tensors, ignored, "decoder")


def tensors(
  config: DecoderConfig, params: Mapping[str, Any], *, scan: bool = False
) -> dict[str, np.ndarray]:
  """Undoes `params`: the tensors of a Hugging Face checkpoint."""
  return stored.tensors(_plan(config, scan), params)


def modules(
  config: DecoderConfig, scan: bool = False
) -> dict[str, str | tuple[str, ...]]:
  """The path of each parameter, and its module; of stacked layers, all."""
  return stored.modules(_plan(config, scan))


def _plan(
  config: DecoderConfig, scan: bool
) -> dict[stored.Path, stored.Source]:
  """Path in the parameter tree -> where its values are."""
  width = config.hidden_size
  heads = config.num_heads * config.head_dim
  kv_heads = config.num_kv_heads * config.head_dim
  inner = config.intermediate_size
  denses = {
    ("self_attn", "q_proj"): (heads, width),
    ("self_attn", "k_proj"): (kv_heads, width),
    ("self_attn", "v_proj"): (kv_heads, width),
    ("self_attn", "o_proj"): (width, heads),
    ("mlp", "gate_proj"): (inner, width),
    ("mlp", "up_proj"): (inner, width),
    ("mlp", "down_proj"): (width, inner),
  }
  # Within a layer: path, the end of the tensor's name, and its shape.
  parts: list[tuple[stored.Path, str, tuple[int, ...]]] = []
  for path, shape in denses.items():
    parts.append(((*path, "kernel"), "weight", shape))
    if config.qkv_bias and path[-1] in ("q_proj", "k_proj", "v_proj"):
      parts.append(((*path, "bias"), "bias", shape[:1]))
  parts += [
    ((name, "scale"), "weight", (width,))
    for name in ("input_layernorm", "post_attention_layernorm")
  ]
  table = (config.vocab_size, width)

  def whole(name: str, shape: tuple[int, ...], transposed: bool = False):
    return stored.Source((f"{name}.weight",), shape, transposed, False)

  plan: dict[stored.Path, stored.Source] = {
    ("embed_tokens", "embedding"): whole("model.embed_tokens", table),
    ("norm", "scale"): whole("model.norm", (width,)),
  }
  if not config.tied:
    plan["lm_head", "kernel"] = whole("lm_head", table, True)
  layers = range(config.num_layers)
  for path, end, shape in parts:
    names = [f"model.layers.{i}.{'.'.join(path[:-1])}.{end}" for i in layers]
    transposed = path[-1] == "kernel"
    if scan:
      plan["layers", *path] = stored.Source(
        tuple(names), shape, transposed, True
      )
      continue
    for i in layers:
      source = stored.Source((names[i],), shape, transposed, False)
      plan[f"layers_{i}", *path] = source
  return plan
