"""The keys of PEFT's `adapter_config.json` that are used and written here."""

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
  """The part of an `adapter_config.json` that this package uses.

  Attributes:
    rank: `r`, for modules that `rank_pattern` does not match.
    alpha: `lora_alpha`, for modules that `alpha_pattern` does not match.
    rslora: whether the scale is `alpha / sqrt(rank)`.
    dora: whether the adapted weights have magnitudes.
    dropout: `lora_dropout`.
    rank_pattern: ranks by regular expressions for the ends of module names; the
      first expression that matches counts.
    alpha_pattern: alphas, likewise.
    target_modules: names or ends of names, or one regular expression.
    exclude_modules: likewise, for modules that have no adapter.
    layers: `layers_to_transform`, the only layers with adapters; None for all.
    layers_pattern: names that precede the numbers of layers; empty for any.
    modules_to_save: ends of names of modules that are trained whole.
    bias: which biases are trained whole: 'none', 'all', or 'lora_only' for
      those of the modules with adapters.
    lora_bias: whether `lora_B` has a bias.
    tied: `ensure_weight_tying`, whether changes of an embedding also change the
      head that is tied to it.
    token_indices: the tokens whose rows of an embedding are trained, by the end
      of the embedding's name; "" for the input embedding.
    task_type: such as 'CAUSAL_LM'; None if the file has none.
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
    """The scale of a module's pair."""
    rank, alpha = self.sizes(module)
    return alpha / (math.sqrt(rank) if self.rslora else rank)

  def targeted(self, modules: Iterable[str]) -> list[str]:
    """The modules that must have an adapter, as far as the file tells.

    PEFT chooses them in `check_target_module_exists` of
    peft/tuners/tuners_utils.py; it ignores names that no module has.
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
    """Whether a module, or a module that contains it, is trained whole.

    The ends of names need not begin at a dot, as in `_set_trainable` of
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
      return False  # the layers are unknown
    parts = module.split(".")
    # A module's name follows the layer's number; the first number counts.
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
    """The text of the file, for PEFT."""
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
  """Makes a configuration from the modules' ranks and alphas.

  Args:
    sizes: `(rank, alpha)` of each module.
    modules_to_save: the modules that are trained whole.
    **fields: other fields of `PeftConfig`.
  """
  ranks = {module: rank for module, (rank, _) in sizes.items()}
  alphas = {module: alpha for module, (_, alpha) in sizes.items()}
  rank, alpha = _most_common(ranks), _most_common(alphas)
  return PeftConfig(
    rank=rank,
    alpha=alpha,
    # The pattern is the whole name, which no other module's name ends with.
    rank_pattern={re.escape(k): r for k, r in ranks.items() if r != rank},
    alpha_pattern={re.escape(k): a for k, a in alphas.items() if a != alpha},
    target_modules=tuple(sizes),
    modules_to_save=tuple(modules_to_save),
    **fields,
  )


def ends_with(module: str, end: str) -> bool:
  """Whether a module's name is `end`, or ends with a dot and `end`."""
  return f".{module}".endswith(f".{end}")


def _named(
  module: str, names: tuple[str, ...] | str, unknown: bool = False
) -> bool:
  """Whether a module is among names, or matches one regular expression.

  Args:
    module: name of the module.
    names: names or ends of names, or an expression.
    unknown: the answer if an expression is not supported here.
  """
  if not isinstance(names, str):
    return any(ends_with(module, end) for end in names)
  # PEFT itself writes the names of all linear layers instead.
  if names.lower() == _ALL_LINEAR:
    return False
  try:
    return _patterns.fullmatch(names, module)
  except ValueError:
    return unknown


def _first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
  # PEFT matches `(.*\.)?({pattern})$` in `get_pattern_key` of
  # peft/utils/other.py.
  starts = [0, *(i for i, x in enumerate(module, 1) if x == ".")]
  for pattern, value in patterns.items():
    if _patterns.ends(pattern, module, starts):
      return value
  return default


def _most_common(sizes: Mapping[str, Any]) -> Any:
  return collections.Counter(sizes.values()).most_common(1)[0][0]


def _plain(number: float) -> float | int:
  """Converts whole floats to integers, as other readers expect."""
  return int(number) if float(number).is_integer() else number
