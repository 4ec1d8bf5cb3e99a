"""`adapter_config.json` of Hugging Face PEFT: what of it is LoRA as it is here.

A LoRA of PEFT adds `lora_alpha / r * B A`, or `lora_alpha / sqrt(r) * B A` with
`use_rslora`, to weights (out, in). What it can do beyond is refused by name.
"""

import collections
from collections.abc import Iterable, Mapping
import dataclasses
import json
import math
import pathlib
import re
import sys
from typing import Any

from bilora_jax import _files, _patterns

NAME = "adapter_config.json"

# Keys that say nothing about what the adapter computes.
_NEUTRAL = {
  "arrow_config",
  "auto_mapping",
  "base_model_name_or_path",
  "corda_config",
  "ensure_weight_tying",
  "eva_config",
  "fan_in_fan_out",  # of the base's weight; the factors are stored alike
  "inference_mode",
  "loftq_config",
  "lora_ga_config",
  "megatron_core",
  "peft_type",
  "peft_version",
  "qalora_group_size",
  "revision",
  "runtime_config",
  "task_type",
}
_READ = {
  "alpha_pattern",
  "bias",
  "exclude_modules",
  "init_lora_weights",
  "layers_pattern",
  "layers_to_transform",
  "lora_alpha",
  "lora_dropout",
  "modules_to_save",
  "r",
  "rank_pattern",
  "target_modules",
  "use_rslora",
}
# Each is matched with each module.
_MOST = 4096
# Others change the weights that the adapter is added to.
_FLAGS: tuple[Any, ...] = (True, False, None)
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
  """The part of an `adapter_config.json` that counts here.

  Attributes:
    rank: `r`, of the modules that `rank_pattern` does not name.
    alpha: `lora_alpha`, likewise.
    rslora: whether the scale is `alpha / sqrt(rank)`.
    dropout: `lora_dropout`.
    rank_pattern: from regular expressions for the ends of module names, the
      first that matches counts, to ranks.
    alpha_pattern: likewise.
    target_modules: names or ends of names; or one regular expression.
    selective: whether some modules that match have no adapter all the same.
    modules_to_save: names or ends of names of modules that are trained whole.
    task_type: as 'CAUSAL_LM'; None if it does not say.
  """

  rank: int
  alpha: float
  rslora: bool = False
  dropout: float = 0.0
  rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
  alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
  target_modules: tuple[str, ...] | str = ()
  selective: bool = False
  modules_to_save: tuple[str, ...] = ()
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

  def unknown_targets(self, modules: Iterable[str]) -> list[str]:
    """The target modules that are none of these, nor the end of one."""
    if isinstance(self.target_modules, str):
      return []
    known = list(modules)
    return [
      target
      for target in self.target_modules
      if not any(ends_with(module, target) for module in known)
    ]

  def targeted(self, modules: Iterable[str]) -> list[str]:
    """Those of the modules that must have an adapter, as far as it is said."""
    if self.selective or isinstance(self.target_modules, str):
      return []
    return [
      module
      for module in modules
      if any(ends_with(module, target) for target in self.target_modules)
      and not self.is_saved(module)
    ]

  def is_saved(self, module: str) -> bool:
    """Whether a module is trained whole."""
    return any(ends_with(module, end) for end in self.modules_to_save)

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
      "rank_pattern": dict(self.rank_pattern),
      "alpha_pattern": {k: _plain(v) for k, v in self.alpha_pattern.items()},
      "target_modules": list(self.target_modules),
      "modules_to_save": list(self.modules_to_save) or None,
      "bias": "none",
      "fan_in_fan_out": False,
      "inference_mode": True,
      "init_lora_weights": True,
    }
    return json.dumps(config, indent=2) + "\n"


def of(
  sizes: Mapping[str, tuple[int, float]],
  *,
  rslora: bool,
  dropout: float,
  modules_to_save: Iterable[str],
  task_type: str | None,
) -> PeftConfig:
  """The configuration of modules by their ranks and alphas."""
  ranks = {module: rank for module, (rank, _) in sizes.items()}
  alphas = {module: alpha for module, (_, alpha) in sizes.items()}
  rank, alpha = _most_common(ranks), _most_common(alphas)
  return PeftConfig(
    rank=rank,
    alpha=alpha,
    rslora=rslora,
    dropout=dropout,
    # Of the whole name, which is no other module's end.
    rank_pattern={re.escape(k): r for k, r in ranks.items() if r != rank},
    alpha_pattern={re.escape(k): a for k, a in alphas.items() if a != alpha},
    target_modules=tuple(sizes),
    modules_to_save=tuple(modules_to_save),
    task_type=task_type,
  )


