"""Reads the keys of config.json that only Gemma 1, 2 and 3 have.

Gemma Team, arXiv 2403.08295, 2408.00118 and 2503.19786. Missing keys have
transformers' defaults.
"""

from collections.abc import Mapping
from typing import Any

from ... import checked, options

WITH_IMAGES = "gemma3"
"""The `model_type` of a Gemma 3 that reads images too."""

ARCHITECTURES = {
  "gemma": ("GemmaForCausalLM", ""),
  "gemma2": ("Gemma2ForCausalLM", ""),
  "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
  WITH_IMAGES: (
    "Gemma3ForConditionalGeneration",
    "Gemma3ForSequenceClassification",
  ),
}
"""From each `model_type` to two classes of transformers.

The first is the language model. The second has a head for sequences; "" means
that its name follows from the first.
"""

_GEMMA = {"head_dim": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
_GEMMA2 = _GEMMA | {"sliding_window": 4096}
_GEMMA3 = _GEMMA2 | {
  "vocab_size": 262208,
  "hidden_size": 2304,
  "intermediate_size": 9216,
  "num_hidden_layers": 26,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "max_position_embeddings": 131072,
}
DEFAULTS: dict[str, Mapping[str, Any]] = {
  "gemma": _GEMMA,
  "gemma2": _GEMMA2,
  "gemma3_text": _GEMMA3,
  WITH_IMAGES: _GEMMA3,
}
"""From each `model_type` to the values of keys that config.json may lack."""

NUMBERS = {
  "query_scalar": "query_pre_attn_scalar",
  "attention_softcap": "attn_logit_softcapping",
  "logit_softcap": "final_logit_softcapping",
  "local_rope_theta": "rope_local_base_freq",
}
"""From each optional field of DecoderConfig to the key of config.json."""

_TANH = "gelu_pytorch_tanh"
_QUERY_SCALAR = 256
_SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_LOCAL, _FULL = "sliding_attention", "full_attention"
# One layer in so many sees all tokens.
_PATTERN = {"gemma2": 2, "gemma3_text": 6, WITH_IMAGES: 6}
_THETA, _LOCAL_THETA = 1000000.0, 10000.0


def read(
  kind: str, config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Translates a Gemma's config.json to the keys of other decoders.

  Args:
    kind: the `model_type`.
    config: the config.json, with `DEFAULTS`; its number of layers must have
      been checked.

  Returns:
    a config.json with the keys of other decoders, the types of all layers and
    one rotary scaling; and the fields of DecoderConfig that only Gemma has.

  Raises:
    ValueError: a value is wrong or not implemented.
  """
  if checked.truth(config, "use_bidirectional_attention", False):
    raise ValueError(
      "use_bidirectional_attention must be false: this decoder sees no token "
      "after its own."
    )
  fields = {
    "hidden_act": _activation(kind, config),
    "norm_offset": True,
    "embed_scaled": True,
  }
  if kind == "gemma":
    return {**config}, fields
  fields |= {
    "post_norms": True,
    "query_scalar": config.get("query_pre_attn_scalar", _QUERY_SCALAR),
  }
  softcaps = _SOFTCAPS if kind == "gemma2" else dict.fromkeys(_SOFTCAPS)
  for field in ("attention_softcap", "logit_softcap"):
    key = NUMBERS[field]
    fields[field] = config.get(key, softcaps[key])
  config = _with_layer_types(kind, config)
  if kind != "gemma2":
    config, fields["local_rope_theta"] = _with_one_rope(config)
  return config, fields


def _activation(kind: str, config: Mapping[str, Any]) -> str:
  if kind == "gemma":
    # Older files say gelu, but Gemma has always had the tanh form.
    name = config.get("hidden_act", _TANH)
    return _TANH if name == "gelu" else name
  return config.get("hidden_activation", _TANH)


def _with_layer_types(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
  if config.get("layer_types") is not None:
    return {**config}
  pattern = config.get("sliding_window_pattern", _PATTERN[kind])
  if not options.fits(pattern, int) or pattern < 1:
    raise ValueError(
      "sliding_window_pattern must be a positive integer, got "
      f"{options.shown(pattern)}."
    )
  layers = range(config["num_hidden_layers"])
  types = [_LOCAL if (i + 1) % pattern else _FULL for i in layers]
  return {**config, "layer_types": types}


def _with_one_rope(
  config: Mapping[str, Any],
) -> tuple[dict[str, Any], Any]:
  """Returns a config with one rotary scaling, and the local layers' base.

  The scaling is that of the layers that see all tokens.
  """
  both = config.get("rope_parameters") or {}
  if not options.fits(both, dict):
    raise ValueError(
      f"rope_parameters must be an object or null, got {options.shown(both)}."
    )
  full, local = (both.get(name) or {} for name in (_FULL, _LOCAL))
  for name, part in ((_FULL, full), (_LOCAL, local)):
    if not options.fits(part, dict):
      raise ValueError(
        f"rope_parameters, {name}, must be an object, got "
        f"{options.shown(part)}."
      )
  kind = local.get("rope_type", "default")
  if kind != "default":
    raise ValueError(
      f"rope_parameters, {_LOCAL}, must have the rope_type 'default', the only "
      f"one that this decoder implements there, got {options.shown(kind)}."
    )
  scaling = config.get("rope_scaling")
  if not options.fits(scaling, dict | None):
    raise ValueError(
      f"rope_scaling must be an object or null, got {options.shown(scaling)}."
    )
  theta = config.get("rope_theta", _THETA)
  full = {"rope_theta": theta, **full, **(scaling or {})}
  base = local.get(
    "rope_theta", config.get("rope_local_base_freq", _LOCAL_THETA)
  )
  rest = {k: v for k, v in config.items() if k != "rope_scaling"}
  return {**rest, "rope_parameters": full}, base
