"""`LoraSpec`: which weights get adapters, and of which rank and scale."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np

from bilora_jax import _patterns, _quantised

_OVERRIDES = ("rank", "alpha", "auxiliary_rank")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSpec:
  """Which weights `adapt` gives adapters, and which adapters.

  Attributes:
    rank: r1, the rank of the primary.
    alpha: a pair's weight is `alpha / rank * a @ b`. The auxiliary has the same
      scale, for any auxiliary rank.
    auxiliary_rank: r2; 0 for plain LoRA.
    targets: the modules to adapt. A string is a regular expression for the
      whole module path, as `layers/attention/(query|value)`. A sequence holds
      the last parts of paths, as `('query', 'value')`. A mapping goes from
      regular expressions, of which the first that matches counts, to other
      values: `{'.*query': {'rank': 16, 'alpha': 32.0}, '.*value': {}}`. Each
      entry and each key must match a module of the model.
    exclude: a regular expression for the paths of modules without adapters. It
      must match a module of the model.
    extra: a regular expression for the paths of parameters to train whole, as
      `head/.*`: a new head, norms, biases. These parameters get no adapters.
    rslora: scale by `alpha / sqrt(rank)`, Kalajdzievski, arXiv 2312.03732.
    dora: scale each column of the adapted weight to a trained magnitude, which
      is in `extra` as `kernel_magnitude` and starts at the column's norm:
      `W = m * (W0 + s a b) / ||W0 + s a b||`, with no gradient through the
      norm, Liu et al., arXiv 2402.09353. The auxiliary, if it is present, is in
      the sum and in its norm. A step reads the adapted kernels once more, at
      the cost of r1 + r2 more tokens. Not where code sees shards of an input,
      as under `jax.shard_map`.
    dropout: dropout rate at the input of the adapters; active if `apply` gets a
      `dropout` rng.
    dtype: name of the dtype in which adapters compute, as 'bfloat16'; None for
      the dtype of the adapted layer, which adapters of convolutions always
      use. Adapters are always stored in float32.
    base_dtype: storage of the adapted kernels after `Adapted.quantize`:
      'nf4' (4-bit NormalFloat, Dettmers et al., arXiv 2305.14314), 'int8',
      'fp8' (float8_e4m3fn), or None for unchanged floats. It does not change
      the dtype in which layers compute.
    tile_size: number of weights, neighbours along the input, that share one
      quantisation scale; None for all weights that an output sums over. If it
      does not divide the input's size, the next lower divisor is used, or the
      whole input if this divisor is under half of `tile_size`.

  Regular expressions are Python's, without references to an earlier match, as
  `\\1`, and without possessive quantifiers, as `a*+`. They can come from files
  of others, so the time to match any pattern is bounded.

  Raises:
    ValueError: if a rank, alpha, dropout, pattern, dtype or tile size is out of
      bounds.
  """

  rank: int = 8
  alpha: float = 16.0
  auxiliary_rank: int = 8
  targets: str | Sequence[str] | Mapping[str, Mapping[str, Any]] = ".*"
  exclude: str | None = None
  extra: str | None = None
  rslora: bool = False
  dora: bool = False
  dropout: float = 0.0
  dtype: str | None = None
  base_dtype: str | None = None
  tile_size: int | None = 64

  def __post_init__(self):
    _check_sizes(self.rank, self.alpha, self.auxiliary_rank, "")
    for name in (*_OVERRIDES, "dropout", "tile_size"):
      object.__setattr__(self, name, _plain(getattr(self, name)))
    if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
      raise ValueError(f"dropout is in [0, 1); got {self.dropout}.")
    if self.dtype is not None:
      object.__setattr__(self, "dtype", _float_name(self.dtype))
    for name in ("rslora", "dora"):
      if not isinstance(getattr(self, name), bool):
        raise ValueError(
          f"{name} is True or False; got {getattr(self, name)!r}."
        )
    if self.base_dtype not in (None, *_quantised.QTYPES):
      raise ValueError(
        f"base_dtype is one of {', '.join(_quantised.QTYPES)}, or None; got "
        f"{self.base_dtype!r}."
      )
    size = self.tile_size
    if size is not None and (not _is_integer(size) or size < 1):
      raise ValueError(
        f"tile_size is an integer of at least 1, or None; got {size!r}."
      )
    if not self.targets:
      raise ValueError("targets is empty: it must name a module to adapt.")
    if not isinstance(self.targets, str | Mapping):
      if not isinstance(self.targets, Sequence) or not all(
        isinstance(target, str) for target in self.targets
      ):
        raise ValueError(
          "targets is a regular expression, a sequence of the last parts of "
          f"paths, or a mapping; got {self.targets!r}."
        )
      object.__setattr__(self, "targets", tuple(self.targets))
    patterns = [p for p in (self.exclude, self.extra) if p is not None]
    if isinstance(self.targets, str):
      patterns.append(self.targets)
    elif isinstance(self.targets, Mapping):
      patterns.extend(self.targets)
      for pattern, overrides in self.targets.items():
        if not isinstance(overrides, Mapping):
          raise ValueError(
            "a mapping of targets goes from patterns to other values for them, "
            f"as {{'rank': 4}}; got {overrides!r} for {pattern!r}."
          )
        unknown = sorted(set(overrides) - set(_OVERRIDES))
        if unknown:
          raise ValueError(
            f"a target may override {', '.join(_OVERRIDES)}; got {unknown} "
            f"for {pattern!r}."
          )
        _check_sizes(*self._sizes(overrides), f" for target {pattern!r}")
      plain = {
        pattern: {name: _plain(size) for name, size in overrides.items()}
        for pattern, overrides in self.targets.items()
      }
      object.__setattr__(self, "targets", plain)
    for pattern in patterns:
      _patterns.check(pattern)

  def _sizes(self, overrides: Mapping[str, Any]) -> tuple[int, float, int]:
    rank, alpha, auxiliary_rank = (
      overrides.get(name, getattr(self, name)) for name in _OVERRIDES
    )
    return rank, alpha, auxiliary_rank

  def match(self, path: str) -> tuple[int, int, float] | None:
    """How the module at `path` is adapted.

    Returns:
      `(rank, auxiliary_rank, scale)`, or None for no adapter.
    """
    sizes = self.sizes(path)
    if sizes is None:
      return None
    rank, alpha, auxiliary_rank = sizes
    return rank, auxiliary_rank, self.scale(rank, alpha)

  def scale(self, rank: int, alpha: float) -> float:
    """The scale of a pair."""
    return alpha / (math.sqrt(rank) if self.rslora else rank)

  def sizes(self, path: str) -> tuple[int, float, int] | None:
    """`(rank, alpha, auxiliary_rank)` of the module at `path`, or None."""
    if self.is_excluded(path):
      return None
    targets = self.targets
    keys = [targets] if isinstance(targets, str) else targets
    key = next((key for key in keys if self.is_target(key, path)), None)
    if key is None:
      return None
    return self._sizes(targets[key] if isinstance(targets, Mapping) else {})

  def is_target(self, key: str, path: str) -> bool:
    """Whether one entry or key of `targets` matches the module at `path`."""
    if isinstance(self.targets, str | Mapping):
      return _patterns.fullmatch(key, path)
    return f"/{path}".endswith(f"/{key}")

  def is_excluded(self, path: str) -> bool:
    """Whether `exclude` matches the module at `path`."""
    return self.exclude is not None and _patterns.fullmatch(self.exclude, path)

  def is_extra(self, path: str) -> bool:
    """Whether the parameter at `path` is trained whole."""
    return self.extra is not None and _patterns.fullmatch(self.extra, path)


def _check_sizes(rank: Any, alpha: Any, auxiliary_rank: Any, where: str):
  if not _is_integer(rank) or rank < 1:
    raise ValueError(f"rank is an integer of at least 1; got {rank!r}{where}.")
  if not _is_integer(auxiliary_rank) or auxiliary_rank < 0:
    raise ValueError(
      "auxiliary_rank is an integer of at least 0 (0: plain LoRA); got "
      f"{auxiliary_rank!r}{where}."
    )
  if not _is_number(alpha) or alpha <= 0:
    raise ValueError(f"alpha is a positive number; got {alpha!r}{where}.")


def _is_integer(value: Any) -> bool:
  value = _plain(value)
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  """Whether a value is a finite float, or an integer in the range of floats."""
  value = _plain(value)
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return number and abs(value) <= sys.float_info.max


def _plain(value: Any) -> Any:
  """Converts NumPy's numbers to Python's, for files and comparisons."""
  return value.item() if isinstance(value, np.number) else value


def _float_name(dtype: Any) -> str:
  try:
    known = jnp.dtype(dtype)
  except TypeError:
    known = None
  if known is None or not jnp.issubdtype(known, jnp.floating):
    raise ValueError(
      "dtype is the name of a floating-point dtype, as 'bfloat16'; got "
      f"{dtype!r}."
    )
  return known.name
