"""Writes a LoRA as a GGUF file, which llama.cpp loads with a GGUF model.

The format: `convert_lora_to_gguf.py` of https://github.com/ggml-org/llama.cpp.
"""

from collections.abc import Mapping
import pathlib

import gguf
import numpy as np

from . import gguf_file

# From config.json's model_type to llama.cpp's architecture, and whether
# llama.cpp stores the rows of q and k in its own order.
_ARCHITECTURES = {
  "llama": ("llama", True),
  "mistral": ("llama", True),
  "qwen2": ("qwen2", False),
  "qwen3": ("qwen3", False),
}


def check(model_type: str) -> None:
  """Refuses a model type that has no GGUF adapters.

  Raises:
    ValueError: if it has none; the message names those that have.
  """
  if model_type not in _ARCHITECTURES:
    raise ValueError(
      f"GGUF adapters are written for the model types "
      f"{', '.join(_ARCHITECTURES)}; got {model_type}."
    )


def write(
  path: pathlib.Path,
  model_type: str,
  heads: Mapping[str, int],
  pairs: Mapping[str, tuple[np.ndarray, np.ndarray, float]],
  alpha: float,
) -> None:
  """Writes the file.

  llama.cpp multiplies each product by `alpha` over its rank. So the second
  factor of a pair is multiplied by the rest of the pair's own scale.

  Args:
    path: the file.
    model_type: the `model_type` of config.json.
    heads: the number of heads of `q_proj` and of `k_proj`.
    pairs: from each module, by Hugging Face's name, to `lora_A` (r, in),
      `lora_B` (out, r) and the scale.
    alpha: the `alpha` of the file.

  Raises:
    ValueError: if the model type is unknown, or GGUF has no name for a module.
    OSError: if the file cannot be written.
  """
  check(model_type)
  architecture, rotated = _ARCHITECTURES[model_type]
  names = {module: gguf_file.name_of(module) for module in pairs}
  lost = [module for module, name in names.items() if name is None]
  if lost:
    raise ValueError(
      f"llama.cpp has no weight for the adapters of {', '.join(lost)}."
    )
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_type(gguf.GGUFType.ADAPTER)
  writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
  writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
  for module, (a, b, scale) in pairs.items():
    b = b * np.float32(scale * len(a) / alpha)
    kind = module.rpartition(".")[2]
    if rotated and kind in heads:
      stored = np.empty_like(b)
      stored[gguf_file.order(len(b), heads[kind])] = b
      b = stored
    for end, x in (("lora_a", a), ("lora_b", b)):
      array = np.ascontiguousarray(x, np.float32)
      writer.add_tensor(f"{names[module]}.weight.{end}", array)
  try:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
  finally:
    writer.close()
