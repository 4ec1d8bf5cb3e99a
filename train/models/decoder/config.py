"""Sizes of Llama-family decoders: from a config.json, or by name."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from ... import checked, options

# Field of DecoderConfig -> key of Hugging Face's config.json.
_HF_KEYS = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "intermediate_size": "intermediate_size",
  "max_positions": "max_position_embeddings",
  "rms_norm_eps": "rms_norm_eps",
}
_INTEGERS = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "intermediate_size": "intermediate_size",
  "max_positions": "max_position_embeddings",
}
# Keys of config.json that change the equations, and the only values of them
# that are implemented; absent is implemented too.
_ONLY = {
  "hidden_act": ("silu",),
  "attention_bias": (False, None),  # Llama's would bias the output as well
  "mlp_bias": (False, None),
  "use_sliding_window": (False, None),
  "rope_interleaved": (False, None),
}
_THETA = 10000.0  # of Su et al. (2021), where config.json is silent

MODEL_TYPES = ("llama", "qwen2")
"""What `DecoderConfig.from_hf` reads."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's stretching of the slow rotary frequencies.

  Wavelengths above `original_max_position_embeddings / low_freq_factor` are
  multiplied by `factor`, those below `.../ high_freq_factor` are left alone,
  and the frequencies of those between are interpolated (Llama Team,
  arXiv 2407.21783; transformers, modeling_rope_utils.py).

  Raises:
    ValueError: a value is not a positive number, or the two frequency factors
      are not in order.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not _is_positive(value):
        raise ValueError(
          f"{field.name} of the rotary scaling must be a positive number, got "
          f"{options.shown(value)}."
        )
    if self.low_freq_factor >= self.high_freq_factor:
      raise ValueError(
        "low_freq_factor of the rotary scaling must be below high_freq_factor, "
        f"got {self.low_freq_factor} and {self.high_freq_factor}."
      )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes of a decoder of Llama's kind (Touvron et al., arXiv 2302.13971).

  Attributes:
    vocab_size: rows of the embedding, which may exceed the tokenizer's.
    hidden_size: D, the width.
    num_layers: decoder layers.
    num_heads: H, heads of the queries.
    num_kv_heads: heads of keys and values, each shared by H / num_kv_heads.
    head_dim: K, the width of a head; H * K need not be D.
    intermediate_size: width within the feed-forward.
    max_positions: the longest sequence the model was made for.
    rms_norm_eps: added to the mean square.
    rope_theta: base of the rotary wavelengths.
    rope_scaling: None, or Llama 3's.
    tied: whether the head is the transposed embedding.
    qkv_bias: whether queries, keys and values have a bias, as Qwen 2's.

  Raises:
    ValueError: a size is not a positive integer, the key-value heads do not
      divide the heads, or the width of a head is odd.
  """

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  intermediate_size: int
  max_positions: int
  rms_norm_eps: float = 1e-5
  rope_theta: float = _THETA
  rope_scaling: RopeScaling | None = None
  tied: bool = False
  qkv_bias: bool = False

  def __post_init__(self):
    for field, key in _INTEGERS.items():
      value = getattr(self, field)
      _check_size(key, value)
    for field in ("rms_norm_eps", "rope_theta"):
      value = getattr(self, field)
      if not _is_positive(value):
        raise ValueError(
          f"{field} must be a positive number, got {options.shown(value)}."
        )
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        "num_attention_heads must be a multiple of num_key_value_heads, got "
        f"{self.num_heads} and {self.num_kv_heads}."
      )
    if self.head_dim % 2:
      raise ValueError(
        "head_dim must be even, for its halves are turned together, got "
        f"{self.head_dim}."
      )

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
    """The configuration that a Hugging Face config.json describes.

    Args:
      config: the decoded JSON object of a Llama or a Qwen 2, with its rotary
        parameters as transformers 4 writes them (rope_theta and rope_scaling)
        or as 5 does (rope_parameters).

    Raises:
      ValueError: a key is missing or has a value that this decoder does not
        implement (another model_type, rotary type or activation, a bias in
        Llama, a sliding window).
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
      raise ValueError(
        f"model_type must be one of {', '.join(MODEL_TYPES)}, got "
        f"{options.shown(kind)}."
      )
    missing = [key for key in _HF_KEYS.values() if key not in config]
    if missing:
      raise ValueError(f"The {kind} configuration lacks {', '.join(missing)}.")
    for key, allowed in _ONLY.items():
      if key in config and config[key] not in allowed:
        raise ValueError(
          f"{key} must be {allowed[0]!r}, the only one that this decoder "
          f"implements, got {options.shown(config[key])}."
        )
    layers = config.get("layer_types")
    if not options.fits(layers, list | None) or any(
      layer != "full_attention" for layer in layers or ()
    ):
      raise ValueError(
        "layer_types must be a list, of 'full_attention' alone, the only one "
        f"that this decoder implements, got {options.shown(layers)}."
      )
    theta, scaling = _rope(config)
    sizes = {field: config[key] for field, key in _HF_KEYS.items()}
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim")
    if head_dim is None:
      head_dim = _head_dim(config["hidden_size"], heads)
    kv_heads = config.get("num_key_value_heads")
    return cls(
      **sizes,
      num_kv_heads=heads if kv_heads is None else kv_heads,
      head_dim=head_dim,
      rope_theta=theta,
      rope_scaling=scaling,
      tied=checked.truth(config, "tie_word_embeddings", False),
      qkv_bias=kind == "qwen2",
    )


