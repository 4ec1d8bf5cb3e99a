"""Reads Hugging Face PEFT's `adapter_config.json` and checks each key.

A LoRA of PEFT adds `lora_alpha / r * B A`, or `lora_alpha / sqrt(r) * B A` with
`use_rslora`, to weights (out, in). Keys that ask for more are refused by name.
"""

from collections.abc import Mapping
import pathlib
import sys
from typing import Any

from bilora_jax import _files, _patterns
from bilora_jax._peft_config import NAME, PeftConfig

NEWEST = "0.21.2"
"""The newest PEFT whose keys are known here."""

# Keys that do not change what the adapter computes.
_NEUTRAL = {
  "arrow_config",
  "auto_mapping",
  "base_model_name_or_path",
  "corda_config",
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
  "target_parameters",  # their tensors are named like those of modules
  "task_type",
  "velora_config",  # of the backward pass
}
_READ = {
  "alpha_pattern",
  "bias",
  "ensure_weight_tying",
  "exclude_modules",
  "init_lora_weights",
  "layers_pattern",
  "layers_to_transform",
  "lora_alpha",
  "lora_bias",
  "lora_dropout",
  "modules_to_save",
  "r",
  "rank_pattern",
  "target_modules",
  "trainable_token_indices",
  "use_dora",
  "use_rslora",
}
# The effect of the other known keys.
_BEYOND = {
  "alora_invocation_tokens": "an adapter of the tokens after some others",
  "kasa_config": "a base without its least singular values",
  "layer_replication": "a base whose layers are repeated",
  "megatron_config": "an adapter of Megatron's layers",
  "monteclora_config": "an adapter that is drawn at random",
  "use_bdlora": "factors in blocks",
  "use_qalora": "an adapter of pooled inputs",
}
# The most patterns, as each pattern is matched with each module.
_MOST = 4096
_FLAGS: tuple[Any, ...] = (True, False, None)
# Other initialisations change the weights to which the adapter is added.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_BIASES = (None, "none", "all", "lora_only")


def read(folder: pathlib.Path) -> PeftConfig:
  """Reads and checks a folder's `adapter_config.json`.

  Raises:
    ValueError: if the file is missing or damaged, or has unsupported keys; the
      message lists each of them.
  """
  path = folder / NAME
  if not path.is_file():
    raise ValueError(
      f"{folder} is not a PEFT adapter: it has no {NAME}, which holds ranks "
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
      f"{path} has values that are not supported: {'; '.join(faults)}."
    )
  layers = config.get("layers_to_transform")
  return PeftConfig(
    rank=config.get("r", 8),  # PEFT's own defaults
    alpha=float(config.get("lora_alpha", 8)),
    rslora=bool(config.get("use_rslora")),
    dora=bool(config.get("use_dora")),
    dropout=float(config.get("lora_dropout") or 0),
    rank_pattern=config.get("rank_pattern") or {},
    alpha_pattern={
      k: float(v) for k, v in (config.get("alpha_pattern") or {}).items()
    },
    target_modules=_names(config.get("target_modules")),
    exclude_modules=_names(config.get("exclude_modules")),
    layers=(layers,)
    if isinstance(layers, int)
    else tuple(layers or ()) or None,
    layers_pattern=_several(config.get("layers_pattern")),
    modules_to_save=_several(config.get("modules_to_save")),
    bias=config.get("bias") or "none",
    lora_bias=bool(config.get("lora_bias")),
    tied=bool(config.get("ensure_weight_tying")),
    token_indices=_tokens(config.get("trainable_token_indices")),
    task_type=config.get("task_type"),
  )


def _faults(config: Mapping[str, Any]) -> list[str]:
  """A phrase for each key that cannot be read."""
  faults = []
  if config.get("peft_type") != "LORA":
    faults.append(
      f"peft_type is 'LORA'; got {_files.shown(config.get('peft_type'))}"
    )
  if config.get("bias") not in _BIASES:
    faults.append(
      f"bias is 'none', 'all' or 'lora_only'; got "
      f"{_files.shown(config['bias'])}"
    )
  init = config.get("init_lora_weights")
  if not any(init is x or init == x for x in _INITS):
    faults.append(
      "init_lora_weights must leave the base's weights unchanged; got "
      f"{_files.shown(init)}, so convert the adapter to a plain LoRA with PEFT "
      "first"
    )
  for key, check, wanted in (
    ("r", _is_rank, "an integer of at least 1"),
    ("lora_alpha", _is_positive, "a positive number"),
    ("lora_dropout", _is_rate, "a number in [0, 1)"),
    ("use_rslora", _is_flag, "true or false"),
    ("use_dora", _is_flag, "true or false"),
    ("lora_bias", _is_flag, "true or false"),
    ("ensure_weight_tying", _is_flag, "true or false"),
    ("layers_to_transform", _is_layers, "the number of a layer, or a list"),
    ("trainable_token_indices", _is_tokens, "a list of tokens, or one by name"),
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
    for key, text in (
      ("target_modules", True),
      ("exclude_modules", True),
      ("layers_pattern", True),
      ("modules_to_save", False),
    )
    if not _is_names(config.get(key), text)
  ]
  # A newer PEFT also writes keys of features that are off.
  beyond = {
    key: value
    for key, value in config.items()
    if key not in _NEUTRAL | _READ and value
  }
  faults += [
    f"{key}={_files.shown(beyond[key])} is {what}, which is more than a LoRA; "
    "if PEFT can merge the adapter, load the merged model"
    for key, what in _BEYOND.items()
    if key in beyond
  ]
  unknown = {k: v for k, v in beyond.items() if k not in _BEYOND}
  if unknown:
    version = config.get("peft_version")
    faults.append(
      ", ".join(f"{k}={_files.shown(v)}" for k, v in unknown.items())
      + " is unknown here; the folder is by "
      + (
        f"PEFT {version}" if version else "a PEFT that does not say its version"
      )
      + f", and the newest that is known is {NEWEST}, so update bilora_jax, or "
      "merge the adapter in PEFT"
    )
  return faults


def _is_rank(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> bool:
  number = isinstance(value, int | float) and not isinstance(value, bool)
  # Not infinity, as an integer may be above all floats.
  return number and 0 < value <= sys.float_info.max


def _is_flag(value: Any) -> bool:
  return value in _FLAGS


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_layers(value: Any) -> bool:
  several = value if isinstance(value, list) else [value]
  return value is None or all(map(_is_count, several))


def _is_tokens(value: Any) -> bool:
  lists = value.values() if isinstance(value, Mapping) else [value]
  return value is None or all(
    isinstance(tokens, list) and all(map(_is_count, tokens)) for tokens in lists
  )


def _is_rate(value: Any) -> bool:
  return value is None or value == 0 or (_is_positive(value) and value < 1)


def _is_names(value: Any, text: bool) -> bool:
  if value is None or (text and isinstance(value, str)):
    return True
  return isinstance(value, list) and all(isinstance(x, str) for x in value)


def _names(value: Any) -> tuple[str, ...] | str:
  return value if isinstance(value, str) else tuple(value or ())


def _several(value: Any) -> tuple[str, ...]:
  names = _names(value)
  return (names,) * bool(names) if isinstance(names, str) else names


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:
  named = value if isinstance(value, Mapping) else {"": value or ()}
  return {end: tuple(tokens) for end, tokens in named.items() if tokens}


def _is_pattern(text: str) -> bool:
  try:
    _patterns.check(text)
  except ValueError:
    return False
  return True
