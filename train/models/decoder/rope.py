"""Rotary positions: their frequencies, and the scaling for longer contexts.

K is the width of a head. Rotary positions are by Su et al., arXiv 2104.09864.
The keys of config.json are those of transformers (modeling_rope_utils.py).
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, Protocol

import numpy as np

from ... import checked, options

THETA = 10000.0
"""The base of Su et al., for a config.json that has none."""

_FACTOR_KEYS = ("rope_parameters", "rope_scaling")


class Scaling(Protocol):
  """A change of a model's frequencies for a longer context.

  Attributes:
    amplitude: the factor of the cosines and sines.
  """

  @property
  def amplitude(self) -> float: ...

  def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
    """Returns each pair's angle per position, in radians, float64 (K/2,)."""
    ...


def frequencies(theta: float, head_dim: int) -> np.ndarray:
  """Returns each pair's angle per position, in radians, float64 (K/2,)."""
  return np.float64(theta) ** -(np.arange(0, head_dim, 2) / head_dim)


@dataclasses.dataclass(frozen=True)
class Linear:
  """Divides all frequencies by one factor (Chen et al., arXiv 2306.15595).

  Raises:
    ValueError: the factor is not a positive number.
  """

  factor: float
  amplitude = 1.0

  def __post_init__(self):
    _check_positive(self, "factor")

  def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
    """As `Scaling`'s."""
    return frequencies(theta, head_dim) / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3:
  """Llama 3's scaling of the slow frequencies (arXiv 2407.21783).

  Wavelengths above `original_max_position_embeddings / low_freq_factor` are
  multiplied by `factor`. Wavelengths below `original_max_position_embeddings /
  high_freq_factor` do not change. The frequencies between are interpolated.

  Raises:
    ValueError: a value is not a positive number, or the two frequency factors
      are not in order.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int
  amplitude = 1.0

  def __post_init__(self):
    _check_positive(self, *(x.name for x in dataclasses.fields(self)))
    _check_order(self, "low_freq_factor", "high_freq_factor")

  def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
    """As `Scaling`'s."""
    unscaled = frequencies(theta, head_dim)
    # `turns` are rotations within the original context. Between the two
    # factors, the share of the original frequency grows from 0 to 1.
    turns = self.original_max_position_embeddings * unscaled / (2 * np.pi)
    low, high = self.low_freq_factor, self.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return unscaled * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN (Peng et al., arXiv 2309.00071).

  Attributes:
    factor: the divisor of the frequencies of slow pairs.
    original_max_position_embeddings: the positions before the scaling.
    amplitude: the factor of the cosines and sines.
    beta_fast: pairs that turn at least so often within the original positions
      keep their frequency.
    beta_slow: pairs that turn at most so often have their frequency divided.
    truncate: whether these two bounds are rounded to whole pairs.

  Raises:
    ValueError: a number is not positive, or the two bounds are not in order.
  """

  factor: float
  original_max_position_embeddings: int
  amplitude: float
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True

  def __post_init__(self):
    names = [x.name for x in dataclasses.fields(self)]
    _check_positive(self, *names[:-1])
    _check_order(self, "beta_slow", "beta_fast")

  def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
    """As `Scaling`'s."""
    low, high = (
      self._pair(turns, theta, head_dim)
      for turns in (self.beta_fast, self.beta_slow)
    )
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 * (low == high)  # no division by 0, as in transformers
    divided = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    unscaled = frequencies(theta, head_dim)
    return unscaled * (1 - divided + divided / self.factor)

  def _pair(self, turns: float, theta: float, head_dim: int) -> float:
    """Returns the pair that turns so often within the original positions."""
    positions = self.original_max_position_embeddings / (2 * math.pi * turns)
    return head_dim * math.log(positions) / (2 * math.log(theta))


