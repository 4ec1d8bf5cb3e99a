"""Sizes of decoders like Llama, from a config.json."""

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal, NamedTuple

from ... import checked, options
from .. import activations
from . import gemma, gpt2, images, rope

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


class _Type(NamedTuple):
  """The properties of the decoders of one `model_type`.

  Attributes:
    architecture: the class in transformers.
    qkv_bias: whether queries, keys and values always have a bias. None: they
      have one, and the output too, if `attention_bias` says so.
    qk_norm: whether the queries and keys of each head are normed.
    reads_mlp_bias: whether the key `mlp_bias` is read.
    windows: which keys define sliding windows. 'none': no key; 'all':
      `sliding_window`, for all layers; 'types': `use_sliding_window` and
      `layer_types`; 'layers': `layer_types` alone.
    default: the values of keys that config.json may lack.
    is_gemma: whether `gemma.read` reads further keys.
    sequence: transformers' class with a head for sequences. "": its name
      follows from `architecture`; None: there is none.
    reads_images: whether the model has another part, which reads images.
    prefix: the prefix of all tensors' names except the head's, if the model
      reads no images.
    fields: the fields of DecoderConfig that this type fixes.
  """

  architecture: str
  qkv_bias: bool | None = None
  qk_norm: bool = False
  reads_mlp_bias: bool = False
  windows: Literal["none", "all", "types", "layers"] = "none"
  default: Mapping[str, Any] = {}
  is_gemma: bool = False
  sequence: str | None = ""
  reads_images: bool = False
  prefix: str = "model."
  fields: Mapping[str, Any] = {}


_TYPES = {
  "llama": _Type("LlamaForCausalLM", reads_mlp_bias=True),
  "mistral": _Type("MistralForCausalLM", qkv_bias=False, windows="all"),
  "qwen2": _Type("Qwen2ForCausalLM", qkv_bias=True, windows="types"),
  "qwen3": _Type(
    "Qwen3ForCausalLM",
    qk_norm=True,
    windows="types",
    default={"head_dim": 128},
  ),
  **{
    kind: _Type(
      f"{name}ForConditionalGeneration",
      qkv_bias=None if kind == "qwen3_vl" else True,
      qk_norm=kind == "qwen3_vl",
      windows="none" if kind == "qwen3_vl" else "types",
      default={"rope_theta": theta},
      sequence=None,
      reads_images=True,
    )
    for kind, name, theta in (
      ("qwen2_vl", "Qwen2VL", 1000000.0),
      ("qwen2_5_vl", "Qwen2_5_VL", 1000000.0),
      ("qwen3_vl", "Qwen3VL", 500000.0),
    )
  },
  # Files of SmolLM3 omit the tied head and the rotary base if they are default.
  "smollm3": _Type(
    "SmolLM3ForCausalLM",
    reads_mlp_bias=True,
    windows="types",
    default={"tie_word_embeddings": True, "rope_theta": 2000000.0},
  ),
  **{
    kind: _Type(
      architecture,
      windows="none" if kind == "gemma" else "layers",
      qk_norm=kind.startswith("gemma3"),
      default=gemma.DEFAULTS[kind],
      is_gemma=True,
      sequence=sequence,
      reads_images=kind == gemma.WITH_IMAGES,
    )
    for kind, (architecture, sequence) in gemma.ARCHITECTURES.items()
  },
  gpt2.MODEL_TYPE: _Type(
    "GPT2LMHeadModel",
    qkv_bias=True,
    sequence="GPT2ForSequenceClassification",
    prefix="transformer.",
    fields=gpt2.FIELDS,
  ),
}
# Keys that change the equations, and the only implemented values.
_ONLY = {
  "hidden_act": ("silu",),
  "rope_interleaved": (False, None),
}
# In Qwen 2 and 3, so many first layers see all tokens.
_MAX_WINDOW_LAYERS = 28
# The windows are made for each layer before the tensors are counted.
_MOST_LAYERS = 10_000
_LAYER_TYPES = ("full_attention", "sliding_attention")

MODEL_TYPES = tuple(_TYPES)
"""The model types that `DecoderConfig.from_hf` reads."""

