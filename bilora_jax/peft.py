"""Hugging Face PEFT's LoRA folders: saves a primary, and loads a primary.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. PEFT's
`lora_A` is (r, in) and its `lora_B` (out, r), the transposes of `Factors`.

The argument `names` maps paths of parameters to Hugging Face's modules, as
`encoder/layer_0/query/kernel` to `bert.encoder.layer.0.attention.self.query`. A
parameter with leading axes of scanned layers or experts maps to a sequence of
modules, row by row. `names` also needs parameters that are trained whole, such
as `head/kernel` and `head/bias`; it may include weights without adapters.
Kernels of several axes, as in `nn.DenseGeneral`, are reshaped to the
two-dimensional weights of `nn.Linear`; a convolution in PyTorch is named as a
`Convolution`.
"""

from collections.abc import Mapping, Sequence
import math
import os
import pathlib
import re
from typing import Any
import warnings

from flax import traverse_util
import numpy as np
import safetensors.numpy

from bilora_jax import (
  _dora,
  _files,
  _peft_base,
  _peft_config,
  _peft_folder,
  _peft_names,
  _peft_tensors,
)
from bilora_jax._adapt import Adapted
from bilora_jax._factors import Factors, is_factors
from bilora_jax._peft_names import Convolution as Convolution
from bilora_jax._peft_names import Names as Names
from bilora_jax._peft_names import Places
from bilora_jax._peft_names import Tied as Tied
from bilora_jax._peft_names import Wider as Wider
from bilora_jax._spec import LoraSpec


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
  """Writes the primary and `extra` in PEFT's format.

  With this folder, PEFT computes the same as
  `adapted.apply(variables, primary(adapters), ...)`. Ranks and alphas that
  differ by module become `rank_pattern` and `alpha_pattern`. Of `extra`, DoRA's
  magnitudes become `lora_magnitude_vector`, biases without their weights become
  PEFT's `bias`, and all other parameters become `modules_to_save`. A reader
  never sees a part of a file; the configuration is written last.

  Args:
    folder: where to write, created if it is missing; files of the same names
      are replaced.
    adapted: the model of the adapters.
    adapters: from `adapted.init`, with or without the auxiliary.
    names: names of all trained parameters; see the module's docstring.
    base_model: the name or folder of the base, for readers of the folder.
    task_type: such as 'CAUSAL_LM'; None lets PEFT's readers choose the model.
    auxiliary: whether to write the auxiliary too, joined with the primary along
      the rank. The auxiliary is not part of the trained model, so by default it
      is not written.

  Raises:
    ValueError: if the adapters do not fit this model and spec, a name is
      missing or does not fit (the message lists each), or there is no auxiliary
      to write.
    OSError: if a file cannot be written.
  """
  adapted.check(adapters)
  if auxiliary and "auxiliary" not in adapters:
    raise ValueError(
      "auxiliary=True writes the auxiliary too, but the adapters have none."
    )
  pairs = _flatten(adapters["primary"])
  magnitudes, extra = _split(_flatten(adapters.get("extra", {})), pairs)
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
    for module, *factors in zip(modules, a, b):
      name = _peft_names.name_of(module)
      sizes[name] = pair.rank, _alpha(adapted.spec, path, pair.rank)
      both = _peft_names.to_torch(module, *factors)
      tensors[name + _peft_folder.A], tensors[name + _peft_folder.B] = both
    if path in magnitudes:
      magnitude = np.asarray(magnitudes[path], np.float32)
      for module, one in zip(modules, magnitude.reshape(len(modules), -1)):
        tensors[_peft_names.name_of(module) + _peft_folder.MAGNITUDE] = (
          _peft_names.magnitude_to_torch(module, one)
        )
  whole = _write_extra(places, extra, sizes, tensors)
  config = _peft_config.of(
    sizes,
    rslora=adapted.spec.rslora,
    dora=adapted.spec.dora,
    dropout=adapted.spec.dropout,
    task_type=task_type,
    **whole,
  )
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  blob = safetensors.numpy.save(
    {
      _peft_tensors.PREFIX + k: np.ascontiguousarray(v)
      for k, v in tensors.items()
    },
    metadata={"format": "pt"},
  )
  text = config.to_json(base_model)
  _files.write_all(
    {
      folder / _peft_tensors.FILE: blob,
      folder / _peft_config.NAME: text.encode(),
    }
  )


