"""Where the parameters of a model are in Hugging Face's, by their names."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Wider:
  """A linear module with inputs beyond ours, which have weights of zero.

  As a head that is given more than ours looks at.

  Attributes:
    module: its name.
    own: how many inputs are ours; they come first.
    others: how many come after them.
  """

  module: str
  own: int
  others: int


@dataclasses.dataclass(frozen=True)
class Convolution:
  """A convolution, (out, in, height, width) in PyTorch.

  Ours has a kernel (height, width, in, out), or is a product with patches whose
  pixels come row by row, channels last.

  Attributes:
    module: its name.
    height: of the kernel.
    width: of the kernel.
  """

  module: str
  height: int
  width: int


@dataclasses.dataclass(frozen=True)
class Tied:
  """An embedding whose table is also the weight of other modules.

  As that of a language model whose head is tied to it.

  Attributes:
    module: its name.
    others: the names of the others.
  """

  module: str
  others: tuple[str, ...]


Module = str | Wider | Convolution | Tied
Names = Mapping[str, Module | Sequence[Module]]

# The last part of a parameter's path in Flax -> that of PyTorch's tensor.
_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "embedding": "weight",
  "bias": "bias",
}


@dataclasses.dataclass(frozen=True)
class Places:
  """Names, checked.

  Attributes:
    names: the modules of each path; several, if it has leading axes of them.
    stacked: the paths that have such axes.
  """

  names: Mapping[str, tuple[Module, ...]]
  stacked: frozenset[str]

  @classmethod
  def of(cls, names: Names, prefix: str = "") -> "Places":
    """Checks names, and takes `prefix` off those that begin with it.

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
      ValueError: that lists them.
    """
    lost = [path for path in paths if path not in self.names]
    if lost:
      raise ValueError(
        f"names has no module for {', '.join(lost)}; what is trained needs one."
      )

  def adaptable(self) -> dict[str, tuple[str, Module]]:
    """By name, what could have an adapter, and the path of its weight."""
    return {
      name_of(module): (path, module)
      for path, modules in self.names.items()
      if _leaf(path) not in ("bias", "scale", "embedding")
      for module in modules
      if not isinstance(module, Wider)
    }

  def embeddings(self) -> dict[str, str]:
    """By name, the embeddings, and the paths of their tables."""
    return {
      name_of(module): path
      for path, modules in self.names.items()
      if _leaf(path) == "embedding"
      for module in modules
    }

  def paths(self) -> dict[str, str]:
    """By the name of a tensor, the path of the parameter that it is of."""
    return {
      name: path for path in self.names for name in self.tensor_names(path)
    }

  def ties(self) -> dict[str, str]:
    """From modules to the embeddings whose tables are their weights."""
    return {
      other: module.module
      for modules in self.names.values()
      for module in modules
      if isinstance(module, Tied)
      for other in module.others
    }

  def modules(self, path: str, batch: Sequence[int]) -> tuple[Module, ...]:
    """Of an adapted weight: as many as its batch axes hold, row by row.

    Raises:
      ValueError: if there are others, or the weight is trained whole.
    """
    found = self._checked(path, batch)
    wider = [module for module in found if isinstance(module, Wider)]
    if wider:
      raise ValueError(
        f"names has {wider[0]} for {path}, which has an adapter; only what is "
        "trained whole may be Wider."
      )
    return found

  def tensor_names(self, path: str) -> list[str]:
    """Of a parameter that is trained whole."""
    end = _LEAVES.get(_leaf(path), "weight")
    return [f"{name_of(module)}.{end}" for module in self.names[path]]

  def tensors(self, path: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The modules, and in PyTorch's form the values, of a whole parameter.

    Raises:
      ValueError: if a module of PyTorch would have no such parameter.
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
          f"{path}, of shape {one.shape}, is trained whole, and what can be "
          "written so are linear kernels, biases (out,), scales and embeddings."
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
      path: of the parameter.
      tensors: with all of its `tensor_names`.

    Raises:
      ValueError: if inputs that are not ours have weights.
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
              f"{module.own} that this model's head is given"
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
  """Undoes `to_torch`; None if the shapes are of no such module."""
  if isinstance(module, Convolution):
    sizes = (module.height, module.width)
    if (a.ndim, a.shape[2:], b.shape[2:]) != (4, sizes, (1, 1)):
      return None
    a, b = a.transpose(0, 2, 3, 1).reshape(len(a), -1), b[..., 0, 0]
  if (a.ndim, b.ndim) != (2, 2) or len(a) != b.shape[1]:
    return None
  return a.T, b.T


def magnitude_to_torch(module: Module, magnitude: np.ndarray) -> np.ndarray:
  """DoRA's magnitude (out,) as PEFT has it of a module."""
  if isinstance(module, Convolution):
    return magnitude.reshape(1, -1, 1, 1)
  return magnitude


def name_of(module: Module) -> str:
  """The name alone."""
  return module if isinstance(module, str) else module.module


def _without(prefix: str, module: Module) -> Module:
  if isinstance(module, str):
    return module.removeprefix(prefix)
  return dataclasses.replace(module, module=module.module.removeprefix(prefix))


def _leaf(path: str) -> str:
  return path.rpartition("/")[2]
