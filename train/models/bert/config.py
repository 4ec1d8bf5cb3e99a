"""Sizes of encoders like BERT, from a config.json."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from ... import options
from .. import activations, pooling

_HF_KEYS = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "intermediate_size": "intermediate_size",
  "max_positions": "max_position_embeddings",
  "type_vocab_size": "type_vocab_size",
  "layer_norm_eps": "layer_norm_eps",
}
# From each model_type and field of BertConfig to the key of config.json.
_KEYS = {
  "bert": _HF_KEYS,
  "roberta": _HF_KEYS,
  "xlm-roberta": _HF_KEYS,
  "electra": {**_HF_KEYS, "embedding_size": "embedding_size"},
  "distilbert": {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "max_positions": "max_position_embeddings",
  },
}
# RoBERTa's first position is the padding token's id + 1.
_FROM_PADDING = ("roberta", "xlm-roberta")
_ROBERTAS_PADDING = 1  # transformers' default

MODEL_TYPES = tuple(_KEYS)
"""The model types that `BertConfig.from_hf` reads."""


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """Sizes of a BERT encoder (Devlin et al., NAACL 2019, section 3).

  Three kinds of models are similar. RoBERTa (Liu et al., arXiv 1907.11692) and
  XLM-R (Conneau et al., ACL 2020) number positions in another way. ELECTRA
  (Clark et al., ICLR 2020) has embeddings of another width. DistilBERT (Sanh et
  al., arXiv 1910.01108) has no segments.

  Attributes:
    vocab_size: the rows of the embedding of words.
    hidden_size: D, the width.
    num_layers: the layers of the encoder.
    num_heads: H.
    intermediate_size: the width inside the feed-forward layer.
    max_positions: the rows of the embedding of positions.
    type_vocab_size: the rows of the embedding of segments; None: there are no
      segments.
    layer_norm_eps: the number added to the variance.
    hidden_act: the activation of the feed-forward layer.
    embedding_size: E, the width of the embeddings; None: D. If E is not D, a
      linear layer follows the embeddings.
    padding_id: for RoBERTa and XLM-R, the id of the padding token. Real token
      n, from 1, is at the position `padding_id + n`. None: the first position
      is 0.
    pooling: how a classifier pools hidden states; see `pooling.pooled`.
    model_type: the type in transformers, which decides the tensors' names.

  Raises:
    ValueError: a size is not a positive integer, the heads do not divide the
      width, or the activation is not one of those implemented.
  """

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  intermediate_size: int
  max_positions: int = 512
  type_vocab_size: int | None = 2
  layer_norm_eps: float = 1e-12
  hidden_act: str = "gelu"
  embedding_size: int | None = None
  padding_id: int | None = None
  pooling: str = "mean"
  model_type: str = "bert"

  def __post_init__(self):
    if not options.fits(self.model_type, str) or self.model_type not in _KEYS:
      raise ValueError(
        f"model_type must be one of {', '.join(MODEL_TYPES)}, got "
        f"{options.shown(self.model_type)}."
      )
    for field, key in _KEYS[self.model_type].items():
      value = getattr(self, field)
      if field == "embedding_size" and value is None:
        continue
      if field == "layer_norm_eps":
        if not options.fits(value, float) or value <= 0:
          raise ValueError(
            f"{key} must be a positive number, got {options.shown(value)}."
          )
      elif not options.fits(value, int) or value < 1:
        raise ValueError(
          f"{key} must be a positive integer, got {options.shown(value)}."
        )
    if self.hidden_size % self.num_heads:
      raise ValueError(
        f"hidden_size must be a multiple of num_attention_heads, got "
        f"{self.hidden_size} and {self.num_heads}."
      )
    activations.check("hidden_act", self.hidden_act)
    pooling.check(self.pooling)
    if self.padding_id is None:
      return
    if not options.fits(self.padding_id, int) or self.padding_id < 0:
      raise ValueError(
        "pad_token_id must be a token's id, for positions count from it, got "
        f"{options.shown(self.padding_id)}."
      )
    if self.longest < 1:
      raise ValueError(
        f"max_position_embeddings must be above pad_token_id + 1, the first "
        f"position, got {self.max_positions} and {self.padding_id}."
      )

  @property
  def head_size(self) -> int:
    """K, the width of a head."""
    return self.hidden_size // self.num_heads

  @property
  def embedding_width(self) -> int:
    """E, the width of the embeddings."""
    return self.embedding_size or self.hidden_size

  @property
  def longest(self) -> int:
    """The most tokens of a text."""
    first = 0 if self.padding_id is None else self.padding_id + 1
    return self.max_positions - first

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "BertConfig":
    """Returns the configuration in a Hugging Face config.json.

    Args:
      config: the decoded JSON object.

    Raises:
      ValueError: a key is missing, or has a value that this encoder does not
        implement, such as another model_type, relative positions or a decoder.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _KEYS:
      raise ValueError(
        f"model_type must be one of {', '.join(MODEL_TYPES)}, got "
        f"{options.shown(kind)}."
      )
    keys = _KEYS[kind]
    missing = [key for key in keys.values() if key not in config]
    if missing:
      raise ValueError(f"The {kind} configuration lacks {', '.join(missing)}.")
    position = config.get("position_embedding_type", "absolute")
    if position != "absolute":
      raise ValueError(
        "position_embedding_type must be 'absolute', got "
        f"{options.shown(position)}."
      )
    if config.get("is_decoder") not in (False, None):
      raise ValueError(
        "is_decoder must be false: this BERT is an encoder, without a causal "
        f"mask. Got {options.shown(config['is_decoder'])}."
      )
    more: dict[str, Any] = {}
    if "type_vocab_size" not in keys:
      more["type_vocab_size"] = None
    if kind in _FROM_PADDING:
      more["padding_id"] = config.get("pad_token_id", _ROBERTAS_PADDING)
      if more["padding_id"] is None:
        raise ValueError(
          "pad_token_id must be a token's id, for positions count from it, got "
          "None."
        )
    sizes = {field: config[key] for field, key in keys.items()}
    if sizes.get("embedding_size") == sizes["hidden_size"]:
      del sizes["embedding_size"]  # no linear layer follows the embeddings
    act = "activation" if kind == "distilbert" else "hidden_act"
    return cls(
      **sizes,
      **more,
      hidden_act=config.get(act, "gelu"),
      model_type=kind,
    )
