"""What of PEFT's `adapter_config.json` counts here, and how it is written."""

import collections
from collections.abc import Iterable, Mapping
import dataclasses
import json
import math
import re
from typing import Any

from bilora_jax import _patterns

NAME = "adapter_config.json"
_ALL_LINEAR = "all-linear"
_PLAIN = re.compile(r"[\w.]+")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
  """The part of an `adapter_config.json` that counts here.

  Attributes:
    rank: `r`, of the modules that `rank_pattern` does not name.
    alpha: `lora_alpha`, likewise.
    rslora: whether the scale is `alpha / sqrt(rank)`.
    dora: whether the adapted weights have magnitudes.
    dropout: `lora_dropout`.
    rank_pattern: from regular expressions for the ends of module names, the
      first that matches counts, to ranks.
    alpha_pattern: likewise.
    target_modules: names or ends of names; or one regular expression.
    exclude_modules: likewise, of modules that have no adapter.
    layers: `layers_to_transform`, the only layers with adapters; None for all.
    layers_pattern: what the numbers of layers come behind, if not anything.
    modules_to_save: ends of names of modules that are trained whole.
    bias: which biases are trained as they are: 'none', 'all' or 'lora_only',
      those of the modules with adapters.
    lora_bias: whether `lora_B` has a bias.
    tied: `ensure_weight_tying`, whether what is done to an embedding is done to
      the head that is tied to it.
    token_indices: the tokens whose rows of an embedding are trained, by the
      end of its name; "" for that of the inputs.
    task_type: as 'CAUSAL_LM'; None if it does not say.
  """

  rank: int
  alpha: float
  rslora: bool = False
  dora: bool = False
  dropout: float = 0.0
  rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
  alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
  target_modules: tuple[str, ...] | str = ()
  exclude_modules: tuple[str, ...] | str = ()
  layers: tuple[int, ...] | None = None
  layers_pattern: tuple[str, ...] = ()
  modules_to_save: tuple[str, ...] = ()
  bias: str = "none"
  lora_bias: bool = False
  tied: bool = False
  token_indices: Mapping[str, tuple[int, ...]] = dataclasses.field(
    default_factory=dict
  )
  task_type: str | None = None

  def sizes(self, module: str) -> tuple[int, float]:
    """The rank and the alpha of a module."""
    return (
      _first_match(self.rank_pattern, module, self.rank),
      _first_match(self.alpha_pattern, module, self.alpha),
    )

  def scale(self, module: str) -> float:
    """What the product of a module's factors is multiplied by."""
    rank, alpha = self.sizes(module)
    return alpha / (math.sqrt(rank) if self.rslora else rank)

  def targeted(self, modules: Iterable[str]) -> list[str]:
    """Those of the modules that must have an adapter, as far as it is said.

    As PEFT chooses them: `check_target_module_exists` of
    peft/tuners/tuners_utils.py. Names that no module has are nothing to it.
    """
    return [
      module
      for module in modules
      if _named(module, self.target_modules)
      and not _named(module, self.exclude_modules, unknown=True)
      and not self.is_saved(module)
      and self._is_in_layers(module)
    ]

  def is_saved(self, module: str) -> bool:
    """Whether a module is trained whole, alone or with what it is part of.

    The ends of names need not begin at a dot: `_set_trainable` of
    peft/utils/other.py.
    """
    parts = module.split(".")
    return any(
      ".".join(parts[:count]).endswith(end)
      for count in range(1, len(parts) + 1)
      for end in self.modules_to_save
    )

  def tokens_of(self, module: str) -> tuple[int, ...]:
    """The tokens whose rows of an embedding are trained."""
    named = (
      tokens
      for end, tokens in self.token_indices.items()
      if end and ends_with(module, end)
    )
    return next(named, self.token_indices.get("", ()))

  def _is_in_layers(self, module: str) -> bool:
    if self.layers is None or isinstance(self.target_modules, str):
      return True
    if not all(map(_PLAIN.fullmatch, self.layers_pattern)):
      return False  # which layers is not said
    parts = module.split(".")
    # Behind a number comes what is in the layer; the first number counts.
    for i in range(1, len(parts) - 1):
      before = ".".join(parts[:i])
      known = (
        any(ends_with(before, end) for end in self.layers_pattern)
        if self.layers_pattern
        else i > 1
      )
      if known and parts[i].isdecimal():
        return int(parts[i]) in self.layers
    return False

  def to_json(self, base_model: str) -> str:
    """As PEFT reads it."""
    config = {
      "peft_type": "LORA",
      "task_type": self.task_type,
      "base_model_name_or_path": base_model,
      "r": self.rank,
      "lora_alpha": _plain(self.alpha),
      "lora_dropout": self.dropout,
      "use_rslora": self.rslora,
      "use_dora": self.dora,
      "rank_pattern": dict(self.rank_pattern),
      "alpha_pattern": {k: _plain(v) for k, v in self.alpha_pattern.items()},
      "target_modules": list(self.target_modules),
      "modules_to_save": list(self.modules_to_save) or None,
      "bias": self.bias,
      "ensure_weight_tying": self.tied,
      "fan_in_fan_out": False,
      "inference_mode": True,
      "init_lora_weights": True,
    }
    return json.dumps(config, indent=2) + "\n"


def of(
  sizes: Mapping[str, tuple[int, float]],
  *,
  modules_to_save: Iterable[str],
  **fields: Any,
) -> PeftConfig:
  """The configuration of modules by their ranks and alphas.

  Args:
    sizes: `(rank, alpha)` of each module.
    modules_to_save: that are trained whole.
    **fields: others of `PeftConfig`.
  """
  ranks = {module: rank for module, (rank, _) in sizes.items()}
  alphas = {module: alpha for module, (_, alpha) in sizes.items()}
  rank, alpha = _most_common(ranks), _most_common(alphas)
  return PeftConfig(
    rank=rank,
    alpha=alpha,
    # Of the whole name, which is no other module's end.
    rank_pattern={re.escape(k): r for k, r in ranks.items() if r != rank},
    alpha_pattern={re.escape(k): a for k, a in alphas.items() if a != alpha},
    target_modules=tuple(sizes),
    modules_to_save=tuple(modules_to_save),
    **fields,
  )


def ends_with(module: str, end: str) -> bool:
  """Whether a module has a name, or a name that ends so at a dot."""
  return f".{module}".endswith(f".{end}")


def _named(
  module: str, names: tuple[str, ...] | str, unknown: bool = False
) -> bool:
  """Whether a module is among names, or matches one regular expression.

  Args:
    module: its name.
    names: names or ends of names, or an expression.
    unknown: the answer where an expression is not one that is matched here.
  """
  if not isinstance(names, str):
    return any(ends_with(module, end) for end in names)
  # Of all linear layers PEFT writes the names.
  if names.lower() == _ALL_LINEAR:
    return False
  try:
    return _patterns.fullmatch(names, module)
  except ValueError:
    return unknown


def _first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
  # As PEFT matches, by `(.*\.)?({pattern})$`: `get_pattern_key` of
  # peft/utils/other.py.
  starts = [0, *(i for i, x in enumerate(module, 1) if x == ".")]
  for pattern, value in patterns.items():
    if _patterns.ends(pattern, module, starts):
      return value
  return default


def _most_common(sizes: Mapping[str, Any]) -> Any:
  return collections.Counter(sizes.values()).most_common(1)[0][0]


def _plain(number: float) -> float | int:
  """Integers without a point, as other readers expect them."""
  return int(number) if float(number).is_integer() else number
