"""Reads a checkpoint's parameters in parts, and places them one at a time."""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, Protocol

from flax import traverse_util
import jax
from jax import typing
import jax.numpy as jnp
import numpy as np

from ...errors import RunError
from . import tensors as tensors_
from . import weights

_FEW = 1000
_AT_ONCE = 2**20
_BFLOAT16 = np.dtype(jnp.bfloat16)

Path = tuple[str, ...]
Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]


class Place(Protocol):
  """A function that makes one parameter from the values that it reads."""

  def __call__(
    self, path: Path, shape: tuple[int, ...], dtype: np.dtype, read: Read, /
  ) -> Any:
    """Makes the parameter.

    Args:
      path: the path in the tree, `('layers_0', 'mlp', 'up_proj', 'kernel')`.
      shape: the shape of the parameter.
      dtype: the dtype of the parameter.
      read: from an index, a slice for each axis, to this part of the parameter;
        `jax.make_array_from_callback` takes such a function.
    """
    ...


def on_one_device(
  path: Path, shape: tuple[int, ...], dtype: np.dtype, read: Read, /
) -> jax.Array:
  """Makes the whole parameter on the default device."""
  return jnp.asarray(read((slice(None),) * len(shape)))


def placed(
  tree: Mapping[str, Any], dtype: typing.DTypeLike, place: Place
) -> dict[str, Any]:
  """Places the arrays of the host in nested dicts, each by `place`."""
  dtype = np.dtype(dtype)

  def one(path: Path, array: Any) -> Any:
    def read(index: Index) -> np.ndarray:
      return np.asarray(array)[index].astype(dtype)

    return place(path, array.shape, dtype, read)

  flat = traverse_util.flatten_dict(tree)
  return traverse_util.unflatten_dict(
    {path: one(path, array) for path, array in flat.items()}
  )


def finite(place: Place, model: Any) -> Place:
  """Returns a `Place` that refuses values that are not finite.

  It raises a RunError when it reads a part with NaN or infinity.

  Args:
    place: makes a parameter.
    model: the model's name in the message.
  """

  def checked(path, shape, dtype, read, /):
    def read_finite(index: Index) -> np.ndarray:
      part = read(index)
      if not _is_finite(part):
        raise RunError(
          f"The weights of {model} are not finite: {'/'.join(path)} has NaN or "
          "infinity in it; copy the model again, or take another."
        )
      return part

    return place(path, shape, dtype, read_finite)

  return checked


def _is_finite(part: np.ndarray) -> bool:
  """Whether all values are finite; looks at small parts, to save memory."""
  order = "F" if part.flags.f_contiguous else "C"
  flat = part.reshape(-1, order=order)
  for start in range(0, flat.size, _AT_ONCE):
    some = flat[start : start + _AT_ONCE]
    if some.dtype == _BFLOAT16:
      # A check of the exponents takes half the time of `isfinite`.
      bits = some.view(np.uint16) & 0x7F80
      if (bits == 0x7F80).any():
        return False
    elif not np.isfinite(some).all():
      return False
  return True


def quantising(place: Place, adapted: Any) -> Place:
  """Returns a `Place` that also quantises, for a `bilora_jax.Adapted`."""

  def quantised(path, shape, dtype, read, /):
    made = place(path, shape, dtype, read)
    return adapted.quantize_leaf("/".join(path), made)

  return quantised


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a parameter is in the checkpoint.

  Attributes:
    names: the name of its tensor; if `stacked`, a name for each layer.
    tensor_shape: the shape of each tensor.
    transposed: whether the parameter is the transpose of a tensor.
    stacked: whether the parameter has a leading axis of layers.
  """

  names: tuple[str, ...]
  tensor_shape: tuple[int, ...]
  transposed: bool
  stacked: bool

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the parameter."""
    shape = self.tensor_shape[:: -1 if self.transposed else 1]
    return (len(self.names), *shape) if self.stacked else shape


def read(
  plan: Mapping[Path, Source],
  tensors: Mapping[str, tensors_.Tensor],
  dtype: typing.DTypeLike,
  place: Place,
) -> dict[str, Any]:
  """Reads the parameters of a plan, and places each by `place`.

  A tensor is read when its parameter is placed, in the parts that `place` asks
  for. So the host never holds more than one part of one parameter.

  Args:
    plan: path in the tree of parameters -> where its values are.
    tensors: the tensors by name, which `check` has checked.
    dtype: the dtype of the parameters.
    place: makes a parameter.

  Returns:
    The parameters, as nested dicts.
  """
  dtype = np.dtype(dtype)
  return traverse_util.unflatten_dict(
    {
      path: place(path, source.shape, dtype, _reader(source, tensors, dtype))
      for path, source in plan.items()
    }
  )


