"""Converts Hugging Face's tensors of a decoder to parameters of `Decoder`.

The names may lack the prefix 'model.', as in a folder of a model without its
head.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import re
from typing import Any

from jax import typing
import jax.numpy as jnp
import numpy as np

from ..io import stored, weights
from ..io import tensors as tensors_
from . import gpt2, images, rope
from .config import DecoderConfig

_HEAD = "lm_head.weight"
# Buffers, which old checkpoints saved, some in half precision.
_ROTARY = re.compile(
  r"model\.(language_model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?inv_freq"
)
_MASK = re.compile(gpt2.BUFFER)
_HALF = 1e-2


def with_own_head(
  config: DecoderConfig, tensors: Mapping[str, tensors_.Tensor]
) -> tuple[DecoderConfig, tuple[str, ...]]:
  """Returns the configuration of a checkpoint, untied if the head differs.

  After a merge or a resize, transformers 5 writes files whose config.json says
  tied although the head is not the embedding. It does not tie them when it
  reads them.

  Returns:
    the configuration, and a sentence for the user if it was changed.
  """
  found = _by_full_name(config, tensors)
  table = f"{_full_name(config, 'embed_tokens')}.weight"
  if not config.tied or not {_HEAD, table} <= found.keys():
    return config, ()
  if stored.equal(found[_HEAD], found[table]):
    return config, ()
  note = (
    f"{_HEAD} is not the embedding, though config.json says "
    "tie_word_embeddings: the head is used as it is in the file, untied."
  )
  return dataclasses.replace(config, tied=False), (note,)


def left_out(
  config: DecoderConfig, tensors: Mapping[str, tensors_.Tensor]
) -> tuple[str, ...]:
  """Returns a sentence for the user if a part of the model is not read."""
  if not config.reads_images or not any(map(images.are_read_by, tensors)):
    return ()
  return (
    "The model's part for images is not read: the model is trained, and "
    "answers, on texts alone.",
  )


def carried(
  config: DecoderConfig, tensors: Mapping[str, tensors_.Tensor]
) -> dict[str, np.ndarray]:
  """Returns tensors that `params` leaves out but an export needs, by name."""
  if not config.reads_images:
    return {}
  return {
    images.new_name(name): tensor[(slice(None),) * len(tensor.shape)]
    for name, tensor in tensors.items()
    if images.are_read_by(name)
  }


def params(
  config: DecoderConfig,
  tensors: Mapping[str, tensors_.Tensor],
  *,
  scan: bool = False,
  dtype: typing.DTypeLike = jnp.float32,
  place: stored.Place = stored.on_one_device,
) -> dict[str, Any]:
  """Reads the parameters of `Decoder` from a Hugging Face checkpoint.

  A tensor is read when its parameter is placed, in the parts that `place` asks
  for. So the host never holds more than one part of one parameter.

  Args:
    config: the sizes.
    tensors: the tensors by name; a linear weight is (out, in).
    scan: whether to stack the layers along a first axis, as
      `Decoder(scan=True)` does.
    dtype: the dtype of the parameters.
    place: makes a parameter; by default an array on one device.

  Returns:
    The tree of parameters that `place` made; a Dense kernel is (in, out).

  Raises:
    WeightsError: tensors are missing, have a wrong shape, are not floats, or
      are unknown. One message lists the first of them, and nothing is read.
  """
  check(config, tensors)
  found = _by_full_name(config, tensors)
  return stored.read(_plan(config, scan), found, dtype, place)


def check(
  config: DecoderConfig, tensors: Mapping[str, tensors_.Tensor]
) -> None:
  """Refuses tensors that `params` cannot read.

  Raises:
    WeightsError: as `params`.
  """

  found = _by_full_name(config, tensors)

  def ignored(name: str) -> bool:
    # Some checkpoints also store a tied head.
    duplicate = config.tied and name == _HEAD
    return duplicate or _check_of(config, name) is not None

  stored.check_layers(config.num_layers, found, "decoder")
  stored.check(_plan(config, False), found, ignored, "decoder")
  for name in found:
    check_buffer = _check_of(config, name)
    if check_buffer is not None:
      check_buffer(name, found[name])
  if with_own_head(config, tensors)[0] != config:
    raise weights.WeightsError(
      f"{_HEAD} is not the embedding, and the configuration is tied."
    )


def _check_of(
  config: DecoderConfig, name: str
) -> Callable[[str, tensors_.Tensor], None] | None:
  """Returns the check of a buffer of that name; None for a weight."""
  if config.model_type == gpt2.MODEL_TYPE:
    return gpt2.check_buffer if _MASK.fullmatch(name) else None
  if _ROTARY.fullmatch(name):
    return functools.partial(_check_rotary, config)
  return None


def _check_rotary(
  config: DecoderConfig, name: str, tensor: tensors_.Tensor
) -> None:
  """Refuses rotary frequencies that differ from the configuration's.

  Raises:
    WeightsError: if they differ.
  """
  plain = rope.frequencies(config.rope_theta, config.head_dim)
  scaling = config.rope_scaling
  # Older versions always saved unscaled frequencies.
  allowed = (
    [plain]
    if scaling is None
    else [plain, scaling.frequencies(config.rope_theta, config.head_dim)]
  )
  if tuple(tensor.shape) == plain.shape:
    values = tensor[(slice(None),)].astype(np.float64)
    if any(np.allclose(values, x, rtol=_HALF, atol=0) for x in allowed):
      return
  raise weights.WeightsError(
    f"{name} holds other rotary frequencies than rope_theta "
    f"{config.rope_theta} and the rotary scaling of the configuration give; "
    "transformers uses the configuration's. Correct config.json, or take the "
    "tensor out of the file."
  )


def tensors(
  config: DecoderConfig, params: Mapping[str, Any], *, scan: bool = False
) -> dict[str, np.ndarray]:
  """Returns a Hugging Face checkpoint's tensors; the inverse of `params`."""
  return stored.tensors(_plan(config, scan), params)


