"""Sizes of ModernBERTs, from a config.json."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from ... import options
from .. import activations, pooling

MODEL_TYPE = "modernbert"
# Field of ModernBertConfig -> key of Hugging Face's config.json.
_HF_KEYS = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "intermediate_size": "intermediate_size",
}
# Keys of config.json that change the equations, and their implemented values. A
# key may be missing.
_ONLY = dict.fromkeys(
  ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), (False, None)
)
_FULL, _LOCAL = "full_attention", "sliding_attention"
# transformers' defaults.
_THETAS = {_FULL: 160_000.0, _LOCAL: 10_000.0}
_OLD_THETAS = {_FULL: "global_rope_theta", _LOCAL: "local_rope_theta"}
_EVERY, _WINDOW, _EPSILON = 3, 128, 1e-5


@dataclasses.dataclass(frozen=True)
class ModernBertConfig:
  """Sizes of a ModernBERT (Warner et al., arXiv 2412.13663).

  Attributes:
    vocab_size: the rows of the embedding.
    hidden_size: D, the width.
    num_layers: the layers of the encoder.
    num_heads: H.
    intermediate_size: the width inside the feed-forward layer, of each of its
      two factors.
    local_layers: for each layer, whether it sees only a window; None: see
      `every`.
    every: the first one of every so many layers sees all tokens.
    window: how many tokens a local layer sees to either side.
    full_theta: the base of the rotary wavelengths in layers that see all.
    local_theta: the base of the rotary wavelengths in local layers.
    norm_eps: the number added to the variance.
    hidden_act: the activation of the feed-forward layer.
    prediction: whether the pretraining's head, a linear layer and a norm, is
      between the pooling and a classifier's head, as in transformers.
    prediction_act: the activation of the pretraining's head.
    pooling: how a classifier pools hidden states; see `pooling.pooled`.

  Raises:
    ValueError: a value is not implemented.
  """

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  intermediate_size: int
  local_layers: tuple[bool, ...] | None = None
  every: int = _EVERY
  window: int = _WINDOW // 2
  full_theta: float = _THETAS[_FULL]
  local_theta: float = _THETAS[_LOCAL]
  norm_eps: float = _EPSILON
  hidden_act: str = "gelu"
  prediction: bool = False
  prediction_act: str = "gelu"
  pooling: str = "mean"

  def __post_init__(self):
    for field, key in _HF_KEYS.items():
      _check_size(key, getattr(self, field))
    for key, value in (
      ("norm_eps", self.norm_eps),
      ("rope_theta", self.full_theta),
      ("rope_theta", self.local_theta),
    ):
      if not options.fits(value, float) or value <= 0:
        raise ValueError(
          f"{key} must be a positive number, got {options.shown(value)}."
        )
    if self.hidden_size % (2 * self.num_heads):
      raise ValueError(
        "hidden_size must be a multiple of twice num_attention_heads, for the "
        "halves of a head are turned together, got "
        f"{self.hidden_size} and {self.num_heads}."
      )
    _check_size("global_attn_every_n_layers", self.every)
    layers = self.local_layers
    if layers is not None and len(layers) != self.num_layers:
      raise ValueError(
        f"layer_types must have num_hidden_layers, {self.num_layers}, got "
        f"{len(layers)}."
      )
    activations.check("hidden_activation", self.hidden_act)
    activations.check("classifier_activation", self.prediction_act)
    pooling.check(self.pooling)

  @property
  def head_size(self) -> int:
    """K, the width of a head."""
    return self.hidden_size // self.num_heads

  def is_local(self, layer: int) -> bool:
    """Whether a layer, counted from 0, sees only a window."""
    if self.local_layers is None:
      return layer % self.every != 0
    return self.local_layers[layer]

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "ModernBertConfig":
    """Returns the configuration in a Hugging Face config.json.

    Args:
      config: the decoded JSON object. The keys of layers and rotary bases are
        those of transformers 4 (global_attn_every_n_layers, global_rope_theta)
        or 5 (layer_types, rope_parameters).

    Raises:
      ValueError: a key is missing or has a value that is not implemented.
    """
    if config.get("model_type") != MODEL_TYPE:
      raise ValueError(
        f"model_type must be {MODEL_TYPE!r}, got "
        f"{options.shown(config.get('model_type'))}."
      )
    missing = [key for key in _HF_KEYS.values() if key not in config]
    if missing:
      raise ValueError(
        f"The {MODEL_TYPE} configuration lacks {', '.join(missing)}."
      )
    for key, allowed in _ONLY.items():
      if config.get(key) not in allowed:
        raise ValueError(
          f"{key} must be {allowed[0]!r}, the only one that this ModernBERT "
          f"implements, got {options.shown(config[key])}."
        )
    window = config.get("local_attention", _WINDOW)
    _check_size("local_attention", window)
    return cls(
      **{field: config[key] for field, key in _HF_KEYS.items()},
      local_layers=_local_layers(config),
      every=config.get("global_attn_every_n_layers", _EVERY),
      window=window // 2,
      full_theta=_theta(config, _FULL),
      local_theta=_theta(config, _LOCAL),
      norm_eps=config.get("norm_eps", _EPSILON),
      hidden_act=config.get("hidden_activation", "gelu"),
      prediction_act=config.get("classifier_activation", "gelu"),
    )


def _local_layers(config: Mapping[str, Any]) -> tuple[bool, ...] | None:
  kinds = config.get("layer_types")
  if kinds is not None:
    if not isinstance(kinds, list) or any(
      kind not in (_FULL, _LOCAL) for kind in kinds
    ):
      raise ValueError(
        f"layer_types must be a list of {_FULL!r} and {_LOCAL!r}, got "
        f"{options.shown(kinds)}."
      )
    return tuple(kind == _LOCAL for kind in kinds)
  return None


def _theta(config: Mapping[str, Any], kind: str) -> float:
  rope = config.get("rope_parameters")
  if rope is None:
    if config.get("rope_scaling") is not None:
      raise ValueError(
        "rope_scaling must be null, the only one that this ModernBERT "
        f"implements, got {options.shown(config['rope_scaling'])}."
      )
    return config.get(_OLD_THETAS[kind], _THETAS[kind])
  one = rope.get(kind, {}) if isinstance(rope, Mapping) else rope
  if not isinstance(one, Mapping):
    raise ValueError(
      f"rope_parameters must be an object with {_FULL} and {_LOCAL}, got "
      f"{options.shown(rope)}."
    )
  if one.get("rope_type", "default") != "default":
    raise ValueError(
      "rope_type must be 'default', the only one that this ModernBERT "
      f"implements, got {options.shown(one['rope_type'])}."
    )
  return one.get("rope_theta", _THETAS[kind])


def _check_size(key: str, value: Any) -> None:
  if not options.fits(value, int) or value < 1:
    raise ValueError(
      f"{key} must be a positive integer, got {options.shown(value)}."
    )
