"""A LoRA as a GGUF file, which llama.cpp takes beside a model in GGUF.

The format: `convert_lora_to_gguf.py` of https://github.com/ggml-org/llama.cpp.
"""

from collections.abc import Mapping
import pathlib

import gguf
import numpy as np

from . import gguf_file

# Of config.json's model_type, the architecture in llama.cpp, and whether it
# has the rows of q and k in its own order.
_ARCHITECTURES = {
  "llama": ("llama", True),
  "mistral": ("llama", True),
  "qwen2": ("qwen2", False),
  "qwen3": ("qwen3", False),
}


def check(model_type: str) -> None:
  """Refuses what no such file is written for.

  Raises:
    ValueError: that names the models for which one is.
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

  llama.cpp multiplies each product by `alpha` over its rank, so that what is
  left of a pair's own scale goes into its second factor.

  Args:
    path: of the file.
    model_type: of config.json.
    heads: how many `q_proj` and `k_proj` have.
    pairs: of each module by Hugging Face's name, `lora_A` (r, in), `lora_B`
      (out, r) and the scale.
    alpha: of the file.

  Raises:
    ValueError: if the model is of another type, or a module has no place.
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
