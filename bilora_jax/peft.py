"""Hugging Face PEFT's LoRA folders: written of a primary, read as one.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. PEFT's
`lora_A` is (r, in) and its `lora_B` (out, r), the transposes of `Factors`.

The functions know nothing of a model but its names: `names` goes from paths of
parameters to Hugging Face's modules, as from `encoder/layer_0/query/kernel` to
`bert.encoder.layer.0.attention.self.query`. A parameter with leading axes of
scanned layers or experts has a sequence of modules, row by row. Parameters that
are trained whole, as a head's `head/kernel` and `head/bias`, are there as well.
Names of weights without adapters do no harm. Kernels of several axes, as those
of `nn.DenseGeneral`, are the two-dimensional ones of `nn.Linear`, reshaped; a
module that is not linear in PyTorch is named as a `Convolution`.
"""

from collections.abc import Mapping
import dataclasses
import math
import os
import pathlib
import re
from typing import Any

from flax import traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from bilora_jax import _files, _peft_config, _peft_names
from bilora_jax._adapt import Adapted
from bilora_jax._factors import Factors, is_factors
from bilora_jax._peft_names import Convolution as Convolution
from bilora_jax._peft_names import Names as Names
from bilora_jax._peft_names import Places
from bilora_jax._peft_names import Wider as Wider
from bilora_jax._spec import LoraSpec

_TENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


def save(
  folder: str | os.PathLike[str],
  adapted: Adapted,
  adapters: Any,
  names: Names,
  *,
  base_model: str = "",
  task_type: str | None = None,
  auxiliary: bool = False,
) -> None:
  """Writes the primary, and `extra` as `modules_to_save`, as PEFT would.

  PEFT computes with it what `adapted.apply(variables, primary(adapters), ...)`
  does. Ranks and alphas that differ by module become `rank_pattern` and
  `alpha_pattern`. Each file is whole or not there; the configuration is the
  last.

  Args:
    folder: is created; its files of these names are replaced.
    adapted: the model that the adapters are for.
    adapters: from `adapted.init`, with or without the auxiliary.
    names: of all that is trained; see the module.
    base_model: the name or folder of the base, for those who read the folder.
    task_type: as 'CAUSAL_LM'; None lets PEFT's readers choose the model.
    auxiliary: also write the auxiliary, joined with the primary along the
      rank. It is not part of what Bi-LoRA trains, and does not leave otherwise.

  Raises:
    ValueError: if the adapters are not of this model and spec, a name is
      missing or does not fit, each named, or there is no auxiliary to write.
    OSError: if a file cannot be written.
  """
  _refuse_dora(adapted.spec)
  adapted.check(adapters)
  if auxiliary and "auxiliary" not in adapters:
    raise ValueError(
      "auxiliary=True writes the auxiliary too, and the adapters have none."
    )
  pairs = _flatten(adapters["primary"])
  extra = _flatten(adapters.get("extra", {}))
  places = Places.of(names)
  places.require([*pairs, *extra])
  if auxiliary:
    for path, other in _flatten(adapters["auxiliary"]).items():
      pairs[path] = pairs[path].join(other)
  tensors: dict[str, Any] = {}
  sizes: dict[str, tuple[int, float]] = {}
  for path, pair in pairs.items():
    modules = places.modules(path, pair.a.shape[:-2])
    a, b = (_rows(x) for x in (pair.a, pair.b))
    for module, *own in zip(modules, a, b):
      name = _peft_names.name_of(module)
      sizes[name] = pair.rank, _alpha(adapted.spec, path, pair.rank)
      found = _peft_names.to_torch(module, *own)
      tensors[name + _A], tensors[name + _B] = found
  whole: dict[str, None] = {}
  for path, leaf in extra.items():
    for name, (module, value) in zip(
      places.tensor_names(path), places.tensors(path, leaf)
    ):
      tensors[name], whole[module] = value, None
  config = _peft_config.of(
    sizes,
    rslora=adapted.spec.rslora,
    dropout=adapted.spec.dropout,
    modules_to_save=whole,
    task_type=task_type,
  )
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  blob = safetensors.numpy.save(
    {_PREFIX + k: np.ascontiguousarray(v) for k, v in tensors.items()},
    metadata={"format": "pt"},
  )
  text = config.to_json(base_model)
  _files.write_all(
    {folder / _TENSORS: blob, folder / _peft_config.NAME: text.encode()}
  )


