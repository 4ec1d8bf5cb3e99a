"""Hugging Face's Llama and Qwen 2 tensors as the parameters of `Decoder`."""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any, Protocol

from flax import traverse_util
import jax
from jax import typing
import jax.numpy as jnp
import numpy as np

from train.models import tensors as tensors_
from train.models import weights
from train.models.decoder_config import DecoderConfig

Path = tuple[str, ...]
Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]

# A buffer, not a weight; old checkpoints saved it.
_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class Place(Protocol):
  """Makes one parameter of what is read of it."""

  def __call__(
    self, path: Path, shape: tuple[int, ...], dtype: np.dtype, read: Read, /
  ) -> Any:
    """Makes the parameter.

    Args:
      path: in the tree, as `('layers_0', 'mlp', 'up_proj', 'kernel')`.
      shape: of the parameter.
      dtype: of the parameter.
      read: reads the part that an index stands for, a slice for each axis, as
        `jax.make_array_from_callback` asks for.
    """
    ...


def on_one_device(
  path: Path, shape: tuple[int, ...], dtype: np.dtype, read: Read, /
) -> jax.Array:
  """The whole parameter, on the default device."""
  return jnp.asarray(read((slice(None),) * len(shape)))


def params(
  config: DecoderConfig,
  tensors: Mapping[str, tensors_.Tensor],
  *,
  scan: bool = False,
  dtype: typing.DTypeLike = jnp.float32,
  place: Place = on_one_device,
) -> dict[str, Any]:
  """Parameters of `Decoder` from a Hugging Face checkpoint, one at a time.

  A tensor is read when its parameter is placed and in the parts that `place`
  asks for, so that the host never holds more than one part of one parameter.

  Args:
    config: the sizes.
    tensors: tensors by name; a linear weight is (out, in).
    scan: stack the layers along a first axis, as `Decoder(scan=True)` does.
    dtype: of the parameters.
    place: makes a parameter; by default an array on one device.

  Returns:
    The tree of what `place` made; a Dense kernel is (in, out).

  Raises:
    WeightsError: tensors are missing, of another shape than the configuration
      says, or unknown to it; all are named together, and nothing was read.
  """
  plan = _plan(config, scan)
  faults = _faults(plan, tensors, config.tied)
  if faults:
    raise weights.WeightsError(
      "The tensors do not fit the decoder's configuration: "
      + "; ".join(faults)
      + "."
    )
  dtype = np.dtype(dtype)
  return traverse_util.unflatten_dict(
    {
      path: place(path, source.shape, dtype, _reader(source, tensors, dtype))
      for path, source in plan.items()
    }
  )


def tensors(
  config: DecoderConfig, params: Mapping[str, Any], *, scan: bool = False
) -> dict[str, np.ndarray]:
  """Undoes `params`: the tensors of a Hugging Face checkpoint.

  Args:
    config: the sizes.
    params: of `Decoder`.
    scan: whether its layers are stacked along a first axis.

  Returns:
    Arrays on the host, in the dtype of the parameters; a linear weight is
    (out, in).
  """
  flat = traverse_util.flatten_dict(dict(params))
  found = {}
  for path, source in _plan(config, scan).items():
    array = np.asarray(flat[path])
    for name, one in zip(source.names, array if source.stacked else [array]):
      found[name] = one.T if source.transposed else one
  return found


def modules(
  config: DecoderConfig, scan: bool = False
) -> dict[str, str | tuple[str, ...]]:
  """The path of each kernel, and its module; of stacked layers, all modules."""
  found = {}
  for path, source in _plan(config, scan).items():
    if path[-1] == "kernel":
      names = tuple(name.removesuffix(".weight") for name in source.names)
      found["/".join(path)] = names if source.stacked else names[0]
  return found


def placed(
  tree: Mapping[str, Any], dtype: typing.DTypeLike, place: Place
) -> dict[str, Any]:
  """Nested dicts of arrays that the host has, each as `place` makes it."""
  dtype = np.dtype(dtype)

  def one(path: Path, array: Any) -> Any:
    def read(index: Index) -> np.ndarray:
      return np.asarray(array)[index].astype(dtype)

    return place(path, array.shape, dtype, read)

  flat = traverse_util.flatten_dict(tree)
  return traverse_util.unflatten_dict(
    {path: one(path, array) for path, array in flat.items()}
  )