SEQUENCE_TYPES = tuple(
  kind for kind, type_ in _TYPES.items() if type_.sequence is not None
)
"""The model types with a class for sequences in transformers."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes of a decoder like Llama (Touvron et al., arXiv 2302.13971).

  Attributes:
    vocab_size: the rows of the embedding, which may be more than the tokens.
    hidden_size: D, the width.
    num_layers: the number of layers.
    num_heads: H, the number of query heads.
    num_kv_heads: the number of key and value heads; H / num_kv_heads query
      heads share each.
    head_dim: K, the width of a head; H * K need not be D.
    intermediate_size: the width inside the feed-forward layer.
    max_positions: the longest sequence that the model supports.
    rms_norm_eps: the number added to the mean square, or to the variance.
    rope_theta: the base of the rotary wavelengths.
    rope_scaling: how a longer context scales the wavelengths; None: not.
    tied: whether the head is the transposed embedding.
    qkv_bias: whether queries, keys and values have a bias, as in Qwen 2.
    out_bias: whether the output of attention has a bias.
    mlp_bias: whether the feed-forward layer has biases.
    qk_norm: whether the queries and keys of each head are normed, as in Qwen 3.
    windows: for each layer, how many tokens a token sees, itself included, as
      in Mistral; None: all. Empty: all layers see all tokens.
    rotary: for each layer, whether it rotates queries and keys, as in SmolLM3.
      Empty: all layers do.
    hidden_act: the activation of the feed-forward layer, by transformers' name.
    embed_scaled: whether the embeddings are multiplied by the square root of
      hidden_size, as in Gemma.
    norm_offset: whether 1 is added to the scales of all norms, as in Gemma.
    post_norms: whether the results of attention and of the feed-forward layer
      are normed too, as in Gemma 2.
    query_scalar: products of queries and keys are divided by the square root of
      this number; None: of head_dim.
    attention_softcap: c of c tanh(x / c), which bounds these products, as in
      Gemma 2; None: they are unbounded.
    logit_softcap: the same for the logits.
    local_rope_theta: the base of the rotary wavelengths in layers with a
      window, which have no scaling, as in Gemma 3; None: all layers have the
      same base and scaling.
    learned_positions: whether a learned vector for each position is added to
      the embeddings, as in GPT-2. Queries and keys are then not rotated.
    layer_norm: whether norms subtract the mean and have a bias.
    joint_qkv: whether one product makes queries, keys and values.
    gated: whether the feed-forward layer has a gate.
    model_type: the `model_type` of config.json.

  Raises:
    ValueError: a size is not a positive integer, the key-value heads do not
      divide the heads, the width of a head is odd, or `windows` or `rotary`
      has a wrong length.
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
  rope_theta: float = rope.THETA
  rope_scaling: rope.Scaling | None = None
  tied: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  windows: tuple[int | None, ...] = ()
  rotary: tuple[bool, ...] = ()
  hidden_act: str = "silu"
  embed_scaled: bool = False
  norm_offset: bool = False
  post_norms: bool = False
  query_scalar: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  local_rope_theta: float | None = None
  learned_positions: bool = False
  layer_norm: bool = False
  joint_qkv: bool = False
  gated: bool = True
  model_type: str = "llama"

  def __post_init__(self):
    for field, key in _INTEGERS.items():
      value = getattr(self, field)
      _check_size(key, value)
    for field in ("rms_norm_eps", "rope_theta", *gemma.NUMBERS):
      value = getattr(self, field)
      if value is None and field in gemma.NUMBERS:
        continue
      if not _is_positive(value):
        raise ValueError(
          f"{gemma.NUMBERS.get(field, field)} must be a positive number, got "
          f"{options.shown(value)}."
        )
    activations.check("hidden_act", self.hidden_act)
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        "num_attention_heads must be a multiple of num_key_value_heads, got "
        f"{self.num_heads} and {self.num_kv_heads}."
      )
    if self.head_dim % 2 and not self.learned_positions:
      raise ValueError(
        "head_dim must be even, for its halves are turned together, got "
        f"{self.head_dim}."
      )

    for name in ("windows", "rotary"):
      values = getattr(self, name)
      if values and len(values) != self.num_layers:
        raise ValueError(
          f"{name} must have a value for each of the {self.num_layers} layers, "
          f"got {len(values)}."
        )
    for window in self.windows:
      if window is not None:
        _check_size("sliding_window", window)

  @property
  def architecture(self) -> str:
    """The class in transformers."""
    return _TYPES[self.model_type].architecture

  @property
  def sequence_architecture(self) -> str:
    """The class in transformers with a head for sequences."""
    return _TYPES[self.model_type].sequence or self.architecture.replace(
      "ForCausalLM", "ForSequenceClassification"
    )

  @property
  def prefix(self) -> str:
    """The prefix of all tensors' names, except the head's."""
    return (
      images.PREFIX if self.reads_images else _TYPES[self.model_type].prefix
    )

  @property
  def reads_images(self) -> bool:
    """Whether the model has a part for images, which this decoder lacks."""
    return _TYPES[self.model_type].reads_images

  @property
  def bare_prefix(self) -> str:
    """The part of `prefix` that files of a model without a head lack."""
    return self.prefix.split(".")[0] + "."

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
    """Returns the configuration in a Hugging Face config.json.

    Args:
      config: the decoded JSON object, of one of `MODEL_TYPES`, in the form of
        transformers 4 or 5. Keys that transformers does not read for this type
        are ignored.

    Raises:
      ValueError: a key is missing, or has a value that this decoder does not
        implement, such as another model_type, rotary type or activation.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
      raise ValueError(
        f"model_type must be one of {', '.join(MODEL_TYPES)}, got "
        f"{options.shown(kind)}."
      )
    type_ = _TYPES[kind]
    own = {**type_.fields}
    if type_.reads_images:
      config = images.texts(kind, config, tied=type_.is_gemma)
    elif kind == gpt2.MODEL_TYPE:
      config, own["hidden_act"] = gpt2.read(config)
    config = {**type_.default, **config}
    missing = [key for key in _HF_KEYS.values() if key not in config]
    if missing:
      raise ValueError(f"The {kind} configuration lacks {', '.join(missing)}.")
    for key, allowed in _ONLY.items():
      if type_.is_gemma and key == "hidden_act":
        continue
      if key in config and config[key] not in allowed:
        raise ValueError(
          f"{key} must be {allowed[0]!r}, the only one that this decoder "
          f"implements, got {options.shown(config[key])}."
        )
    layers = config["num_hidden_layers"]
    _check_size("num_hidden_layers", layers)
    if type_.windows != "none" and layers > _MOST_LAYERS:
      raise ValueError(
        f"num_hidden_layers must be at most {_MOST_LAYERS}, got {layers}."
      )
    if type_.is_gemma:
      config, own = gemma.read(kind, config)
    theta, scaling = rope.read(config, config.get("rope_theta", rope.THETA))
    sizes = {field: config[key] for field, key in _HF_KEYS.items()}
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim")
    if head_dim is None:
      head_dim = _head_dim(config["hidden_size"], heads)
    kv_heads = config.get("num_key_value_heads")
    if type_.qkv_bias is None:
      qkv_bias = out_bias = checked.truth(config, "attention_bias", False)
    else:
      qkv_bias, out_bias = type_.qkv_bias, False
    rotary = _rotary(config) if kind == "smollm3" else ()
    fields = {
      "num_kv_heads": heads if kv_heads is None else kv_heads,
      "head_dim": head_dim,
      "rope_theta": theta,
      "rope_scaling": scaling,
      "tied": checked.truth(config, "tie_word_embeddings", False),
      "qkv_bias": qkv_bias,
      "out_bias": out_bias,
      "mlp_bias": type_.reads_mlp_bias
      and checked.truth(config, "mlp_bias", False),
      "qk_norm": type_.qk_norm,
      "windows": _windows(config, type_.windows, rotary),
      "rotary": rotary,
      "model_type": kind,
    }
    return cls(**sizes | fields | own)


