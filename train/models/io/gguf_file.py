"""Reads Llama and Qwen2 models from a GGUF file.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import collections.abc
import dataclasses
import functools
import pathlib
import re
from typing import Any

import gguf
from gguf import quants
import numpy as np

from ... import checked
from . import weights

# GGUF's module -> Hugging Face's, outside the layers and within one.
_MODULES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
}
_LAYER_MODULES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")

# Key of Hugging Face's config.json -> GGUF's, after the architecture's name.
_SIZES = {
  "hidden_size": "embedding_length",
  "num_hidden_layers": "block_count",
  "num_attention_heads": "attention.head_count",
  "intermediate_size": "feed_forward_length",
  "max_position_embeddings": "context_length",
}
_EPSILON = "attention.layer_norm_rms_epsilon"
_BASE = "rope.freq_base"
_ALWAYS = ("token_embd.weight", "output_norm.weight")
# Keys that can change the computation -> the value that does not change it.
_NEUTRAL = {
  "attention.causal": True,
  "attention.sliding_window": 0,
  "rope.scale_linear": 1.0,
  "rope.scaling.type": "none",
}
# The divisors of the rotary frequencies, one for each pair of numbers; Llama
# 3.1 and later.
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_SCALING = {
  "rope_type": "llama3",
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
# How many elements are dequantised at once.
_AT_ONCE = 2**20


class Tensor:
  """One weight of a GGUF file, which is dequantised when it is indexed.

  Attributes:
    shape: the shape in PyTorch; a linear weight is (out, in).
    dtype: float32, for every type in the file.
  """

  def __init__(
    self, stored: gguf.ReaderTensor, order: np.ndarray | None = None
  ):
    """Makes a weight.

    Args:
      stored: the tensor as `gguf` reads it, in mapped memory.
      order: for each row, the number of its stored row, int (rows,); None: the
        stored order.
    """
    self.shape = tuple(int(size) for size in reversed(stored.shape))
    self.dtype = np.dtype(np.float32)
    self._type = stored.tensor_type
    self._data = np.asarray(stored.data)
    self._order = order

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a part of the weight from the file, float32.

    For a matrix, this reads only the rows in the index, and only the blocks
    with the columns in the index.

    Args:
      index: slices of step 1, one for each axis; missing axes are whole.

    Raises:
      IndexError: there are more slices than axes, or a step is not 1.
    """
    if len(index) > len(self.shape):
      raise IndexError(
        f"A tensor of shape {self.shape} takes {len(self.shape)} slices, got "
        f"{len(index)}."
      )
    if any(part.step not in (None, 1) for part in index):
      raise IndexError(f"The slices must have step 1, got {index}.")
    index = (*index, slice(None), slice(None))  # the missing axes
    order = self._order
    rows = (np.arange(self.shape[0]) if order is None else order)[index[0]]
    if len(self.shape) == 1:
      return quants.dequantize(self._data, self._type)[rows]
    return self._read(rows, index[1])

  def _read(self, rows: np.ndarray, columns: slice) -> np.ndarray:
    start, stop, _ = columns.indices(self.shape[1])
    out = np.empty((len(rows), max(stop - start, 0)), np.float32)
    if not out.size:
      return out
    length, size = gguf.GGML_QUANT_SIZES[self._type]
    items = size // self._data.itemsize
    first, last = start // length, -(-stop // length)
    blocks = self._data[:, first * items : last * items]
    skipped = start - first * length
    # `gguf` needs twice the memory of its result, so the parts are small.
    step = max(1, _AT_ONCE // (length * (last - first)))
    for i in range(0, len(rows), step):
      part = quants.dequantize(blocks[rows[i : i + step]], self._type)
      out[i : i + step] = part[:, skipped : skipped + out.shape[1]]
    return out


@dataclasses.dataclass(frozen=True)
class GgufModel:
  """The content of a GGUF file.

  Attributes:
    path: the file.
    config: the configuration in the form of Hugging Face's config.json.
    tensors: the weights by Hugging Face's names, with its order of rows in q
      and k. All are float32, and are read when they are indexed.
    metadata: every key and value of the file.
    bos_id: the id of the token that begins a text, if the file has one.
    eos_id: the id of the token that ends a text or a turn, if the file has one.
    pad_id: the id of the padding token, if the file has one.
    chat_template: the Jinja template of a conversation, if the file has one.
  """

  path: pathlib.Path
  config: dict[str, Any]
  tensors: collections.abc.Mapping[str, Tensor]
  metadata: collections.abc.Mapping[str, Any]
  bos_id: int | None
  eos_id: int | None
  pad_id: int | None
  chat_template: str | None


def open_gguf(path: str | pathlib.Path) -> GgufModel:
  """Opens a GGUF file; the weights stay on disk until they are indexed.

  Weights may have any type that `gguf` can dequantise. For the architecture
  'llama', llama.cpp stores the rows of q and k in another order, in which
  rotary pairs are neighbours. Here, these rows have Hugging Face's order, in
  which the rows of a pair are half a head apart.

  Args:
    path: the whole file; one part of a split model is refused.

  Raises:
    WeightsError: the file is not GGUF, or is cut short; its architecture is not
      llama or qwen2, or has a feature that these decoders do not implement;
      metadata are missing; a tensor has no place in the model, or has a type
      that cannot be dequantised.
  """
  path = pathlib.Path(path)
  metadata, stored = _read(path)
  try:
    config = _config(metadata, stored)
    tensors = _tensors(config, stored)
  except weights.WeightsError as error:
    raise weights.WeightsError(f"{path}: {error}") from None
  return GgufModel(
    path=path,
    config=config,
    tensors=tensors,
    metadata=metadata,
    bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
    eos_id=metadata.get("tokenizer.ggml.eos_token_id"),
    pad_id=metadata.get("tokenizer.ggml.padding_token_id"),
    chat_template=metadata.get("tokenizer.chat_template"),
  )


class _Reader(gguf.GGUFReader):
  """A reader that stops at the end of the file.

  If the count of an array is damaged, `gguf` itself continues after the end of
  the file, and stores an empty item each time.
  """

  def _get(self, offset, dtype, count=1, override_order=None):
    size = np.dtype(dtype).itemsize * int(count)
    if int(offset) + size > len(self.data):
      raise ValueError(f"it has no {size} bytes at {offset}")
    # Slices of a memmap are slow Python code, called three times for each word.
    self.data: Any = np.asarray(self.data)
    return super()._get(offset, dtype, count, override_order)


def _read(
  path: pathlib.Path,
) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
  """Returns the file's own metadata by key, and its tensors by name."""
  with checked.open_file(path) as file:
    magic = file.read(4)
  if magic != b"GGUF":
    raise weights.WeightsError(
      f"{path} is not a GGUF file: it must begin with b'GGUF', got {magic!r}."
    )
  with weights.told_of(
    f"{path} is not a whole GGUF file; it may have been cut short at its "
    f"{path.stat().st_size} bytes, or be of another version"
  ):
    reader = _Reader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
  if reader.byte_order == "S":
    raise weights.WeightsError(
      f"{path} was written for machines of the other byte order; convert it "
      "with gguf-convert-endian first."
    )
  refused = [
    f"{tensor.name} ({tensor.tensor_type.name})"
    for tensor in reader.tensors
    if not _can_dequantise(tensor.tensor_type)
  ]
  if refused:
    raise weights.WeightsError(
      f"{path} has tensors of types that `gguf` cannot dequantise: "
      f"{', '.join(refused)}."
    )
  # The reader is not returned, because it keeps an array for every token.
  return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _config(
  metadata: collections.abc.Mapping[str, Any],
  stored: collections.abc.Mapping[str, gguf.ReaderTensor],
) -> dict[str, Any]:
  """Returns the configuration in the form of Hugging Face's config.json."""
  architecture = metadata.get("general.architecture")
  if architecture not in ("llama", "qwen2"):
    raise weights.WeightsError(
      f"general.architecture must be 'llama' or 'qwen2', got {architecture!r}."
    )
  if metadata.get("split.count", 1) not in (0, 1):
    raise weights.WeightsError(
      f"it is one of {metadata['split.count']} parts of a model; join them "
      "with llama-gguf-split --merge first."
    )
  prefix = f"{architecture}."
  own = {
    key.removeprefix(prefix): value
    for key, value in metadata.items()
    if key.startswith(prefix)
  }
  missing = [
    prefix + key for key in (*_SIZES.values(), _EPSILON) if key not in own
  ]
  missing += [name for name in _ALWAYS if name not in stored]
  if missing:
    raise weights.WeightsError(f"it lacks {', '.join(missing)}.")
  sizes = _sizes(own)
  head_dim = sizes["head_dim"]
  for key, neutral in (
    *_NEUTRAL.items(),
    ("attention.value_length", head_dim),
    ("rope.dimension_count", head_dim),
  ):
    if own.get(key, neutral) != neutral:
      raise weights.WeightsError(
        f"{prefix}{key} must be {neutral!r} or absent, all that is "
        f"implemented for this model, got {own[key]!r}."
      )
  config = {
    "model_type": architecture,
    **sizes,
    "vocab_size": int(stored["token_embd.weight"].shape[-1]),
    "hidden_act": "silu",
    "rms_norm_eps": _decimal(_EPSILON, own[_EPSILON]),
    "rope_theta": _decimal(_BASE, own.get(_BASE, 10000.0)),
    "rope_scaling": None,
    "tie_word_embeddings": "output.weight" not in stored,
  }
  if architecture == "llama":
    config["attention_bias"] = "blk.0.attn_q.bias" in stored
    if _ROPE_FACTORS in stored:
      config["rope_scaling"] = _rope_scaling(config, stored[_ROPE_FACTORS])
  return config


def _sizes(own: collections.abc.Mapping[str, Any]) -> dict[str, int]:
  """Returns sizes by config.json's keys, from the architecture's own keys."""
  sizes = {ours: own[key] for ours, key in _SIZES.items()}
  sizes["num_key_value_heads"] = own.get(
    "attention.head_count_kv", sizes["num_attention_heads"]
  )
  if "attention.key_length" in own:
    sizes["head_dim"] = own["attention.key_length"]
  for key, value in sizes.items():
    if not isinstance(value, int) or value < 1:
      raise weights.WeightsError(
        f"{key} must be a positive integer, got {value!r}."
      )
  head_dim = sizes.setdefault(
    "head_dim", sizes["hidden_size"] // sizes["num_attention_heads"]
  )
  if head_dim < 2 or head_dim % 2:
    raise weights.WeightsError(
      f"the width of a head must be even, got {head_dim}."
    )
  return sizes


def _decimal(key: str, value: Any) -> float:
  """Returns a float32's shortest decimal: 1e-05, and not 9.9999997e-06."""
  if not isinstance(value, int | float):
    raise weights.WeightsError(f"{key} must be a number, got {value!r}.")
  return float(str(np.float32(value)))


def _rope_scaling(
  config: collections.abc.Mapping[str, Any], stored: gguf.ReaderTensor
) -> dict[str, Any] | None:
  """Returns the Llama 3 scaling that has these factors; None if all are 1."""
  factors = Tensor(stored)[()]
  if (factors == 1.0).all():
    return None
  factor = float(factors.max())
  scaling = {**_LLAMA3_SCALING, "factor": factor}
  pairs = np.arange(0, 2 * factors.size, 2)
  turns = (
    scaling["original_max_position_embeddings"]
    * config["rope_theta"] ** (-pairs / config["head_dim"])
    / (2 * np.pi)
  )
  low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
  smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
  expected = 1.0 / ((1.0 - smooth) / factor + smooth)
  # The tolerance is for the file's factors, which are float32.
  if 2 * factors.size != config["head_dim"] or not np.allclose(
    factors, expected, rtol=1e-4
  ):
    raise weights.WeightsError(
      f"the factors in {_ROPE_FACTORS} are not those of Llama 3's scaling with "
      f"{scaling}; no other is implemented."
    )
  return scaling


def _tensors(
  config: collections.abc.Mapping[str, Any],
  stored: collections.abc.Mapping[str, gguf.ReaderTensor],
) -> dict[str, Tensor]:
  """Returns the weights by Hugging Face's names."""
  faults: list[str] = []
  tensors: dict[str, Tensor] = {}
  for source, tensor in stored.items():
    if source == _ROPE_FACTORS and config["model_type"] == "llama":
      continue
    name = _hf_name(source)
    if name is None:
      faults.append(f"{source} has no place in it")
      continue
    heads = _rotated_heads(config, name)
    rows, expected = int(tensor.shape[-1]), heads * config["head_dim"]
    if heads and rows != expected:
      faults.append(f"{source} has {rows} rows, expected {expected}")
      continue
    tensors[name] = Tensor(tensor, order(rows, heads) if heads else None)
  if faults:
    raise weights.WeightsError(
      f"the tensors do not fit a model of the architecture "
      f"{config['model_type']!r}: {weights.listed(faults)}."
    )
  return tensors


def _hf_name(name: str) -> str | None:
  """Returns Hugging Face's name of a GGUF tensor, or None."""
  match = _NAME.fullmatch(name)
  if match is None:
    return None
  layer, module, kind = match.groups()
  if layer is None:
    place = _MODULES.get(module)
  elif module in _LAYER_MODULES:
    place = f"model.layers.{int(layer)}.{_LAYER_MODULES[module]}"
  else:
    place = None
  return place and f"{place}.{kind}"


def name_of(module: str) -> str | None:
  """Returns GGUF's name of a Hugging Face module, or None."""
  for ours, theirs in _MODULES.items():
    if module == theirs:
      return ours
  match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
  for ours, theirs in _LAYER_MODULES.items():
    if match and match[2] == theirs:
      return f"blk.{match[1]}.{ours}"
  return None


def _rotated_heads(config: collections.abc.Mapping[str, Any], name: str) -> int:
  """Returns the heads of a tensor with rows in llama.cpp's order, else 0."""
  if config["model_type"] == "llama" and ".q_proj." in name:
    return config["num_attention_heads"]
  if config["model_type"] == "llama" and ".k_proj." in name:
    return config["num_key_value_heads"]
  return 0


def order(rows: int, heads: int) -> np.ndarray:
  """Returns the stored row of each row of a llama's q or k, int (rows,).

  The rotation turns rows i and i + K/2 of a head of width K together. llama.cpp
  stores this pair as the rows 2i and 2i + 1.
  """
  return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).ravel()


@functools.cache
def _can_dequantise(kind: gguf.GGMLQuantizationType) -> bool:
  block = np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8)
  try:
    quants.dequantize(block, kind)
  except NotImplementedError:
    return False
  return True
