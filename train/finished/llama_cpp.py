"""Writes a run's adapters for llama.cpp: `export --gguf`."""

from collections.abc import Mapping
import pathlib
from typing import Any

from flax import traverse_util
import numpy as np

import bilora_jax

from ..errors import UsageError
from ..models.io import gguf_adapter
from .finished import Finished


def check(run: Finished, whole: bool) -> None:
  """Refuses a run whose adapters cannot be written for llama.cpp.

  Args:
    run: the exported run.
    whole: whether the run is exported as a whole model.

  Raises:
    UsageError: if the run is refused; the message says why.
  """
  if whole or run.adapted is None:
    raise UsageError(
      "--gguf is only for adapters, and this export is a whole model; "
      "llama.cpp's convert_hf_to_gguf.py makes a GGUF file of it."
    )
  try:
    gguf_adapter.check(_model_type(run))
  except ValueError as error:
    raise UsageError(f"--gguf: {error}") from error
  if run.adapters.get("extra"):
    paths = traverse_util.flatten_dict(run.adapters["extra"], sep="/")
    raise UsageError(
      "--gguf is only for low-rank adapters, and the run has also trained "
      f"{', '.join(sorted(paths)[:8])}; export the run with --merged."
    )


def write(path: pathlib.Path, run: Finished) -> None:
  """Writes the same adapters as `export` writes for PEFT.

  Raises:
    OSError: if the file cannot be written.
  """
  assert run.adapted is not None
  config: Any = run.model.config
  heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
  names = run.pretrained.kind(run.model).names
  pairs = modules(run.adapters, names)
  alpha = run.adapted.spec.alpha
  gguf_adapter.write(path, _model_type(run), heads, pairs, alpha)


def modules(
  adapters: Mapping[str, Any], names: Mapping[str, Any]
) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
  """Returns `lora_A`, `lora_B` and the scale of each module.

  If there are two adapters, their factors are joined.
  """
  flat = [_flatten(adapters.get(x, {})) for x in ("primary", "auxiliary")]
  found = {}
  for path, pair in flat[0].items():
    if path in flat[1]:
      pair = pair.join(flat[1][path])
    several = not isinstance(names[path], str)
    a, b = (np.asarray(x, np.float32) for x in (pair.a, pair.b))
    for i, module in enumerate(names[path] if several else (names[path],)):
      own = (a[i], b[i]) if several else (a, b)
      found[module] = own[0].T, own[1].T, pair.scale
  return found


def _model_type(run: Finished) -> str:
  return getattr(run.model.config, "model_type", run.pretrained.family.name)


def _flatten(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(
    tree, sep="/", is_leaf=lambda _, x: isinstance(x, bilora_jax.Factors)
  )