def modules(
  config: DecoderConfig, scan: bool = False
) -> dict[str, str | tuple[str, ...]]:
  """Returns the path of each parameter, and its module or stacked modules."""
  return stored.modules(_plan(config, scan))


def _plan(
  config: DecoderConfig, scan: bool
) -> dict[stored.Path, stored.Source]:
  """Returns the plan: from a parameter's path to where its values are."""
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
  if config.joint_qkv:
    sizes = [denses.pop(("self_attn", f"{x}_proj"))[0] for x in "qkv"]
    denses["self_attn", "qkv_proj"] = (sum(sizes), width)
  if not config.gated:
    del denses["mlp", "gate_proj"]
  # GPT-2 stores linear weights as (in, out), other models as (out, in).
  turned = config.model_type != gpt2.MODEL_TYPE
  # For a layer: the path, the end of the tensor's name, and its shape.
  parts: list[tuple[stored.Path, str, tuple[int, ...]]] = []
  for path, shape in denses.items():
    parts.append(
      ((*path, "kernel"), "weight", shape if turned else shape[::-1])
    )
    if _has_bias(config, path[-1]):
      parts.append(((*path, "bias"), "bias", shape[:1]))
  if config.qk_norm:
    parts += [
      (("self_attn", name, "scale"), "weight", (config.head_dim,))
      for name in ("q_norm", "k_norm")
    ]
  norms = ["input_layernorm", "post_attention_layernorm"]
  if config.post_norms:
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
  of_norm = {"scale": "weight"}
  if config.layer_norm:
    of_norm["bias"] = "bias"
  parts += [
    ((name, ours), theirs, (width,))
    for name in norms
    for ours, theirs in of_norm.items()
  ]
  table = (config.vocab_size, width)

  def whole(name: str, shape: tuple[int, ...], end: str = "weight"):
    full = f"{_full_name(config, name)}.{end}"
    return stored.Source((full,), shape, False, False)

  plan: dict[stored.Path, stored.Source] = {
    ("embed_tokens", "embedding"): whole("embed_tokens", table)
  }
  if config.learned_positions:
    positions = (config.max_positions, width)
    plan["embed_positions", "embedding"] = whole("embed_positions", positions)
  for ours, theirs in of_norm.items():
    plan["norm", ours] = whole("norm", (width,), theirs)
  if not config.tied:
    plan["lm_head", "kernel"] = stored.Source((_HEAD,), table, True, False)
  layers = range(config.num_layers)
  for path, end, shape in parts:
    module = ".".join(path[:-1])
    names = [f"{_full_name(config, module, i)}.{end}" for i in layers]
    transposed = path[-1] == "kernel" and turned
    if scan:
      plan["layers", *path] = stored.Source(
        tuple(names), shape, transposed, True
      )
      continue
    for i in layers:
      source = stored.Source((names[i],), shape, transposed, False)
      plan[f"layers_{i}", *path] = source
  return plan


def _full_name(
  config: DecoderConfig, module: str, layer: int | None = None
) -> str:
  """Returns transformers' name of a module, which may be within a layer."""
  names = gpt2.MODULES if config.model_type == gpt2.MODEL_TYPE else {}
  within = "" if layer is None else f"{names.get('layers', 'layers')}.{layer}."
  return f"{config.prefix}{within}{names.get(module, module)}"


def _by_full_name(
  config: DecoderConfig, tensors: Mapping[str, tensors_.Tensor]
) -> Mapping[str, tensors_.Tensor]:
  """Returns the tensors that read texts, by the names in `_plan`."""
  if config.reads_images:
    return {
      images.new_name(name): tensor
      for name, tensor in tensors.items()
      if not images.are_read_by(name)
    }
  if any(name.startswith(config.prefix) for name in tensors):
    return tensors
  return {
    name if name == _HEAD else config.prefix + name: tensor
    for name, tensor in tensors.items()
  }


def _has_bias(config: DecoderConfig, module: str) -> bool:
  if module in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
    return config.qkv_bias
  return config.out_bias if module == "o_proj" else config.mlp_bias