def read(
  config: Mapping[str, Any], default_theta: float = THETA
) -> tuple[float, Scaling | None]:
  """Returns the rotary base and scaling of a config.json.

  Args:
    config: the config.json of transformers 4 (`rope_theta` and `rope_scaling`)
      or 5 (`rope_parameters`).
    default_theta: the base if the file has none.

  Returns:
    the base; and the scaling, or None. A `dynamic` scaling gives None: it
    changes only rows longer than `max_position_embeddings`, which the decoder
    refuses.

  Raises:
    ValueError: a value is wrong, or the kind of scaling is not implemented.
  """
  for key in _FACTOR_KEYS:
    if not options.fits(config.get(key), dict | None):
      raise ValueError(
        f"The rotary parameters, {key}, must be an object or null, got "
        f"{options.shown(config[key])}."
      )
  rope = next((config[key] for key in _FACTOR_KEYS if config.get(key)), {})
  for found in (rope, config):
    partial = found.get("partial_rotary_factor")
    if partial not in (None, 1.0):
      raise ValueError(
        "partial_rotary_factor must be 1.0, the only one that this decoder "
        f"implements, got {options.shown(partial)}."
      )
  theta = rope.get("rope_theta", config.get("rope_theta", default_theta))
  # Older files have the key `type`.
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in _KINDS:
    raise ValueError(
      f"rope_type must be one of {', '.join(_KINDS)}, which this decoder "
      f"implements, got {options.shown(kind)}."
    )
  return theta, _KINDS[kind](rope, config)


def _none(rope: Mapping[str, Any], config: Mapping[str, Any]) -> None:
  del rope, config


def _linear(rope: Mapping[str, Any], config: Mapping[str, Any]) -> Linear:
  del config
  return Linear(**_given("linear", rope, ("factor",)))


def _dynamic(rope: Mapping[str, Any], config: Mapping[str, Any]) -> None:
  del config
  Linear(**_given("dynamic", rope, ("factor",)))  # its factor is checked


def _llama3(rope: Mapping[str, Any], config: Mapping[str, Any]) -> Llama3:
  del config
  names = [field.name for field in dataclasses.fields(Llama3)]
  return Llama3(**_given("llama3", rope, names))


def _yarn(rope: Mapping[str, Any], config: Mapping[str, Any]) -> Yarn:
  positions = config["max_position_embeddings"]
  original = rope.get("original_max_position_embeddings", positions)
  for value in (positions, original):
    if not options.fits(value, float) or value <= 0:
      raise ValueError(
        "max_position_embeddings and original_max_position_embeddings must be "
        f"positive numbers, got {options.shown(value)}."
      )
  factor = rope.get("factor")
  if factor is None:
    factor = positions / original
  # The default amplitude is the paper's. DeepSeek's is a quotient.
  amplitude = rope.get("attention_factor")
  if amplitude is None:
    scales = [rope.get(key) for key in ("mscale", "mscale_all_dim")]
    if all(scales):
      amplitude = _magnitude(factor, scales[0]) / _magnitude(factor, scales[1])
    else:
      amplitude = _magnitude(factor, 1.0)
  # For transformers, null and 0 mean that there is no value.
  bounds = {
    key: rope[key] for key in ("beta_fast", "beta_slow") if rope.get(key)
  }
  truncate = checked.truth(rope, "truncate", True)
  return Yarn(factor, original, amplitude, truncate=truncate, **bounds)


def _magnitude(factor: Any, scale: Any) -> float:
  for value in (factor, scale):
    if not options.fits(value, float):
      raise ValueError(
        "factor, mscale and mscale_all_dim of the rotary scaling must be "
        f"numbers, got {options.shown(value)}."
      )
  return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


_KINDS = {
  "default": _none,
  "linear": _linear,
  "dynamic": _dynamic,
  "llama3": _llama3,
  "yarn": _yarn,
}


def _given(kind: str, rope: Mapping[str, Any], names: Any) -> dict[str, Any]:
  missing = [name for name in names if name not in rope]
  if missing:
    raise ValueError(
      f"The rotary parameters of type {kind!r} lack {', '.join(missing)}."
    )
  return {name: rope[name] for name in names}


def _check_positive(scaling: Any, *names: str) -> None:
  for name in names:
    value = getattr(scaling, name)
    if not options.fits(value, float) or value <= 0:
      raise ValueError(
        f"{name} of the rotary scaling must be a positive number, got "
        f"{options.shown(value)}."
      )


def _check_order(scaling: Any, low: str, high: str) -> None:
  if getattr(scaling, low) >= getattr(scaling, high):
    raise ValueError(
      f"{low} of the rotary scaling must be below {high}, got "
      f"{getattr(scaling, low)} and {getattr(scaling, high)}."
    )
