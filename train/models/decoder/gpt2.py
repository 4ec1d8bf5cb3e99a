"""The names of a decoder's parts in GPT-2's config.json and tensors.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
Missing keys have transformers' defaults.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ... import checked, options
from .. import activations
from ..io import tensors as tensors_
from ..io import weights

MODEL_TYPE = "gpt2"

FIELDS: Mapping[str, Any] = {
  "learned_positions": True,
  "layer_norm": True,
  "joint_qkv": True,
  "gated": False,
  "out_bias": True,
  "mlp_bias": True,
}
"""Fields of DecoderConfig that every GPT-2 has."""

MODULES = {
  "layers": "h",
  "embed_tokens": "wte",
  "embed_positions": "wpe",
  "norm": "ln_f",
  "input_layernorm": "ln_1",
  "post_attention_layernorm": "ln_2",
  "self_attn.qkv_proj": "attn.c_attn",
  "self_attn.o_proj": "attn.c_proj",
  "mlp.up_proj": "mlp.c_fc",
  "mlp.down_proj": "mlp.c_proj",
}
"""From a module of `Decoder` to its name in transformers."""

BUFFER = r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"
"""The names of masks, which old versions saved as tensors."""

# Key of another decoder's config.json -> GPT-2's key and its default.
_SIZES = {
  "vocab_size": ("vocab_size", 50257),
  "hidden_size": ("n_embd", 768),
  "num_hidden_layers": ("n_layer", 12),
  "num_attention_heads": ("n_head", 12),
  "max_position_embeddings": ("n_positions", 1024),
}
# Keys that change the equations, and the only implemented value.
_ONLY = {
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  "add_cross_attention": False,
}
# Hidden scores are set to this value or a lower one.
_HIDDEN = -1e4


def read(config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
  """Translates GPT-2's config.json to the keys of other decoders.

  Returns:
    a config.json with the keys of other decoders, and the activation of the
    feed-forward layer, by transformers' name.

  Raises:
    ValueError: a value is wrong or not implemented.
  """
  for key, only in _ONLY.items():
    if checked.truth(config, key, only) is not only:
      raise ValueError(
        f"{key} must be {str(only).lower()}, the only one that this decoder "
        f"implements, got {str(not only).lower()}."
      )
  sizes = {}
  for key, (own, default) in _SIZES.items():
    sizes[key] = config.get(own, config.get(key, default))
    _check_size(own, sizes[key])
  inner = config.get("n_inner")
  if inner is None:
    inner = 4 * sizes["hidden_size"]
  _check_size("n_inner", inner)
  epsilon = config.get("layer_norm_epsilon", 1e-5)
  if not options.fits(epsilon, float) or not epsilon > 0:
    raise ValueError(
      "layer_norm_epsilon must be a positive number, got "
      f"{options.shown(epsilon)}."
    )
  activation = config.get("activation_function", "gelu_new")
  activations.check("activation_function", activation)
  return {
    **sizes,
    "intermediate_size": inner,
    "rms_norm_eps": epsilon,
    "tie_word_embeddings": config.get("tie_word_embeddings", True),
  }, activation


def _check_size(key: str, value: Any) -> None:
  if not options.fits(value, int) or value < 1:
    raise ValueError(
      f"{key} must be a positive integer, got {options.shown(value)}."
    )


def check_buffer(name: str, tensor: tensors_.Tensor) -> None:
  """Refuses a `BUFFER` that hides other tokens than this decoder does.

  Raises:
    WeightsError: if it hides other tokens.
  """
  values = np.asarray(tensor[(slice(None),) * len(tensor.shape)])
  if name.endswith("masked_bias"):
    same = values.size == 1 and values.item() <= _HIDDEN
  else:
    size = values.shape[-1] if values.ndim else 0
    same = values.size == size * size and np.array_equal(
      values.reshape(size, size) != 0, np.tri(size, dtype=bool)
    )
  if not same:
    raise weights.WeightsError(
      f"{name} is not the mask of a causal decoder, the only one that is "
      "implemented: a token sees itself and all before it."
    )