def load_spec(
  folder: str | os.PathLike[str],
  names: Names,
  *,
  prefix: str = "",
  auxiliary_rank: int = 8,
) -> LoraSpec:
  """The spec that a folder's adapters fit: its ranks, alphas and targets.

  Args:
    folder: that PEFT or `save` wrote.
    names: of the model's weights; see the module.
    prefix: as in `load`.
    auxiliary_rank: r2 of an auxiliary to train beside them.

  Raises:
    ValueError: as `load`; or if scanned layers differ in rank or alpha, or some
      of them have no adapter.
  """
  stored = _read(pathlib.Path(folder), names, prefix)
  default = {"rank": stored.config.rank, "alpha": stored.config.alpha}
  targets: dict[str, dict[str, Any]] = {}
  faults = []
  for path in stored.paths():
    modules = map(_peft_names.name_of, stored.places.names[path])
    sizes = {
      m: stored.config.sizes(m) if m in stored.pairs else None for m in modules
    }
    lacking = [m for m, own in sizes.items() if own is None]
    first = next(iter(sizes.values()))
    if first is None or len(set(sizes.values())) > 1:
      faults.append(
        f"the layers of {path} are scanned, and so adapted alike: "
        + (
          f"{', '.join(lacking)} would have no adapter"
          if lacking
          else f"got {sizes} of (rank, alpha)"
        )
      )
      continue
    own = dict(zip(default, first))
    targets[re.escape(path.rpartition("/")[0])] = {
      key: value for key, value in own.items() if value != default[key]
    }
  if faults:
    raise ValueError(
      f"the adapter in {folder} has no spec: {'; '.join(faults)}."
    )
  return LoraSpec(
    **default,
    auxiliary_rank=auxiliary_rank,
    targets=targets,
    extra="|".join(map(re.escape, sorted(stored.extra))) or None,
    rslora=stored.config.rslora,
    dropout=stored.config.dropout,
  )


def load(
  folder: str | os.PathLike[str],
  adapted: Adapted,
  names: Names,
  *,
  prefix: str = "",
) -> dict[str, Any]:
  """Reads a folder that PEFT or `save` wrote, as a primary to train further.

  Args:
    folder: with `adapter_config.json` and `adapter_model.safetensors`.
    adapted: the model, with the ranks, alphas and targets of the folder, as
      `load_spec` gives them.
    names: of all that is in the folder; see the module.
    prefix: what names begin with that the folder may lack, as `bert.` where
      the adapters were trained on a bare `BertModel`.

  Returns:
    A dict of `primary` and `extra`, of NumPy arrays in float32; no `extra` if
    the folder has no `modules_to_save`. `adapted.init` makes what is missing.

  Raises:
    ValueError: if a file is missing, damaged or a pickle; the configuration
      asks for what is not there, as DoRA; or tensors are missing, unknown or of
      another shape, rank or scale than the model's, each named.
  """
  folder = pathlib.Path(folder)
  _refuse_dora(adapted.spec)
  stored = _read(folder, names, prefix)
  faults = _differences(stored, adapted)
  if faults:
    raise ValueError(
      f"the adapter in {folder} does not fit the model and its spec: "
      f"{'; '.join(faults)}."
    )
  try:
    parts = {
      "primary": {
        "/".join(path): _pair(stored, "/".join(path), *shapes)
        for path, shapes in adapted.shapes("primary").items()
      },
      "extra": dict(stored.extra),
    }
    adapters = {
      part: traverse_util.unflatten_dict(tree, sep="/")
      for part, tree in parts.items()
      if tree
    }
    adapted.check(adapters, whole=False)
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from error
  return adapters


@dataclasses.dataclass(frozen=True)
class _Stored:
  """What is in a folder.

  Attributes:
    pairs: `a` (in, r) and `b` (r, out) of each module.
    extra: parameters that were trained whole, by path.
  """

  config: _peft_config.PeftConfig
  places: Places
  pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]
  extra: Mapping[str, np.ndarray]

  def paths(self) -> list[str]:
    """The weights of which a module has an adapter."""
    known = self.places.adaptable()
    return list(dict.fromkeys(known[module][0] for module in self.pairs))


def _read(folder: pathlib.Path, names: Names, prefix: str) -> _Stored:
  """Reads a folder, and checks it against its configuration and the names."""
  config = _peft_config.read(folder)
  tensors = _tensors(folder)
  bare = not any(name.startswith(prefix) for name in tensors)
  places = Places.of(names, prefix if bare else "")
  known = places.adaptable()
  faults = [
    f"{name} is of {tensor.dtype}, and weights are floats"
    for name, tensor in tensors.items()
    if not jnp.issubdtype(tensor.dtype, jnp.floating)
  ]
  faults += [
    f"the target {_files.shown(target)} is no module of this model"
    for target in config.unknown_targets(known)
  ]
  pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
  for module in _with_adapters(config, tensors, known):
    a, b = (tensors.pop(module + end, None) for end in (_A, _B))
    if a is None or b is None:
      ends = [end for end, x in ((_A, a), (_B, b)) if x is None]
      faults += [f"{module}{end} is missing" for end in ends]
      continue
    rank, _ = config.sizes(module)
    pair = _peft_names.from_torch(known[module][1], a, b)
    if pair is None or pair[0].shape[1] != rank:
      faults.append(
        f"{module} has lora_A of the shape {a.shape} and lora_B of {b.shape}, "
        f"which are not of the rank {rank} that {_peft_config.NAME} gives it"
      )
      continue
    pairs[module] = pair[0].astype(np.float32), pair[1].astype(np.float32)
  extra, wrong = _whole(config, places, tensors)
  faults += wrong
  faults += [f"{name} has no place in this model" for name in tensors]
  if not pairs and not faults:
    faults.append("no tensor is a lora_A or a lora_B")
  if faults:
    if len(faults) > 8:
      # The last are of another kind than the first.
      faults = [*faults[:6], f"... ({len(faults)} in all)", *faults[-2:]]
    raise ValueError(
      f"{folder} holds no adapter of this model: {'; '.join(faults)}."
    )
  return _Stored(config, places, pairs, extra)


