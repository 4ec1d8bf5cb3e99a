"""Meshes: how the arrays of a run are laid out over its devices.

The base, the adapters and the optimizer's state are sharded by the names of
their axes (`RULES`), a batch by its rows. The devices along `context` share the
tokens of a row: each is given all of them, and a model takes its part. A
dimension that the size of its mesh axis does not divide is left whole on every
device, and so is the rank. A factor of an adapter is split over the mesh axes
of both sides of its kernel.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import numpy as np

from ..errors import UsageError
from ..models.io import stored

AXES = ("data", "fsdp", "context", "tensor")
# Devices that share a row's tokens need the same weights, as those do that
# share rows.
RULES = (
  ("batch", ("data", "fsdp")),
  ("length", "context"),
  ("embed", ("fsdp", "context")),
  ("vocab", ("fsdp", "context")),
  ("mlp", "tensor"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
)
"""Name of an axis of an array -> the mesh axes it is split over."""

_Spec = jax.sharding.PartitionSpec
_Rules = Sequence[tuple[str, Any]]

# A factor has one side of its kernel: split as that alone, it would be whole
# along the mesh axis of the other, and so would the optimizer's moments.
FACTOR_RULES: Sequence[_Rules] = (
  (
    *((name, ("fsdp", "context", "tensor")) for name in ("embed", "vocab")),
    *(
      (name, ("tensor", "fsdp", "context"))
      for name in ("mlp", "heads", "kv_heads")
    ),
  ),
  RULES,
)
"""Of adapters' factors: the first of them that divides a size."""