def check(
  plan: Mapping[Path, Source],
  tensors: Mapping[str, tensors_.Tensor],
  ignored: Callable[[str], bool],
  model: str,
) -> None:
  """Refuses a checkpoint that does not fit a plan, before anything is read.

  Call `check_layers` before the plan is made.

  Args:
    plan: path in the tree of parameters -> where its values are.
    tensors: the tensors by name.
    ignored: whether a name may be there although the plan lacks it.
    model: the model's name in the message.

  Raises:
    WeightsError: tensors are missing, have a wrong shape, are not floats, or
      are not in the plan. One message lists the first of them.
  """
  shapes = {
    name: source.tensor_shape
    for source in plan.values()
    for name in source.names
  }
  found = [f"{name} is missing" for name in shapes if name not in tensors]
  found += [
    f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}"
    for name, shape in shapes.items()
    if name in tensors and tuple(tensors[name].shape) != shape
  ]
  found += [
    f"{name} is of {kind}, and weights are floats"
    for name in shapes
    if name in tensors and (kind := _other_kind(tensors[name]))
  ]
  # If the configuration has too few layers, the others must not be dropped
  # silently.
  found += [
    f"{name} has no place in it"
    for name in tensors
    if name not in shapes and not ignored(name)
  ]
  if found:
    raise weights.WeightsError(
      f"The tensors do not fit the {model}'s configuration: "
      f"{weights.listed(found)}."
    )


def equal(one: tensors_.Tensor, other: tensors_.Tensor) -> bool:
  """Whether two tensors have the same shape and values.

  They are read a few rows at a time. Values are compared as float32.
  """
  if tuple(one.shape) != tuple(other.shape):
    return False
  count, *rest = one.shape
  step = max(1, _AT_ONCE // max(1, math.prod(rest)))
  for start in range(0, count, step):
    rows = slice(start, min(start + step, count))
    index = (rows, *(slice(None) for _ in rest))
    first, second = (x[index].astype(np.float32) for x in (one, other))
    if not np.array_equal(first, second):
      return False
  return True


def check_layers(
  count: int, tensors: Mapping[str, tensors_.Tensor], model: str
) -> None:
  """Refuses a configuration with more layers than there are tensors.

  A plan or a model of so many layers could take all memory.

  Raises:
    WeightsError: if it has more.
  """
  # If the layers are few, `check` reports what is missing.
  if count > max(len(tensors), _FEW):
    raise weights.WeightsError(
      f"The tensors do not fit the {model}'s configuration: it has {count}"
      f" layers, and there are {len(tensors)} tensors in all."
    )


def _other_kind(tensor: tensors_.Tensor) -> str:
  """Returns the dtype of a tensor that is not of floats, else ""."""
  try:
    dtype = tensor.dtype
  except weights.WeightsError as error:
    return str(error)
  return "" if jnp.issubdtype(dtype, jnp.floating) else dtype.name


def _reader(
  source: Source, tensors: Mapping[str, tensors_.Tensor], dtype: np.dtype
) -> Read:
  def one(name: str, index: Index) -> np.ndarray:
    part = tensors[name][index[:: -1 if source.transposed else 1]]
    part = part.T if source.transposed else part
    return part.astype(dtype, copy=False)

  def read(index: Index) -> np.ndarray:
    if not source.stacked:
      return one(source.names[0], index)
    # Filled in place, because a stack of parts would need twice the memory.
    shape = [len(range(*s.indices(n))) for s, n in zip(index, source.shape)]
    out = np.empty(shape, dtype)
    for layer, name in zip(out, source.names[index[0]]):
      layer[...] = one(name, index[1:])
    return out

  return read


def tensors(
  plan: Mapping[Path, Source], params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns a checkpoint's tensors by name; the inverse of `read`.

  Args:
    plan: path in the parameter tree -> where its values are.
    params: nested dicts with the plan's paths.

  Returns:
    Arrays on the host, in the dtype of the parameters.
  """
  flat: dict[Any, Any] = traverse_util.flatten_dict(dict(params))
  found = {}
  for path, source in plan.items():
    array = np.asarray(flat[path])
    for name, one in zip(source.names, array if source.stacked else [array]):
      found[name] = one.T if source.transposed else one
  return found


def modules(plan: Mapping[Path, Source]) -> dict[str, str | tuple[str, ...]]:
  """Returns the path of each parameter, and its module in the checkpoint.

  Stacked layers have a module for each layer. Parameters that are not the
  weight or bias of a module are left out.
  """
  found = {}
  for path, source in plan.items():
    end = ".bias" if path[-1] == "bias" else ".weight"
    if all(name.endswith(end) for name in source.names):
      names = tuple(name.removesuffix(end) for name in source.names)
      found["/".join(path)] = names if source.stacked else names[0]
  return found
