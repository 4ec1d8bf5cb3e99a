"""The content of a PEFT folder: its tensors, sorted by their use in a model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from bilora_jax import _peft_config, _peft_keys, _peft_names, _peft_tensors
from bilora_jax._peft_names import Names, Places
from bilora_jax._peft_tensors import BASE, Tensors

A, B = ".lora_A.weight", ".lora_B.weight"
BIAS = ".lora_B.bias"
MAGNITUDE = ".lora_magnitude_vector"
_TABLE_A, _TABLE_B = ".lora_embedding_A", ".lora_embedding_B"
_ROWS = ".token_adapter.trainable_tokens_delta"
_MOST = 8

Change = Callable[[np.ndarray], np.ndarray]
"""A function from a weight of the base to the weight with the adapter."""


@dataclasses.dataclass(frozen=True)
class Stored:
  """The content of a folder.

  Attributes:
    config: the folder's configuration.
    places: the model's names, without the prefix if the folder's names lack it.
    pairs: `a` (in, r) and `b` (r, out) of each module.
    magnitudes: DoRA's magnitude, (out,), of each module.
    whole: parameters that were trained whole, by path.
    changes: changes of other tensors of the base, by the tensors' names.
    copies: tensors of the base that were saved beside the adapter, by their
      names in the base: the name in the folder, and the tensor.
    left_out: modules of the folder that the caller chose to ignore.
  """

  config: _peft_config.PeftConfig
  places: Places
  pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
  magnitudes: Mapping[str, np.ndarray]
  whole: Mapping[str, np.ndarray]
  changes: Mapping[str, Change]
  copies: Mapping[str, tuple[str, np.ndarray]]
  left_out: Sequence[str]

  def paths(self) -> list[str]:
    """The paths of the weights that have adapters."""
    known = self.places.adaptable()
    return list(dict.fromkeys(known[module][0] for module in self.pairs))

  def extra(self) -> list[str]:
    """The paths of the parameters that are trained whole."""
    paths = self.places.paths()
    changed = (paths[name] for name in self.changes)
    return sorted({*self.whole, *changed})


def read(
  folder: pathlib.Path, names: Names, prefix: str, left_out: Sequence[str]
) -> Stored:
  """Reads a folder and checks it against its configuration and the names.

  Raises:
    ValueError: as `peft.load`.
  """
  config = _peft_keys.read(folder)
  tensors = _peft_tensors.read(folder)
  bare = not any(name.startswith(prefix) for name in tensors)
  places = Places.of(names, prefix if bare else "")
  reading = _Reading(config, places, tensors)
  gone = reading.leave_out(left_out)
  reading.check_floats()
  reading.share_ties()
  pairs, magnitudes = reading.pairs()
  changes = reading.changes(pairs)
  copies = reading.copies()
  whole = reading.whole(pairs)
  reading.faults += [f"{name} has no place in this model" for name in tensors]
  if not pairs and not reading.faults:
    reading.faults.append("no tensor is a lora_A or a lora_B")
  refuse(reading.faults, f"{folder} holds no adapter of this model")
  return Stored(config, places, pairs, magnitudes, whole, changes, copies, gone)


def refuse(faults: Sequence[str], sentence: str) -> None:
  """Raises a ValueError that lists some of the faults, if there are any."""
  if len(faults) > _MOST:
    # The last faults are of another kind than the first.
    more = f"... ({len(faults)} in all)"
    faults = [*faults[: _MOST - 2], more, *faults[-2:]]
  if faults:
    raise ValueError(f"{sentence}: {'; '.join(faults)}.")


@dataclasses.dataclass
class _Reading:
  """A folder's tensors; each step removes the tensors that it can interpret.

  Attributes:
    faults: a phrase for each fault.
  """

  config: _peft_config.PeftConfig
  places: Places
  tensors: Tensors
  faults: list[str] = dataclasses.field(default_factory=list)

  def leave_out(self, ends: Sequence[str]) -> list[str]:
    """Removes tensors of modules whose names have these ends.

    Returns:
      The modules.
    """
    gone: dict[str, None] = {}
    for name in list(self.tensors):
      parts = name.split(".")
      modules = (".".join(parts[:i]) for i in range(1, len(parts)))
      module = next(
        (m for m in modules if any(_peft_config.ends_with(m, e) for e in ends)),
        None,
      )
      if module is not None:
        gone[module] = None
        del self.tensors[name]
    return list(gone)

  def check_floats(self) -> None:
    self.faults += [
      f"{name} is of {tensor.dtype}, but weights are floats"
      for name, tensor in self.tensors.items()
      if not jnp.issubdtype(tensor.dtype, jnp.floating)
    ]

  def share_ties(self) -> None:
    """Removes tensors of modules tied to an embedding, if they equal its own.

    PEFT trains the two apart, unless `ensure_weight_tying` is on or the rows of
    single tokens are trained.
    """
    for other, table in self.places.ties().items():
      own = self.tensors.get(f"{table}.weight")
      twin = self.tensors.get(f"{other}.weight")
      saved = any(map(self.config.is_saved, (table, other)))
      if saved and (own is not None or twin is not None):
        same = (
          own is not None
          and twin is not None
          and _peft_tensors.equal(own, twin)
        )
        if not same and not (self.config.tied and twin is None):
          self._apart(table, other)
        self.tensors.pop(f"{other}.weight", None)
      ours = [self.tensors.get(table + end) for end in (_TABLE_B, _TABLE_A)]
      theirs = [self.tensors.pop(other + end, None) for end in (A, B)]
      if any(x is not None for x in (*ours, *theirs)) and not all(
        x is not None and y is not None and _peft_tensors.equal(x.T, y)
        for x, y in zip(ours, theirs)
      ):
        self._apart(table, other)

  def _apart(self, table: str, other: str) -> None:
    self.faults.append(
      f"{table} and {other} are trained apart, but this model ties them; train "
      "with ensure_weight_tying=True, or use a base whose head is not tied"
    )

  def pairs(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Factors and magnitudes of the modules that have or need adapters."""
    known = self.places.adaptable()
    pairs: dict[str, Any] = {}
    magnitudes: dict[str, np.ndarray] = {}
    for module in dict.fromkeys(
      [*self.config.targeted(known), *self._modules((A, B), known)]
    ):
      ends = (A, B, MAGNITUDE) if self.config.dora else (A, B)
      lost = [module + end for end in ends if module + end not in self.tensors]
      there = {end: self.tensors.pop(module + end, None) for end in ends}
      a, b, magnitude = (there.get(end) for end in (A, B, MAGNITUDE))
      if lost or a is None or b is None:
        self.faults += [f"{name} is missing" for name in lost]
        continue
      rank, _ = self.config.sizes(module)
      pair = _peft_names.from_torch(known[module][1], a, b)
      if pair is None or pair[0].shape[1] != rank:
        self.faults.append(
          f"{module} has lora_A of the shape {a.shape} and lora_B of "
          f"{b.shape}, which do not have the rank {rank} that "
          f"{_peft_config.NAME} gives it"
        )
        continue
      pairs[module] = tuple(x.astype(np.float32) for x in pair)
      if magnitude is not None:
        # Magnitudes of convolutions are (1, out, 1, 1).
        magnitudes[module] = magnitude.astype(np.float32).reshape(-1)
    return pairs, magnitudes

  def _modules(
    self, ends: Iterable[str], known: Mapping[str, Any]
  ) -> list[str]:
    """The known modules that have tensors with these ends of names."""
    return [
      name.removesuffix(end)
      for end in ends
      for name in self.tensors
      if name.endswith(end) and name.removesuffix(end) in known
    ]

  def changes(self, pairs: Mapping[str, Any]) -> dict[str, Change]:
    """The changes of embeddings, and of biases by `lora_bias`."""
    changes: dict[str, Change] = {}
    paths = self.places.paths()
    embeddings = self.places.embeddings()
    for module in dict.fromkeys(
      [
        *self.config.targeted(embeddings),
        *self._modules((_TABLE_A, _TABLE_B), embeddings),
      ]
    ):
      ends = (_TABLE_A, _TABLE_B)
      a, b = (self.tensors.pop(module + end, None) for end in ends)
      rank, _ = self.config.sizes(module)
      if (
        a is None
        or b is None
        or (a.ndim, b.ndim) != (2, 2)
        or (len(a), b.shape[1]) != (rank, rank)
      ):
        self.faults.append(
          f"{module} has no lora_embedding_A and lora_embedding_B of the rank "
          f"{rank} that {_peft_config.NAME} gives it"
        )
      elif self.tensors.pop(module + MAGNITUDE, None) is not None:
        self.faults.append(
          f"{module} is an embedding with a magnitude of DoRA's, which only "
          "linear layers have here; merge the adapter in PEFT"
        )
      else:
        scale = self.config.scale(module)
        changes[f"{module}.weight"] = _plus(scale, _product(b, a).T)
    trained = self._modules((_ROWS,), _weights(paths))
    if self.config.token_indices and not trained:
      self.faults.append(f"an embedding{_ROWS} is missing")
    for module in trained:
      rows = self.tensors.pop(module + _ROWS)
      tokens = self.config.tokens_of(module)
      if rows.ndim != 2 or len(rows) != len(tokens):
        self.faults.append(
          f"{module} has rows of the shape {rows.shape}, but "
          f"trainable_token_indices has {len(tokens)} tokens for it"
        )
        continue
      changes[f"{module}.weight"] = _with_rows(tokens, rows)
    for module in pairs if self.config.lora_bias else ():
      bias = self.tensors.pop(module + BIAS, None)
      if bias is None:
        self.faults.append(f"{module}{BIAS} is missing")
        continue
      if f"{module}.bias" not in paths:
        self.faults.append(
          f"{module} has a lora_bias and, in this model, no bias to add it to; "
          "merge the adapter in PEFT"
        )
        continue
      changes[f"{module}.bias"] = _plus(self.config.scale(module), bias)
    return changes

  def copies(self) -> dict[str, tuple[str, np.ndarray]]:
    """Weights of the base that PEFT writes beside an adapter."""
    paths, ties = self.places.paths(), self.places.ties()
    copies: dict[str, tuple[str, np.ndarray]] = {}
    for name in list(self.tensors):
      module, _, leaf = name.rpartition(".")
      inner = module.removesuffix(BASE[:-1])
      wrapped = inner != module
      if not wrapped and self._is_trained(module, leaf):
        continue
      if wrapped and leaf == "bias" and self.config.bias != "none":
        continue
      original = f"{ties.get(inner, inner)}.{leaf}"
      if original in paths:
        copies[original] = name, self.tensors.pop(name)
    return copies

  def _is_trained(self, module: str, leaf: str) -> bool:
    return self.config.is_saved(module) or (
      leaf == "bias" and self.config.bias == "all"
    )

  def whole(self, pairs: Mapping[str, Any]) -> Tensors:
    """Parameters that were trained whole, by path."""
    self._unwrap_biases(pairs)
    parameters: Tensors = {}
    for path in self.places.names:
      names = self.places.tensor_names(path)
      saved = [n for n in names if self.config.is_saved(n.rpartition(".")[0])]
      there = [n for n in names if n in self.tensors]
      self.faults += [f"{n} is missing" for n in saved if n not in self.tensors]
      if len(there) == len(names):
        try:
          parameters[path] = self.places.parameter(path, self.tensors)
        except ValueError as error:
          self.faults.append(str(error))
      elif there and len(saved) < len(names):
        lost = ", ".join(n for n in names if n not in there)
        self.faults.append(f"{lost} are missing, but scanned with {there[0]}")
      for name in there:
        del self.tensors[name]
    return parameters

  def _unwrap_biases(self, pairs: Mapping[str, Any]) -> None:
    """Renames trained biases of adapted modules like those of other modules."""
    for module in pairs:
      wrapped = f"{module}{BASE}bias"
      if wrapped in self.tensors:
        self.tensors[f"{module}.bias"] = self.tensors.pop(wrapped)


def _weights(paths: Iterable[str]) -> dict[str, None]:
  """The modules that have a weight."""
  ends = ".weight"
  return {n.removesuffix(ends): None for n in paths if n.endswith(ends)}


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  return x.astype(np.float32) @ y.astype(np.float32)


def _plus(scale: float, added: np.ndarray) -> Change:
  def change(base: np.ndarray) -> np.ndarray:
    if added.shape != base.shape:
      raise ValueError(f"the change has the shape {added.shape}")
    return base + np.float32(scale) * added.astype(np.float32)

  return change


def _with_rows(tokens: Sequence[int], rows: np.ndarray) -> Change:
  def change(base: np.ndarray) -> np.ndarray:
    if max(tokens, default=0) >= len(base):
      raise ValueError(
        f"trainable_token_indices has the token {max(tokens)}, but the base "
        f"has {len(base)} tokens"
      )
    if rows.shape[1:] != base.shape[1:]:
      raise ValueError(f"the new rows have the shape {rows.shape[1:]}")
    new = base.copy()
    new[list(tokens)] = rows.astype(np.float32)
    return new

  return change
