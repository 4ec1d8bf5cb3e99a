"""Sizes of vision transformers, and the properties of their kinds."""

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal, NamedTuple

from ... import options
from .. import activations

CHANNELS = 3

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""The mean and standard deviation of red, green and blue, from 0 to 1."""

_SIZES = {
  "hidden_size": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "patch_size": "patch_size",
}


class Tower(NamedTuple):
  """A kind of vision transformer.

  Attributes:
    architecture: the class of a classifier in transformers.
    prefix: the prefix of the tower's tensors in this class.
    names: which names its tensors have; see `weights.py`.
    first: the tokens before the patches, each with a position.
    pooling: the input of a classifier's head: the first token, or the mean of
      the patches, as in transformers' classifiers.
    scales: whether branches are scaled (LayerScale).
    norm_before: whether there is a norm before the layers.
    norm_after: whether there is a norm after the layers.
    patch_bias: whether the product with a patch has a bias.
    nested: the key of config.json that may hold the tower's own config; "":
      none.
    default: transformers' values of keys that config.json may lack.
  """

  architecture: str
  prefix: str
  names: Literal["vit", "dinov2", "clip"]
  first: tuple[str, ...] = ("cls",)
  pooling: Literal["first", "patches"] = "first"
  scales: bool = False
  norm_before: bool = False
  norm_after: bool = True
  patch_bias: bool = True
  nested: str = ""
  default: Mapping[str, Any] = {}


_BASE = {
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "intermediate_size": 3072,
  "image_size": 224,
  "patch_size": 16,
  "num_channels": CHANNELS,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "qkv_bias": True,
}
_DINOV2 = {**_BASE, "patch_size": 14, "layer_norm_eps": 1e-6, "mlp_ratio": 4}
_CLIP = Tower(
  "CLIPForImageClassification",
  "vision_model.",
  "clip",
  pooling="patches",
  norm_before=True,
  norm_after=False,
  patch_bias=False,
  nested="vision_config",
  default={
    **_BASE,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
  },
)
_SIGLIP = Tower(
  "SiglipForImageClassification",
  "vision_model.",
  "clip",
  first=(),
  pooling="patches",
  nested="vision_config",
  default={
    **_BASE,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
  },
)
TOWERS = {
  "vit": Tower("ViTForImageClassification", "vit.", "vit", default=_BASE),
  "deit": Tower(
    "DeiTForImageClassification",
    "deit.",
    "vit",
    first=("cls", "distillation"),
    default=_BASE,
  ),
  "dinov2": Tower(
    "Dinov2ForImageClassification",
    "dinov2.",
    "dinov2",
    scales=True,
    default=_DINOV2,
  ),
  "dinov2_with_registers": Tower(
    "Dinov2WithRegistersForImageClassification",
    "dinov2_with_registers.",
    "dinov2",
    scales=True,
    default={**_DINOV2, "num_register_tokens": 4},
  ),
  "clip": _CLIP,
  "clip_vision_model": _CLIP,
  "siglip": _SIGLIP,
  "siglip_vision_model": _SIGLIP,
}
"""The kinds by `model_type` of config.json."""


@dataclasses.dataclass(frozen=True)
class VitConfig:
  """Sizes of a vision transformer (Dosovitskiy et al., ICLR 2021, table 1).

  Attributes:
    patch_size: P, the side of a patch in pixels.
    grid: the side, in patches, of the images whose positions were learned.
    hidden_size: D, the width.
    num_layers: the number of layers.
    num_heads: H, the heads of each attention.
    intermediate_size: the width inside the feed-forward layer.
    layer_norm_eps: the number added to the variance.
    activation: the activation of the feed-forward layer, a name of
      `activations.BY_NAME`.
    qkv_bias: whether queries, keys and values have a bias.
    registers: the number of tokens without a position after the class token
      (Darcet et al., ICLR 2024, arXiv 2309.16588).
    model_type: the `model_type` of config.json, one of `TOWERS`.
    side: the default side of images, in pixels; 0: there is no default.
    mean: the values subtracted from red, green and blue.
    deviation: the values that the differences are divided by.

  Raises:
    ValueError: a size is not positive, or the heads do not divide the width.
  """

  patch_size: int
  grid: int
  hidden_size: int
  num_layers: int
  num_heads: int
  intermediate_size: int
  layer_norm_eps: float = 1e-6
  activation: str = "gelu"
  qkv_bias: bool = True
  registers: int = 0
  model_type: str = "dinov2"
  side: int = 0
  mean: tuple[float, ...] = IMAGENET[0]
  deviation: tuple[float, ...] = IMAGENET[1]

  def __post_init__(self):
    for name in (*_SIZES, "grid", "intermediate_size"):
      value = getattr(self, name)
      if not options.fits(value, int) or value < 1:
        raise ValueError(
          f"{name} must be a positive integer, got {options.shown(value)}."
        )
    if not options.fits(self.layer_norm_eps, float) or self.layer_norm_eps <= 0:
      raise ValueError(
        "layer_norm_eps must be a positive number, got "
        f"{options.shown(self.layer_norm_eps)}."
      )
    if self.hidden_size % self.num_heads:
      raise ValueError(
        f"hidden_size must be a multiple of num_heads, got {self.hidden_size} "
        f"and {self.num_heads}."
      )

  @property
  def head_size(self) -> int:
    """K, the width of a head."""
    return self.hidden_size // self.num_heads

  @property
  def tower(self) -> Tower:
    """The properties of the model's kind."""
    return TOWERS[self.model_type]

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "VitConfig":
    """Returns the configuration in a Hugging Face config.json.

    Args:
      config: the decoded JSON object, of one of `TOWERS`. For a CLIP or a
        SigLIP, the part of its image tower is read.

    Raises:
      ValueError: a key has a value that this model does not implement.
    """
    kind = config.get("model_type")
    if kind not in TOWERS:
      raise ValueError(
        f"model_type must be one of {', '.join(TOWERS)}, got "
        f"{options.shown(kind)}."
      )
    tower = TOWERS[kind]
    found = config.get(tower.nested, config) if tower.nested else config
    if not isinstance(found, Mapping):
      raise ValueError(
        f"{tower.nested} must be an object, got {options.shown(found)}."
      )
    config = {**tower.default, **found}
    activations.check("hidden_act", config["hidden_act"])
    for key, only in (("num_channels", CHANNELS), ("use_swiglu_ffn", False)):
      if config.get(key, only) != only:
        raise ValueError(
          f"{key} must be {only}, all that is implemented for a {kind}, got "
          f"{options.shown(config[key])}."
        )
    sizes = {field: config[key] for field, key in _SIZES.items()}
    inner = config["intermediate_size"]
    if "mlp_ratio" in config:
      ratio = config["mlp_ratio"]
      if not options.fits(ratio, float) or not options.fits(
        sizes["hidden_size"], int
      ):
        raise ValueError(
          f"mlp_ratio must be a number, got {options.shown(ratio)}."
        )
      inner = int(sizes["hidden_size"] * ratio)
    for key in ("image_size", "patch_size"):
      if not options.fits(config[key], int) or config[key] < 1:
        raise ValueError(
          f"{key} must be a positive integer, got {options.shown(config[key])}."
        )
    registers = config.get("num_register_tokens", 0)
    if not options.fits(registers, int) or registers < 0:
      raise ValueError(
        "num_register_tokens must be an integer from 0 on, got "
        f"{options.shown(registers)}."
      )
    return cls(
      **sizes,
      # Pixels after the last whole patch are cut off.
      grid=config["image_size"] // config["patch_size"],
      intermediate_size=inner,
      layer_norm_eps=config["layer_norm_eps"],
      activation=config["hidden_act"],
      qkv_bias=config["qkv_bias"] is not False,
      registers=registers,
      model_type=kind,
    )