def _windows(
  config: Mapping[str, Any], source: str, rotary: tuple[bool, ...]
) -> tuple[int | None, ...]:
  """Returns the window of each layer; empty if no layer has one."""
  count = config["num_hidden_layers"]
  layers = config.get("layer_types")
  if not options.fits(layers, list | None):
    raise ValueError(
      f"layer_types must be a list or null, got {options.shown(layers)}."
    )
  unknown = [x for x in layers or () if x not in _LAYER_TYPES]
  if unknown:
    raise ValueError(
      f"layer_types must be a list of {' and '.join(_LAYER_TYPES)}, which this "
      f"decoder implements, got {options.shown(unknown[0])}."
    )
  window = config.get("sliding_window")
  used = source in ("all", "layers") or (
    source == "types" and checked.truth(config, "use_sliding_window", False)
  )
  if window is None or not used:
    if layers and _LAYER_TYPES[1] in layers:
      raise ValueError(
        "layer_types has 'sliding_attention', and the configuration of this "
        f"{config['model_type']} has no sliding window that is used."
      )
    return ()
  _check_size("sliding_window", window)
  if source == "all":
    # transformers' Mistral ignores layer_types.
    if layers and _LAYER_TYPES[0] in layers:
      raise ValueError(
        "layer_types has 'full_attention', and every layer of a mistral has "
        f"the sliding window of {window} tokens; a model with both is of "
        "another model_type."
      )
    return (window,) * count
  if layers is None:
    first = config.get("max_window_layers", _MAX_WINDOW_LAYERS)
    if not options.fits(first, int):
      raise ValueError(
        f"max_window_layers must be an integer, got {options.shown(first)}."
      )
    slides = [not rotary[i] if rotary else i >= first for i in range(count)]
  else:
    slides = [x == _LAYER_TYPES[1] for x in layers]
  return tuple(window if x else None for x in slides) if any(slides) else ()


def _rotary(config: Mapping[str, Any]) -> tuple[bool, ...]:
  """Returns for each layer of a SmolLM3 whether it rotates queries and keys."""
  count = config["num_hidden_layers"]
  flags = config.get("no_rope_layers")  # despite its name, 1 is with rotation
  if flags is None:
    interval = config.get("no_rope_layer_interval", 4)
    _check_size("no_rope_layer_interval", interval)
    return tuple((i + 1) % interval != 0 for i in range(count))
  if not options.fits(flags, list) or any(x not in (0, 1) for x in flags):
    raise ValueError(
      f"no_rope_layers must be a list of 0 and 1, got {options.shown(flags)}."
    )
  if len(flags) < count:
    raise ValueError(
      f"no_rope_layers must have a value for each of the {count} layers, got "
      f"{len(flags)}."
    )
  return tuple(bool(x) for x in flags[:count])


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


def _check_size(key: str, value: Any) -> None:
  if not options.fits(value, int) or value < 1:
    raise ValueError(
      f"{key} must be a positive integer, got {options.shown(value)}."
    )


def _is_positive(value: Any) -> bool:
  return options.fits(value, float) and value > 0