def _head_dim(hidden_size: Any, num_heads: Any) -> int:
  for key, value in (
    ("hidden_size", hidden_size),
    ("num_attention_heads", num_heads),
  ):
    _check_size(key, value)
  if hidden_size % num_heads:
    raise ValueError(
      "hidden_size must be a multiple of num_attention_heads where head_dim is "
      f"not given, got {hidden_size} and {num_heads}."
    )
  return hidden_size // num_heads


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
  """The rotary base and scaling, from either generation of config.json."""
  for key in ("rope_parameters", "rope_scaling"):
    if not options.fits(config.get(key), dict | None):
      raise ValueError(
        f"The rotary parameters, {key}, must be an object or null, got "
        f"{options.shown(config[key])}."
      )
  rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
  partial = rope.get("partial_rotary_factor", 1.0)
  if partial != 1.0:
    raise ValueError(
      "partial_rotary_factor must be 1.0, the only one that this decoder "
      f"implements, got {options.shown(partial)}."
    )
  theta = rope.get("rope_theta", config.get("rope_theta", _THETA))
  # Older files say `type`.
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise ValueError(
      "rope_type must be 'default' or 'llama3', the only ones that this "
      f"decoder implements, got {options.shown(kind)}."
    )
  names = [field.name for field in dataclasses.fields(RopeScaling)]
  missing = [name for name in names if name not in rope]
  if missing:
    raise ValueError(
      f"The rotary parameters of type 'llama3' lack {', '.join(missing)}."
    )
  return theta, RopeScaling(**{name: rope[name] for name in names})


def _check_size(key: str, value: Any) -> None:
  if not options.fits(value, int) or value < 1:
    raise ValueError(
      f"{key} must be a positive integer, got {options.shown(value)}."
    )


def _is_positive(value: Any) -> bool:
  return options.fits(value, float) and value > 0


PRESETS: dict[str, DecoderConfig] = {
  "llama2-7b": DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=11008,
    max_positions=4096,
  ),
  "llama3.1-8b": DecoderConfig(
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    max_positions=131072,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=8192,
    ),
  ),
  "qwen2.5-0.5b": DecoderConfig(
    vocab_size=151936,
    hidden_size=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=4864,
    max_positions=32768,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    tied=True,
    qkv_bias=True,
  ),
  "qwen2.5-7b": DecoderConfig(
    vocab_size=152064,
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=18944,
    max_positions=131072,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    qkv_bias=True,
  ),
  "qwen2.5-14b": DecoderConfig(
    vocab_size=152064,
    hidden_size=5120,
    num_layers=48,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=13824,
    max_positions=131072,
    rms_norm_eps=1e-5,
    rope_theta=1000000.0,
    qkv_bias=True,
  ),
  "smollm2-135m": DecoderConfig(
    vocab_size=49152,
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    max_positions=8192,
    rope_theta=100000.0,
    tied=True,
  ),
}
"""The sizes of published models, as in their config.json."""
