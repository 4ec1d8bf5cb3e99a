"""Maps the parameters of a model to modules of Hugging Face models, by name."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Wider:
  """A linear module with more inputs than ours; the others have zero weights.

  An example is a head that has more input features than our head.

  Attributes:
    module: name of the module.
    own: number of our inputs, which come first.
    others: number of the other inputs, which follow.
  """

  module: str
  own: int
  others: int


@dataclasses.dataclass(frozen=True)
class Convolution:
  """A convolution, (out, in, height, width) in PyTorch.

  Our layer has a kernel (height, width, in, out), or multiplies patches whose
  pixels are in row order, channels last.

  Attributes:
    module: name of the module.
    height: height of the kernel.
    width: width of the kernel.
  """

  module: str
  height: int
  width: int


@dataclasses.dataclass(frozen=True)
class Tied:
  """An embedding whose table is also the weight of other modules.

  An example is the embedding of a language model with a tied head.

  Attributes:
    module: name of the embedding.
    others: names of the other modules.
  """

  module: str
  others: tuple[str, ...]


Module = str | Wider | Convolution | Tied
Names = Mapping[str, Module | Sequence[Module]]

# The last part of a parameter's path in Flax -> the last part of its name in
# PyTorch.
_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "embedding": "weight",
  "bias": "bias",
}


@dataclasses.dataclass(frozen=True)
class Places:
  """Checked names.

  Attributes:
    names: the modules of each path; several modules if the parameter has
      leading axes.
    stacked: the paths of parameters with such axes.
  """

  names: Mapping[str, tuple[Module, ...]]
  stacked: frozenset[str]

  @classmethod
  def of(cls, names: Names, prefix: str = "") -> "Places":
    """Checks names, and removes `prefix` from names that begin with it.

    Raises:
      ValueError: if two parameters have the same place.
    """
    own: dict[str, tuple[Module, ...]] = {}
    stacked = set()
    for path, found in names.items():
      several = not isinstance(found, Module)
      if several:
        stacked.add(path)
      modules: Sequence[Module] = found if several else (found,)
      own[path] = tuple(_without(prefix, module) for module in modules)
    places = cls(own, frozenset(stacked))
    taken: dict[str, str] = {}
    for path in own:
      for name in places.tensor_names(path):
        if taken.setdefault(name, path) != path:
          raise ValueError(
            f"names has the same place, {name}, for {taken[name]} and {path}."
          )
    return places

  def require(self, paths: Iterable[str]) -> None:
    """Refuses paths that have no name.

    Raises:
      ValueError: if there are any; the message lists them.
    """
    lost = [path for path in paths if path not in self.names]
    if lost:
      raise ValueError(
        f"names has no module for {', '.join(lost)}; each trained parameter "
        "needs one."
      )

  def adaptable(self) -> dict[str, tuple[str, Module]]:
    """The modules that can have adapters and their weights' paths, by name."""
    return {
      name_of(module): (path, module)
      for path, modules in self.names.items()
      if _leaf(path) not in ("bias", "scale", "embedding")
      for module in modules
      if not isinstance(module, Wider)
    }

  def embeddings(self) -> dict[str, str]:
    """The paths of the embeddings' tables, by the embeddings' names."""
    return {
      name_of(module): path
      for path, modules in self.names.items()
      if _leaf(path) == "embedding"
      for module in modules
    }

  def paths(self) -> dict[str, str]:
    """The path of each tensor's parameter, by the tensor's name."""
    return {
      name: path for path in self.names for name in self.tensor_names(path)
    }

  def ties(self) -> dict[str, str]:
    """The embedding of each tied module, by the module's name."""
    return {
      other: module.module
      for modules in self.names.values()
      for module in modules
      if isinstance(module, Tied)
      for other in module.others
    }

  def modules(self, path: str, batch: Sequence[int]) -> tuple[Module, ...]:
    """The modules of an adapted weight, one for each index of its batch axes.

    Raises:
      ValueError: if the number of modules differs, or a module is `Wider`,
        which is for weights that are trained whole.
    """
    found = self._checked(path, batch)
    wider = [module for module in found if isinstance(module, Wider)]
    if wider:
      raise ValueError(
        f"names has {wider[0]} for {path}, which has an adapter; only a module "
        "that is trained whole may be Wider."
      )
    return found

  def tensor_names(self, path: str) -> list[str]:
    """The tensors' names of a parameter that is trained whole."""
    end = _LEAVES.get(_leaf(path), "weight")
    return [f"{name_of(module)}.{end}" for module in self.names[path]]

  def tensors(self, path: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The modules of a whole parameter, with their values in PyTorch's form.

    Raises:
      ValueError: if PyTorch's modules have no such parameter.
    """
    value = np.asarray(value, np.float32)
    stacked = path in self.stacked
    modules = self._checked(path, value.shape[:1] if stacked else ())
    leaf = _leaf(path)
    for module, one in zip(modules, value if stacked else value[None]):
      linear = one.ndim == 2 and not isinstance(module, Convolution)
      wide = leaf == "bias" and one.ndim > 1
      if leaf not in _LEAVES or (leaf == "kernel" and not linear) or wide:
        raise ValueError(
          f"{path}, of shape {one.shape}, is trained whole, but only linear "
          "kernels, biases (out,), scales and embeddings can be written whole."
        )
      if leaf == "kernel":
        one = one.T
        if isinstance(module, Wider):
          one = np.pad(one, ((0, 0), (0, module.others)))
      yield name_of(module), one

  def parameter(
    self, path: str, tensors: Mapping[str, np.ndarray]
  ) -> np.ndarray:
    """Undoes `tensors`.

    Args:
      path: path of the parameter.
      tensors: tensors by name, with all of its `tensor_names`.

    Returns:
      The value, float32.

    Raises:
      ValueError: if inputs beyond ours have nonzero weights.
    """
    values = []
    for module, name in zip(self.names[path], self.tensor_names(path)):
      value = tensors[name]
      if _leaf(path) == "kernel":
        if isinstance(module, Wider):
          value, others = np.split(value, [module.own], axis=-1)
          if others.any():
            raise ValueError(
              f"{name} looks at {others.shape[-1]} inputs beyond the "
              f"{module.own} inputs of this model's head"
            )
        value = value.T
      values.append(value.astype(np.float32))
    return np.stack(values) if path in self.stacked else values[0]

  def _checked(self, path: str, batch: Sequence[int]) -> tuple[Module, ...]:
    found = self.names[path]
    count = math.prod(batch)
    if bool(batch) != (path in self.stacked) or len(found) != count:
      wanted = f"a sequence of {count} modules" if batch else "one module"
      raise ValueError(
        f"{path} has the leading axes {tuple(batch)}, so that names has "
        f"{wanted} for it; got {[name_of(module) for module in found]}."
      )
    return found


def to_torch(
  module: Module, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """`lora_A` and `lora_B` of a pair, `a` (in, r) and `b` (r, out)."""
  if not isinstance(module, Convolution):
    return a.T, b.T
  patches = a.T.reshape(a.shape[-1], module.height, module.width, -1)
  return patches.transpose(0, 3, 1, 2), b.T[..., None, None]


def from_torch(
  module: Module, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
  """Undoes `to_torch`; None if the shapes do not fit the module."""
  if isinstance(module, Convolution):
    sizes = (module.height, module.width)
    if (a.ndim, a.shape[2:], b.shape[2:]) != (4, sizes, (1, 1)):
      return None
    a, b = a.transpose(0, 2, 3, 1).reshape(len(a), -1), b[..., 0, 0]
  if (a.ndim, b.ndim) != (2, 2) or len(a) != b.shape[1]:
    return None
  return a.T, b.T


def magnitude_to_torch(module: Module, magnitude: np.ndarray) -> np.ndarray:
  """DoRA's magnitude (out,) in PEFT's shape for a module."""
  if isinstance(module, Convolution):
    return magnitude.reshape(1, -1, 1, 1)
  return magnitude


def name_of(module: Module) -> str:
  """The name of a module."""
  return module if isinstance(module, str) else module.module


def _without(prefix: str, module: Module) -> Module:
  if isinstance(module, str):
    return module.removeprefix(prefix)
  return dataclasses.replace(module, module=module.module.removeprefix(prefix))


def _leaf(path: str) -> str:
  return path.rpartition("/")[2]