def load_spec(
  folder: str | os.PathLike[str],
  names: Names,
  *,
  prefix: str = "",
  left_out: Sequence[str] = (),
  auxiliary_rank: int = 8,
) -> LoraSpec:
  """Reads the spec of a folder's adapters: ranks, alphas and targets.

  Args:
    folder: a folder that PEFT or `save` wrote.
    names: names of the model's weights; see the module's docstring.
    prefix: as in `load`.
    left_out: as in `load`.
    auxiliary_rank: r2, rank of an auxiliary to train with these adapters.

  Returns:
    A spec for `adapt`.

  Raises:
    ValueError: as `load`; or if scanned layers differ in rank or alpha, or some
      of them have no adapter.
  """
  stored = _peft_folder.read(pathlib.Path(folder), names, prefix, left_out)
  default = {"rank": stored.config.rank, "alpha": stored.config.alpha}
  targets: dict[str, dict[str, Any]] = {}
  faults = []
  for path in stored.paths():
    modules = map(_peft_names.name_of, stored.places.names[path])
    sizes = {
      m: stored.config.sizes(m) if m in stored.pairs else None for m in modules
    }
    lacking = [m for m, size in sizes.items() if size is None]
    first = next(iter(sizes.values()))
    if first is None or len(set(sizes.values())) > 1:
      faults.append(
        f"the layers of {path} are scanned, so they must be adapted alike: "
        + (
          f"{', '.join(lacking)} would have no adapter"
          if lacking
          else f"got {sizes} of (rank, alpha)"
        )
      )
      continue
    values = dict(zip(default, first))
    targets[re.escape(path.rpartition("/")[0])] = {
      key: value for key, value in values.items() if value != default[key]
    }
  if faults:
    raise ValueError(
      f"the adapter in {folder} has no spec: {'; '.join(faults)}."
    )
  return LoraSpec(
    **default,
    auxiliary_rank=auxiliary_rank,
    targets=targets,
    extra="|".join(map(re.escape, stored.extra())) or None,
    rslora=stored.config.rslora,
    dora=stored.config.dora,
    dropout=stored.config.dropout,
  )


