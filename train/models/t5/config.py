"""Sizes of T5s, from a config.json."""

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal, get_args

from ... import checked, options

FeedForward = Literal["relu", "gated-gelu"]
"""The feed-forward layers of T5 and of T5 v1.1, which has GELU's tanh form."""

# Field of T5Config -> key of Hugging Face's config.json.
_HF_KEYS = {
  "vocab_size": "vocab_size",
  "hidden_size": "d_model",
  "num_layers": "num_layers",
  "num_heads": "num_heads",
  "head_dim": "d_kv",
  "intermediate_size": "d_ff",
}
_INTEGERS = {
  **_HF_KEYS,
  "num_decoder_layers": "num_decoder_layers",
  "num_buckets": "relative_attention_num_buckets",
  "max_distance": "relative_attention_max_distance",
}

_FARTHEST = 2**16

# A key that config.json lacks has the value of the type's first release.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "t5": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
  "mt5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}

MODEL_TYPES = tuple(_DEFAULTS)
"""The model types that `T5Config.from_hf` reads; Flan-T5 is a T5 v1.1."""


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes of a T5 (Raffel et al., JMLR 2020), of its first release or of v1.1.

  Attributes:
    vocab_size: the rows of the embedding, which may be more than the tokens.
    hidden_size: D, the width.
    num_layers: the layers of the encoder.
    num_decoder_layers: the layers of the decoder.
    num_heads: H, the heads of each attention.
    head_dim: K, the width of a head; H * K need not be D.
    intermediate_size: the width inside the feed-forward layer.
    feed_forward: 'relu', or v1.1's 'gated-gelu'.
    tied: whether the head is the transposed embedding, as in the first release.
    scaled: whether the input of the head is multiplied by D^-0.5, as in the
      first release.
    num_buckets: the buckets of distances between tokens; each has a bias for
      each head.
    max_distance: all distances from this one on share a bucket.
    rms_norm_eps: the number added to the mean square.
    pad_id: the padding token, which is also the decoder's first token.
    eos_id: the token that ends a text.
    model_type: the `model_type` of config.json.

  Raises:
    ValueError: a size is not a positive integer, the buckets do not fit the
      distances, or the feed-forward layer is not implemented.
  """

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_decoder_layers: int
  num_heads: int
  head_dim: int
  intermediate_size: int
  feed_forward: FeedForward = "relu"
  tied: bool = True
  scaled: bool = True
  num_buckets: int = 32
  max_distance: int = 128
  rms_norm_eps: float = 1e-6
  pad_id: int = 0
  eos_id: int = 1
  model_type: str = "t5"

  def __post_init__(self):
    for field, key in _INTEGERS.items():
      value = getattr(self, field)
      if not options.fits(value, int) or value < 1:
        raise ValueError(
          f"{key} must be a positive integer, got {options.shown(value)}."
        )
    eps = self.rms_norm_eps
    if not options.fits(eps, float) or eps <= 0:
      raise ValueError(
        "layer_norm_epsilon must be a positive number, got "
        f"{options.shown(eps)}."
      )
    # Each direction has half of the encoder's buckets. Half of these hold one
    # distance each, and the others hold ranges.
    if self.num_buckets < 4 or self.num_buckets % 4:
      raise ValueError(
        "relative_attention_num_buckets must be a multiple of 4, got "
        f"{self.num_buckets}."
      )
    # `model.buckets` makes a table with an entry for each distance.
    if self.max_distance > _FARTHEST:
      raise ValueError(
        f"relative_attention_max_distance must be at most {_FARTHEST}, got "
        f"{self.max_distance}."
      )
    if self.max_distance <= self.num_buckets // 2:
      raise ValueError(
        "relative_attention_max_distance must exceed half of the "
        f"{self.num_buckets} buckets, got {self.max_distance}."
      )
    for field in ("pad_id", "eos_id"):
      value = getattr(self, field)
      if not options.fits(value, int) or not 0 <= value < self.vocab_size:
        raise ValueError(
          f"{field} must be an integer in [0, {self.vocab_size}), got "
          f"{options.shown(value)}."
        )
    if self.feed_forward not in get_args(FeedForward):
      raise ValueError(
        "feed_forward_proj must be one of "
        f"{', '.join(get_args(FeedForward))}, got "
        f"{options.shown(self.feed_forward)}."
      )

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "T5Config":
    """Returns the configuration in a Hugging Face config.json.

    Args:
      config: the decoded JSON object of a T5 or an mT5 (Xue et al., NAACL
        2021), which is a T5 v1.1.

    Raises:
      ValueError: a key is missing or has a value that this model does not
        implement.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
      raise ValueError(
        f"model_type must be one of {', '.join(MODEL_TYPES)}, got "
        f"{options.shown(kind)}."
      )
    # A null is the same as a missing key.
    given = {key: x for key, x in config.items() if x is not None}
    config = {**_DEFAULTS[kind], **given}
    missing = [key for key in _HF_KEYS.values() if key not in config]
    if missing:
      raise ValueError(f"The T5 configuration lacks {', '.join(missing)}.")
    if config.get("is_encoder_decoder", True) is not True:
      raise ValueError(
        "is_encoder_decoder must be true: this T5 has both, got "
        f"{options.shown(config['is_encoder_decoder'])}."
      )
    start, pad = (
      config.get(key, 0) for key in ("decoder_start_token_id", "pad_token_id")
    )
    if start != pad:
      raise ValueError(
        "decoder_start_token_id must be pad_token_id, as every T5 has it, got "
        f"{options.shown(start)} and {options.shown(pad)}."
      )
    tied = checked.truth(config, "tie_word_embeddings", True)
    return cls(
      **{field: config[key] for field, key in _HF_KEYS.items()},
      num_decoder_layers=config.get("num_decoder_layers", config["num_layers"]),
      feed_forward=config["feed_forward_proj"],
      tied=tied,
      # transformers 5 writes this key, because it writes that all heads are
      # tied. It never scales in an mT5.
      scaled=kind == "t5"
      and checked.truth(config, "scale_decoder_outputs", tied),
      num_buckets=config.get("relative_attention_num_buckets", 32),
      max_distance=config.get("relative_attention_max_distance", 128),
      rms_norm_eps=config.get("layer_norm_epsilon", 1e-6),
      pad_id=pad,
      eos_id=config.get("eos_token_id", 1),
      model_type=kind,
    )