def read(folder: pathlib.Path) -> PeftConfig:
  """Reads and checks a folder's `adapter_config.json`.

  Raises:
    ValueError: if it is missing or damaged, or asks for what is not there,
      each such key named.
  """
  path = folder / NAME
  if not path.is_file():
    raise ValueError(
      f"{folder} is no PEFT adapter: it has no {NAME}, which tells its ranks "
      "and scales."
    )
  config = _files.read_json(path)
  if not isinstance(config, dict):
    raise ValueError(
      f"{path} must hold a JSON object; got {_files.shown(config)}."
    )
  faults = _faults(config)
  if faults:
    raise ValueError(
      f"{path} asks for what this package does not have: {'; '.join(faults)}."
    )
  targets = config.get("target_modules") or ()
  return PeftConfig(
    rank=config.get("r", 8),  # PEFT's own defaults
    alpha=float(config.get("lora_alpha", 8)),
    rslora=bool(config.get("use_rslora")),
    dropout=float(config.get("lora_dropout") or 0),
    rank_pattern=config.get("rank_pattern") or {},
    alpha_pattern={
      k: float(v) for k, v in (config.get("alpha_pattern") or {}).items()
    },
    target_modules=targets if isinstance(targets, str) else tuple(targets),
    selective=any(
      config.get(key) not in (None, [], "")
      for key in ("exclude_modules", "layers_to_transform")
    ),
    modules_to_save=tuple(config.get("modules_to_save") or ()),
    task_type=config.get("task_type"),
  )


def ends_with(module: str, end: str) -> bool:
  """Whether a module has a name, or a name that ends so at a dot."""
  return f".{module}".endswith(f".{end}")


def _faults(config: Mapping[str, Any]) -> list[str]:
  """What cannot be read, a phrase each."""
  faults = []
  if config.get("peft_type") != "LORA":
    faults.append(
      f"peft_type is 'LORA'; got {_files.shown(config.get('peft_type'))}"
    )
  if config.get("bias") not in (None, "none"):
    faults.append(
      f"bias is 'none', since biases are trained as modules_to_save; got "
      f"{_files.shown(config['bias'])}"
    )
  init = config.get("init_lora_weights")
  if not any(init is x or init == x for x in _INITS):
    faults.append(
      "init_lora_weights is one that leaves the base's weights alone; got "
      f"{_files.shown(init)}, so convert the adapter to a plain LoRA with PEFT "
      "first"
    )
  for key, check, wanted in (
    ("r", _is_rank, "an integer of at least 1"),
    ("lora_alpha", _is_positive, "a positive number"),
    ("lora_dropout", _is_rate, "a number in [0, 1)"),
    ("use_rslora", lambda x: x in _FLAGS, "true or false"),
    ("task_type", lambda x: isinstance(x, str | None), "a name or null"),
  ):
    if key in config and not check(config[key]):
      faults.append(f"{key} is {wanted}; got {_files.shown(config[key])}")
  for key, check, wanted in (
    ("rank_pattern", _is_rank, "integers of at least 1"),
    ("alpha_pattern", _is_positive, "positive numbers"),
  ):
    pattern = config.get(key) or {}
    if isinstance(pattern, Mapping) and len(pattern) > _MOST:
      faults.append(
        f"{key} has {len(pattern):,} regular expressions; at most {_MOST:,} "
        "are matched"
      )
      continue
    if not isinstance(pattern, Mapping) or not all(
      _is_pattern(name) and check(value) for name, value in pattern.items()
    ):
      faults.append(
        f"{key} goes from regular expressions to {wanted}; got "
        f"{_files.shown(pattern)}"
      )
  faults += [
    f"{key} is a list of names{' or one string' * text}; got "
    f"{_files.shown(config[key])}"
    for key, text in (("target_modules", True), ("modules_to_save", False))
    if not _is_names(config.get(key), text)
  ]
  # A newer PEFT writes keys of features that are off.
  faults += [
    f"{key} is no part of LoRA as it is here; got {_files.shown(value)}"
    for key, value in config.items()
    if key not in _NEUTRAL | _READ and value
  ]
  return faults


def _is_rank(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> bool:
  number = isinstance(value, int | float) and not isinstance(value, bool)
  # Not infinity: a whole number may be above all floats.
  return number and 0 < value <= sys.float_info.max


def _is_rate(value: Any) -> bool:
  return value is None or value == 0 or (_is_positive(value) and value < 1)


def _is_names(value: Any, text: bool) -> bool:
  if value is None or (text and isinstance(value, str)):
    return True
  return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _is_pattern(text: str) -> bool:
  try:
    _patterns.check(text)
  except ValueError:
    return False
  return True


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