def _tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a folder, without the prefix that all names have."""
  path = folder / _TENSORS
  if not path.is_file() and (folder / _PICKLE).is_file():
    raise ValueError(
      f"{folder} has its weights in {_PICKLE}, a pickle, which can run code "
      f"when it is read; save them as {_TENSORS} with PEFT first."
    )
  found, _ = _files.read_tensors(path)
  other = [name for name in found if not name.startswith(_PREFIX)]
  if other:
    raise ValueError(
      f"{path} is not PEFT's, whose names begin with {_PREFIX}; got "
      f"{', '.join(other)}."
    )
  _files.require_finite(path, found)
  return {name.removeprefix(_PREFIX): value for name, value in found.items()}


def _refuse_dora(spec: LoraSpec) -> None:
  if spec.dora:
    raise ValueError(
      "PEFT's folders are written and read here without DoRA's magnitudes; got "
      "a spec with dora=True. `merge` has them in the model's own weights."
    )


def _with_adapters(
  config: _peft_config.PeftConfig,
  tensors: Mapping[str, Any],
  known: Mapping[str, Any],
) -> dict[str, None]:
  """The modules that have an adapter, or should."""
  return dict.fromkeys(config.targeted(known)) | dict.fromkeys(
    name.removesuffix(end)
    for name in tensors
    for end in (_A, _B)
    if name.endswith(end) and name.removesuffix(end) in known
  )


def _whole(
  config: _peft_config.PeftConfig,
  places: Places,
  tensors: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Takes what was trained whole out of the tensors, and says what is wrong."""
  extra, faults = {}, []
  for path in places.names:
    names = places.tensor_names(path)
    saved = [n for n in names if config.is_saved(n.rpartition(".")[0])]
    there = [n for n in names if n in tensors]
    faults += [f"{n} is missing" for n in saved if n not in tensors]
    faults += [
      f"{n} is there and not among modules_to_save"
      for n in there
      if n not in saved
    ]
    if len(there) == len(names):
      try:
        extra[path] = places.parameter(path, tensors)
      except ValueError as error:
        faults.append(str(error))
    elif there and len(saved) < len(names):
      faults.append(
        f"{', '.join(n for n in names if n not in there)} are missing, and "
        f"scanned with {there[0]}"
      )
    for name in there:
      del tensors[name]
  return extra, faults


def _differences(stored: _Stored, adapted: Adapted) -> list[str]:
  """How a folder's adapters are other than a spec's, a phrase for each."""
  wanted = {"/".join(p): x for p, x in adapted.shapes("primary").items()}
  stored.places.require(wanted)
  faults = []
  there = set(stored.pairs)
  for path, (a_shape, _, scale) in wanted.items():
    for module in _names(stored, path, a_shape):
      if module not in stored.pairs:
        faults.append(f"{module} has no adapter, and {path} is a target")
        continue
      there.discard(module)
      rank = stored.pairs[module][0].shape[-1]
      own = stored.config.scale(module)
      if (rank, own) != (a_shape[-1], scale):
        faults.append(
          f"{module} has rank {rank} and scale {own:g}, and {path} rank "
          f"{a_shape[-1]} and scale {scale:g}"
        )
  faults += [f"{m} has an adapter, and is no target" for m in sorted(there)]
  return faults


def _pair(
  stored: _Stored,
  path: str,
  a_shape: tuple[int, ...],
  b_shape: tuple[int, ...],
  scale: float,
) -> Factors:
  modules = _names(stored, path, a_shape)
  a, b = (np.stack([stored.pairs[m][i] for m in modules]) for i in range(2))
  # The inner sizes are as they came: they may be wrong.
  return Factors(
    a.reshape(*a_shape[:-2], *a.shape[1:]),
    b.reshape(*b_shape[:-2], *b.shape[1:]),
    scale,
  )


def _names(stored: _Stored, path: str, a_shape: tuple[int, ...]) -> list[str]:
  modules = stored.places.modules(path, a_shape[:-2])
  return [_peft_names.name_of(module) for module in modules]


def _alpha(spec: LoraSpec, path: str, rank: int) -> float:
  """The alpha that gives a module its scale at a rank, its own or a joined."""
  sizes = spec.sizes(path.rpartition("/")[0])
  assert sizes is not None  # it has a pair
  own, alpha, _ = sizes
  if rank == own:
    return alpha
  return alpha * (math.sqrt(rank / own) if spec.rslora else rank / own)


def _rows(x: Any) -> np.ndarray:
  """Matrices (rows, ., .), of all leading axes."""
  x = np.asarray(x, np.float32)
  return x.reshape(-1, *x.shape[-2:])


def _flatten(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(
    tree, sep="/", is_leaf=lambda _, x: is_factors(x)
  )