def parse(text: str) -> dict[str, int]:
  """The sizes of all axes, as `data=2,tensor=4` gives them; 1 if it does not.

  Raises:
    UsageError: if an axis is unknown or comes twice, or a size is no positive
      number.
  """
  sizes: dict[str, int] = {}
  for part in text.split(","):
    name, _, size = (x.strip() for x in part.partition("="))
    problem = None
    if name not in AXES:
      problem = f"there is no axis {name!r}"
    elif name in sizes:
      problem = f"{name} comes twice"
    elif not re.fullmatch("0*[1-9][0-9]{0,8}", size):
      problem = f"the size of {name} is a positive number, not {size!r}"
    if problem:
      raise UsageError(
        "--mesh must be data=N,fsdp=N,context=N,tensor=N or some of these; "
        f"got {text!r}: {problem}."
      )
    sizes[name] = int(size)
  return {name: sizes.get(name, 1) for name in AXES}


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
  """Where the arrays of a run are: on a mesh, or on one device if None."""

  mesh: jax.sharding.Mesh | None = None

  @property
  def replicated(self) -> jax.sharding.NamedSharding | None:
    """The whole array on each device; None without a mesh."""
    return self.sharding(_Spec(), ())

  def sharding(
    self,
    axes: _Spec,
    shape: tuple[int, ...],
    rules: Sequence[_Rules] = (RULES,),
  ) -> jax.sharding.NamedSharding | None:
    """That of an array whose axes have these names; None without a mesh.

    Each size is split by the first of the rules that divides it.
    """
    mesh = self.mesh
    if mesh is None:
      return None

    def split(name, size):
      fitting = (dict(rule).get(name) for rule in rules)
      return next((x for x in fitting if x and _divides(mesh, x, size)), None)

    return jax.sharding.NamedSharding(
      mesh, _Spec(*(split(name, size) for name, size in zip(axes, shape)))
    )

  def shardings(
    self, axes: Any, tree: Any, rules: Sequence[_Rules] = (RULES,)
  ) -> Any:
    """As `sharding`, for a tree of arrays and one of their axes' names."""
    return jax.tree.map(
      lambda names, x: self.sharding(names, x.shape, rules),
      axes,
      tree,
      is_leaf=lambda x: isinstance(x, _Spec),
    )

  def placer(self, axes: Any) -> stored.Place:
    """Makes arrays of what is read from disk: each device's part by itself.

    Args:
      axes: a tree of nested dicts of their axes' names.
    """
    if self.mesh is None:
      return stored.on_one_device
    names: dict[Any, Any] = traverse_util.flatten_dict(axes)

    def place(path, shape, dtype, read, /):
      del dtype
      sharding = self.sharding(names[path], shape)
      assert sharding is not None  # there is a mesh
      return jax.make_array_from_callback(shape, sharding, read)

    return place

  @property
  def context(self) -> int:
    """The devices that share the tokens of a row."""
    return 1 if self.mesh is None else self.mesh.shape["context"]

  @property
  def offloads(self) -> bool:
    """Whether arrays of a step can wait in the memory of the host."""
    devices = (
      jax.local_devices() if self.mesh is None else self.mesh.devices.flat
    )
    # Devices of other processes have none here.
    kinds = {m.kind for x in devices for m in x.addressable_memories()}
    return "pinned_host" in kinds

  def part(self) -> tuple[int, int]:
    """Which equal part of a batch's rows is this process's, of how many."""
    if self.mesh is None:
      return 0, 1
    found = _part(self.mesh, jax.process_index())
    assert found is not None  # `make` has seen to it
    return found

  def rows(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Places a batch, of which each process has its own part."""
    if self.mesh is None:
      return batch
    _, parts = self.part()

    def place(x):
      shape = (parts * x.shape[0], *x.shape[1:])
      sharding = self.sharding(_Spec("batch"), shape)
      return jax.make_array_from_process_local_data(sharding, x, shape)

    return {name: place(x) for name, x in batch.items()}

  def all_rows(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
    """Places a batch, of which every process has all rows."""
    index, parts = self.part()

    def own(x):
      size = len(x) // parts
      return x[index * size : (index + 1) * size]

    return self.rows({name: own(x) for name, x in batch.items()})

  def gather(self, tree: Any) -> Any:
    """All of each array, on the host of every process."""
    if self.mesh is not None:
      tree = jax.jit(lambda x: x, out_shardings=self.replicated)(tree)
    return jax.device_get(tree)

  def within(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the model's own constraints on activations."""
    mesh = self.mesh
    if mesh is None:
      return function

    def call(*args):
      with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        return function(*args)

    return call


def make(
  text: str, batch_size: int, devices: Sequence[Any] | None = None
) -> Layout:
  """The layout that `--mesh` asks for, over all devices of all processes.

  Args:
    text: as `parse` takes it; empty for one device.
    batch_size: rows of a batch, which are split over `data` and `fsdp`.
    devices: by default, those that there are.

  Raises:
    UsageError: as `parse`; if the mesh has not as many devices as there are,
      or cannot share a batch equally.
  """
  devices = jax.devices() if devices is None else devices
  count, processes = len(devices), len(_processes(devices))
  if not text:
    if processes > 1:
      raise UsageError(
        f"{processes} processes with {count} devices need a --mesh, for "
        f"example data={count}."
      )
    return Layout()
  sizes = parse(text)
  if math.prod(sizes.values()) != count:
    raise UsageError(
      f"--mesh {text} asks for {math.prod(sizes.values())} devices; there are "
      f"{count}, of the kind {devices[0].device_kind}, in {processes} "
      "process(es)."
    )
  rows = sizes["data"] * sizes["fsdp"]
  if batch_size % rows:
    raise UsageError(
      f"--batch-size must be a multiple of data times fsdp, which is {rows} "
      f"in --mesh {text}; got {batch_size}."
    )
  # Its own default are Explicit axes, for which models are written otherwise.
  mesh = jax.make_mesh(
    tuple(sizes.values()),
    AXES,
    (jax.sharding.AxisType.Auto,) * len(AXES),
    devices=devices,
  )
  if not _shares(mesh):
    # It may spread a process's devices, to bring near what is near in the
    # machine; the rows of a process have to be neighbours.
    ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
    mesh = jax.sharding.Mesh(
      np.array(ordered).reshape(tuple(sizes.values())), AXES
    )
  if not _shares(mesh):
    raise UsageError(
      f"--mesh {text} does not share the rows of a batch equally among "
      f"{processes} processes of {count // processes} devices; context times "
      "tensor must divide that number, or be a multiple of it."
    )
  return Layout(mesh)


def _processes(devices: Iterable[Any]) -> set[int]:
  return {device.process_index for device in devices}


def _shares(mesh: jax.sharding.Mesh) -> bool:
  return all(_part(mesh, i) for i in _processes(mesh.devices.flat))


def _part(mesh: jax.sharding.Mesh, process: int) -> tuple[int, int] | None:
  """The part of a batch that a process's devices hold, of how many parts.

  None, if it is not one of equal parts.
  """
  inner = mesh.shape["context"] * mesh.shape["tensor"]
  batch = mesh.devices.size // inner
  own = sorted(
    {
      i // inner
      for i, device in enumerate(mesh.devices.flat)
      if device.process_index == process
    }
  )
  first, size = own[0], len(own)
  if own != list(range(first, first + size)) or batch % size or first % size:
    return None
  return first // size, batch // size


def _divides(mesh: jax.sharding.Mesh, axes: Any, size: int) -> bool:
  names = (axes,) if isinstance(axes, str) else axes or ()
  return size % math.prod(mesh.shape[name] for name in names) == 0
