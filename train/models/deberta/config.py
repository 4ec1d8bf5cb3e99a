"""Sizes of DeBERTas, from a config.json."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from ... import checked, options
from .. import activations, pooling

# Field of DebertaConfig -> key of Hugging Face's config.json.
_HF_KEYS = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "intermediate_size": "intermediate_size",
  "max_positions": "max_position_embeddings",
}
_INTEGERS = {
  **_HF_KEYS,
  "furthest": "max_relative_positions",
  "buckets": "position_buckets",
  "type_vocab_size": "type_vocab_size",
}
_OPTIONAL = ("buckets", "type_vocab_size")
# Keys of config.json that change the equations, and their implemented values. A
# key may be missing.
_ONLY = {
  "talking_head": (False, None),
  # A convolution beside the first layer, as in deberta-v2-xlarge.
  "conv_kernel_size": (0, None),
}
_KINDS = ("c2p", "p2c")

MODEL_TYPES = ("deberta", "deberta-v2")
"""The model types that `DebertaConfig.from_hf` reads; v3 has that of v2."""


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
  """Sizes of a DeBERTa (He et al., ICLR 2021; v3: He et al., ICLR 2023).

  Attributes:
    vocab_size: the rows of the embedding of words.
    hidden_size: D, the width.
    num_layers: the layers of the encoder.
    num_heads: H.
    intermediate_size: the width inside the feed-forward layer.
    max_positions: the rows of the embedding of positions, if there is one.
    furthest: the largest distance that the model distinguishes from others.
    layer_norm_eps: the number added to the variance.
    hidden_act: the activation of the feed-forward layer.
    type_vocab_size: the rows of the embedding of segments; None: there are no
      segments.
    has_positions: whether an embedding of positions is added to the words.
    attends: the terms that attention adds to content-to-content: 'c2p', content
      to position, and 'p2c', position to content.
    buckets: half the number of buckets of distances. Distances above
      `buckets / 2` have logarithmic buckets; None: each distance has its own
      bucket.
    shares_projections: whether positions have the projections of the contents.
    norms_positions: whether the embedding of distances is normed.
    pooling: how a classifier pools hidden states; see `pooling.pooled`.
    model_type: 'deberta-v2', or 'deberta', which computes queries, keys and
      values in one product.

  Raises:
    ValueError: a value is not implemented.
  """

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  intermediate_size: int
  max_positions: int
  furthest: int
  layer_norm_eps: float = 1e-7
  hidden_act: str = "gelu"
  type_vocab_size: int | None = None
  has_positions: bool = False
  attends: tuple[str, ...] = _KINDS
  buckets: int | None = None
  shares_projections: bool = False
  norms_positions: bool = False
  pooling: str = "mean"
  model_type: str = "deberta-v2"

  def __post_init__(self):
    for field, key in _INTEGERS.items():
      value = getattr(self, field)
      if field in _OPTIONAL and value is None:
        continue
      if not options.fits(value, int) or value < 1:
        raise ValueError(
          f"{key} must be a positive integer, got {options.shown(value)}."
        )
    if not options.fits(self.layer_norm_eps, float) or self.layer_norm_eps <= 0:
      raise ValueError(
        "layer_norm_eps must be a positive number, got "
        f"{options.shown(self.layer_norm_eps)}."
      )
    if self.hidden_size % self.num_heads:
      raise ValueError(
        "hidden_size must be a multiple of num_attention_heads, got "
        f"{self.hidden_size} and {self.num_heads}."
      )
    activations.check("hidden_act", self.hidden_act)
    pooling.check(self.pooling)
    # Half of the buckets hold one distance each, the others hold more.
    if self.buckets is not None and not (
      self.buckets >= 4 and self.buckets // 2 < self.furthest - 1
    ):
      raise ValueError(
        "position_buckets must be at least 4, and half of it below "
        f"max_relative_positions - 1, {self.furthest - 1}, got {self.buckets}."
      )

  @property
  def head_size(self) -> int:
    """K, the width of a head."""
    return self.hidden_size // self.num_heads

  @property
  def span(self) -> int:
    """Half the rows of the embedding of distances."""
    return self.buckets or self.furthest

  @property
  def longest(self) -> int | None:
    """The most tokens of a text; None: no limit, as distances have none."""
    return self.max_positions if self.has_positions else None

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "DebertaConfig":
    """Returns the configuration in a Hugging Face config.json.

    Args:
      config: the decoded JSON object.

    Raises:
      ValueError: a key is missing or has a value that is not implemented.
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
    sizes = {field: config[key] for field, key in _HF_KEYS.items()}
    for key, allowed in _ONLY.items():
      _refuse(config, key, allowed)
    if config.get("relative_attention") is not True:
      raise ValueError(
        "relative_attention must be true, the only one that this DeBERTa "
        f"implements, got {options.shown(config.get('relative_attention'))}."
      )
    _refuse(config, "embedding_size", (sizes["hidden_size"], None))
    is_second = kind != "deberta"
    furthest = _positive(config, "max_relative_positions")
    segments = config.get("type_vocab_size", 0)
    found = cls(
      **sizes,
      furthest=sizes["max_positions"] if furthest is None else furthest,
      layer_norm_eps=config.get("layer_norm_eps", 1e-7),
      hidden_act=config.get("hidden_act", "gelu"),
      type_vocab_size=None if segments == 0 else segments,
      has_positions=checked.truth(config, "position_biased_input", True),
      attends=_attends(config.get("pos_att_type")),
      buckets=_positive(config, "position_buckets") if is_second else None,
      shares_projections=is_second
      and checked.truth(config, "share_att_key", False),
      norms_positions=is_second and _norms(config.get("norm_rel_ebd", "none")),
      model_type=kind,
    )
    _refuse(config, "attention_head_size", (found.head_size, None))
    return found


def _refuse(
  config: Mapping[str, Any], key: str, allowed: tuple[Any, ...]
) -> None:
  if config.get(key) not in allowed:
    raise ValueError(
      f"{key} must be {allowed[0]!r}, the only one that this DeBERTa "
      f"implements, got {options.shown(config[key])}."
    )


def _positive(config: Mapping[str, Any], key: str) -> int | None:
  """Returns a size; None if it is missing or not positive, such as -1."""
  value = config.get(key, -1)
  if not options.fits(value, int):
    raise ValueError(f"{key} must be an integer, got {options.shown(value)}.")
  return value if value > 0 else None


def _attends(value: Any) -> tuple[str, ...]:
  """Returns the terms of attention, from a list or a text with bars."""
  found = value
  if isinstance(value, str):
    found = [part.strip() for part in value.lower().split("|")]
  if (
    not isinstance(found, list)
    or not found
    or len(set(map(str, found))) < len(found)
    or any(part not in _KINDS for part in found)
  ):
    raise ValueError(
      f"pos_att_type must be a list of {' and '.join(_KINDS)}, one of them or "
      f"both, got {options.shown(value)}."
    )
  return tuple(kind for kind in _KINDS if kind in found)


def _norms(value: Any) -> bool:
  if value not in ("none", "layer_norm", None):
    raise ValueError(
      "norm_rel_ebd must be 'none' or 'layer_norm', got "
      f"{options.shown(value)}."
    )
  return value == "layer_norm"