def load(
  folder: str | os.PathLike[str],
  adapted: Adapted,
  names: Names,
  *,
  prefix: str = "",
  base: Mapping[str, Any] | None = None,
  left_out: Sequence[str] = (),
) -> dict[str, Any]:
  """Reads a folder that PEFT or `save` wrote, as a primary to train further.

  PEFT can train an embedding by factors or by the rows of some tokens, and can
  add `lora_bias`. These changes are added to the base's parameters, which are
  returned in `extra`, as parameters that are trained whole.

  Args:
    folder: a folder with `adapter_config.json` and `adapter_model.safetensors`.
    adapted: the model, with the ranks, alphas and targets of the folder, as
      `load_spec` returns them.
    names: names of all parameters in the folder; see the module's docstring.
    prefix: beginning of `names` that the folder's names may lack, as `bert.` if
      the adapters were trained on a bare `BertModel`.
    base: the base's tensors by Hugging Face's names, with or without the
      prefix, as `safetensors.numpy.load_file` reads them. It is needed if the
      folder changes tensors of the base, or holds copies of them, as PEFT
      writes of embeddings and heads; the copies must be equal to the base.
    left_out: names, or ends of names, of modules whose tensors in the folder
      are ignored with a warning: modules that this model lacks without a change
      of its output, as the `pooler.dense` of a BERT, or that it should not
      take from the folder.

  Returns:
    A dict of `primary` and `extra`, of NumPy arrays in float32. `extra` holds
    only the folder's parameters; `adapted.init` makes the others.

  Raises:
    ValueError: if a file is missing, damaged or a pickle; the configuration has
      unsupported values; or tensors are missing, unknown, different from the
      base's, or of another shape, rank or scale than the model's. The message
      lists each of them.
  """
  folder = pathlib.Path(folder)
  stored = _peft_folder.read(folder, names, prefix, left_out)
  extra, faults = _peft_base.extra(stored, base, prefix)
  faults += _differences(stored, adapted)
  _peft_folder.refuse(
    faults, f"the adapter in {folder} does not fit the model and its spec"
  )
  if stored.left_out:
    warnings.warn(
      f"{folder} also has {', '.join(stored.left_out)}, which this model does "
      "not use; these tensors are ignored.",
      stacklevel=2,
    )
  try:
    parts = {
      "primary": {
        "/".join(path): _pair(stored, "/".join(path), *shapes)
        for path, shapes in adapted.shapes("primary").items()
      },
      "extra": extra | _magnitudes(stored, adapted),
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


def _differences(stored: _peft_folder.Stored, adapted: Adapted) -> list[str]:
  """The differences of a folder's adapters from a spec, a phrase for each."""
  wanted = {"/".join(p): x for p, x in adapted.shapes("primary").items()}
  stored.places.require(wanted)
  faults = []
  if adapted.spec.dora != stored.config.dora:
    faults.append(
      f"the folder has use_dora={stored.config.dora} and the spec "
      f"dora={adapted.spec.dora}"
    )
  there = set(stored.pairs)
  for path, (a_shape, _, scale) in wanted.items():
    for module in _names(stored, path, a_shape):
      if module not in stored.pairs:
        faults.append(f"{module} has no adapter, but {path} is a target")
        continue
      there.discard(module)
      rank = stored.pairs[module][0].shape[-1]
      stored_scale = stored.config.scale(module)
      if (rank, stored_scale) != (a_shape[-1], scale):
        faults.append(
          f"{module} has rank {rank} and scale {stored_scale:g}, but {path} "
          f"has rank {a_shape[-1]} and scale {scale:g}"
        )
  faults += [f"{m} has an adapter, but is no target" for m in sorted(there)]
  whole = {"/".join(p): shape for p, shape in adapted.shapes("extra").items()}
  faults += [
    _peft_base.misfit(path, value.shape, whole[path])
    for path, value in stored.whole.items()
    # The rows of other weights are no tokens; `check` looks at their shapes.
    if path.endswith("/embedding")
    and value.shape != whole.get(path, value.shape)
  ]
  return faults


def _pair(
  stored: _peft_folder.Stored,
  path: str,
  a_shape: tuple[int, ...],
  b_shape: tuple[int, ...],
  scale: float,
) -> Factors:
  modules = _names(stored, path, a_shape)
  a, b = (np.stack([stored.pairs[m][i] for m in modules]) for i in range(2))
  # The inner sizes come from the folder: they may be wrong.
  return Factors(
    a.reshape(*a_shape[:-2], *a.shape[1:]),
    b.reshape(*b_shape[:-2], *b.shape[1:]),
    scale,
  )


def _magnitudes(
  stored: _peft_folder.Stored, adapted: Adapted
) -> dict[str, np.ndarray]:
  """DoRA's magnitudes, by their paths in `extra`."""
  if not stored.config.dora:
    return {}
  by_path = {}
  for path, (a_shape, *_) in adapted.shapes("primary").items():
    modules = _names(stored, "/".join(path), a_shape)
    stacked = np.stack([stored.magnitudes[module] for module in modules])
    by_path["/".join(_dora.path_of(path))] = stacked.reshape(*a_shape[:-2], -1)
  return by_path


def _split(
  extra: dict[str, Any], pairs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """DoRA's magnitudes by their kernels' paths, and the rest of `extra`."""
  parts = _dora.split(
    {tuple(path.split("/")): x for path, x in extra.items()},
    [tuple(path.split("/")) for path in pairs],
  )
  magnitudes, others = (
    {"/".join(path): x for path, x in part.items()} for part in parts
  )
  return magnitudes, others


def _write_extra(
  places: Places,
  extra: Mapping[str, Any],
  adapted: Mapping[str, Any],
  tensors: dict[str, Any],
) -> dict[str, Any]:
  """Adds parameters that are trained whole to the tensors.

  Returns:
    The fields of the configuration that describe these parameters.
  """
  values = {
    name: (module, value)
    for path, leaf in extra.items()
    for name, (module, value) in zip(
      places.tensor_names(path), places.tensors(path, leaf)
    )
  }
  weights = {m for name, (m, _) in values.items() if name.endswith(".weight")}
  saved: dict[str, None] = {}
  tied, bias = False, "none"
  for name, (module, value) in values.items():
    if module in weights:
      saved[module] = None
    elif module in adapted:
      # PEFT wraps an adapted module.
      name = f"{module}{_peft_tensors.BASE}bias"
      bias = "lora_only" if bias == "none" else bias
    else:
      bias = "all"
    tensors[name] = value
  for other, table in places.ties().items():
    if table in saved:
      saved[other], tied = None, True
      tensors[f"{other}.weight"] = tensors[f"{table}.weight"]
  return {"modules_to_save": saved, "tied": tied, "bias": bias}


def _names(
  stored: _peft_folder.Stored, path: str, a_shape: tuple[int, ...]
) -> list[str]:
  modules = stored.places.modules(path, a_shape[:-2])
  return [_peft_names.name_of(module) for module in modules]


def _alpha(spec: LoraSpec, path: str, rank: int) -> float:
  """The alpha that keeps a module's scale at its own rank or a joined rank."""
  sizes = spec.sizes(path.rpartition("/")[0])
  assert sizes is not None  # it has a pair
  own_rank, alpha, _ = sizes
  if rank == own_rank:
    return alpha
  return alpha * (
    math.sqrt(rank / own_rank) if spec.rslora else rank / own_rank
  )


def _rows(x: Any) -> np.ndarray:
  """Flattens all leading axes: matrices (rows, ., .)."""
  x = np.asarray(x, np.float32)
  return x.reshape(-1, *x.shape[-2:])


def _flatten(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(
    tree, sep="/", is_leaf=lambda _, x: is_factors(x)
  )