@dataclasses.dataclass(frozen=True)
class _Source:
  """Where a parameter is in the checkpoint.

  Attributes:
    names: of its tensor; of one for each layer, if `stacked`.
    tensor_shape: of each.
    transposed: whether the parameter is the transpose.
    stacked: whether the parameter has a leading axis of layers.
  """

  names: tuple[str, ...]
  tensor_shape: tuple[int, ...]
  transposed: bool
  stacked: bool

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the parameter."""
    shape = self.tensor_shape[:: -1 if self.transposed else 1]
    return (len(self.names), *shape) if self.stacked else shape


def _reader(
  source: _Source, tensors: Mapping[str, tensors_.Tensor], dtype: np.dtype
) -> Read:
  def one(name: str, index: Index) -> np.ndarray:
    part = tensors[name][index[:: -1 if source.transposed else 1]]
    part = part.T if source.transposed else part
    return part.astype(dtype, copy=False)

  def read(index: Index) -> np.ndarray:
    if not source.stacked:
      return one(source.names[0], index)
    # Filled in place: the parts and their stack would be twice the memory.
    shape = [len(range(*s.indices(n))) for s, n in zip(index, source.shape)]
    out = np.empty(shape, dtype)
    for layer, name in zip(out, source.names[index[0]]):
      layer[...] = one(name, index[1:])
    return out

  return read


def _plan(config: DecoderConfig, scan: bool) -> dict[Path, _Source]:
  """Path in the parameter tree -> where its values are."""
  width = config.hidden_size
  heads = config.num_heads * config.head_dim
  kv_heads = config.num_kv_heads * config.head_dim
  inner = config.intermediate_size
  denses = {
    ("self_attn", "q_proj"): (heads, width),
    ("self_attn", "k_proj"): (kv_heads, width),
    ("self_attn", "v_proj"): (kv_heads, width),
    ("self_attn", "o_proj"): (width, heads),
    ("mlp", "gate_proj"): (inner, width),
    ("mlp", "up_proj"): (inner, width),
    ("mlp", "down_proj"): (width, inner),
  }
  # Within a layer: path, the end of the tensor's name, and its shape.
  parts: list[tuple[Path, str, tuple[int, ...]]] = []
  for path, shape in denses.items():
    parts.append(((*path, "kernel"), "weight", shape))
    if config.qkv_bias and path[-1] in ("q_proj", "k_proj", "v_proj"):
      parts.append(((*path, "bias"), "bias", shape[:1]))
  parts += [
    ((name, "scale"), "weight", (width,))
    for name in ("input_layernorm", "post_attention_layernorm")
  ]
  table = (config.vocab_size, width)

  def whole(name: str, shape: tuple[int, ...], transposed: bool = False):
    return _Source((f"{name}.weight",), shape, transposed, False)

  plan: dict[Path, _Source] = {
    ("embed_tokens", "embedding"): whole("model.embed_tokens", table),
    ("norm", "scale"): whole("model.norm", (width,)),
  }
  if not config.tied:
    plan["lm_head", "kernel"] = whole("lm_head", table, True)
  layers = range(config.num_layers)
  for path, end, shape in parts:
    names = [f"model.layers.{i}.{'.'.join(path[:-1])}.{end}" for i in layers]
    transposed = path[-1] == "kernel"
    if scan:
      plan["layers", *path] = _Source(tuple(names), shape, transposed, True)
      continue
    for i in layers:
      source = _Source((names[i],), shape, transposed, False)
      plan[f"layers_{i}", *path] = source
  return plan


def _faults(
  plan: Mapping[Path, _Source],
  tensors: Mapping[str, tensors_.Tensor],
  tied: bool,
) -> list[str]:
  shapes = {
    name: source.tensor_shape
    for source in plan.values()
    for name in source.names
  }
  faults = [f"{name} is missing" for name in shapes if name not in tensors]
  faults += [
    f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}"
    for name, shape in shapes.items()
    if name in tensors and tuple(tensors[name].shape) != shape
  ]
  # A layer too many beside a configuration of fewer would be dropped in
  # silence. Some checkpoints hold the head that is tied as well.
  faults += [
    f"{name} has no place in it"
    for name in tensors
    if name not in shapes
    and not (tied and name == "lm_head.weight")
    and not _BUFFER.fullmatch(name)
  ]
  return faults
