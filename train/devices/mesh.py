"""Meshes: how the arrays of a run are laid out over its devices.

The base, the adapters and the optimizer's state are sharded by the names of
their axes (`RULES`). A batch is sharded by its rows. The devices along
`context` share the tokens of a row: each device gets all tokens, and the model
uses its part. A dimension stays whole on every device if its mesh axis does not
divide it; the rank always stays whole. A factor of an adapter is split over the
mesh axes of both sides of its kernel.
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
# `context` also splits weights, because devices that share the tokens of a row
# need the same weights, like devices that share rows.
RULES = (
  ("batch", ("data", "fsdp")),
  ("length", "context"),
  ("embed", ("fsdp", "context")),
  ("vocab", ("fsdp", "context")),
  ("mlp", "tensor"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
)
"""From the name of an array's axis to the mesh axes that split it."""

_Spec = jax.sharding.PartitionSpec
_Rules = Sequence[tuple[str, Any]]

# A factor has only one side of its kernel. With the rules of this side alone,
# the factor and the optimizer's moments would not be split over the mesh axes
# of the other side.
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
"""The rules of adapters' factors; the first one that divides a size is used."""


def parse(text: str) -> dict[str, int]:
  """Returns the sizes of all axes from a text such as `data=2,tensor=4`.

  Axes that the text does not name have the size 1.

  Raises:
    UsageError: if an axis is unknown or named twice, or a size is not a
      positive number.
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
  """The mesh that holds the arrays of a run; None: one device."""

  mesh: jax.sharding.Mesh | None = None

  @property
  def replicated(self) -> jax.sharding.NamedSharding | None:
    """The sharding of a whole array on each device; None without a mesh."""
    return self.sharding(_Spec(), ())

  def sharding(
    self,
    axes: _Spec,
    shape: tuple[int, ...],
    rules: Sequence[_Rules] = (RULES,),
  ) -> jax.sharding.NamedSharding | None:
    """Returns the sharding of an array; None without a mesh.

    Args:
      axes: the names of the array's axes.
      shape: the array's shape.
      rules: the rules to try. For each axis, the first rule whose mesh axes
        divide the size is used.
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
    """As `sharding`, for a tree of arrays and a tree of their axes' names."""
    return jax.tree.map(
      lambda names, x: self.sharding(names, x.shape, rules),
      axes,
      tree,
      is_leaf=lambda x: isinstance(x, _Spec),
    )

  def placer(self, axes: Any) -> stored.Place:
    """Returns a `Place` that reads each device's part of an array separately.

    Args:
      axes: nested dicts of the names of the arrays' axes.
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
    """How many devices share the tokens of a row."""
    return 1 if self.mesh is None else self.mesh.shape["context"]

  @property
  def offloads(self) -> bool:
    """Whether a step can keep arrays in the memory of the host."""
    devices = (
      jax.local_devices() if self.mesh is None else self.mesh.devices.flat
    )
    # Devices of other processes have no memories in this process.
    kinds = {m.kind for x in devices for m in x.addressable_memories()}
    return "pinned_host" in kinds

  def part(self) -> tuple[int, int]:
    """Returns this process's part of a batch, and the number of equal parts."""
    if self.mesh is None:
      return 0, 1
    found = _part(self.mesh, jax.process_index())
    assert found is not None  # `make` has checked it
    return found

  def rows(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Places a batch; each process gives its own part of the rows."""
    if self.mesh is None:
      return batch
    _, parts = self.part()

    def place(x):
      shape = (parts * x.shape[0], *x.shape[1:])
      sharding = self.sharding(_Spec("batch"), shape)
      return jax.make_array_from_process_local_data(sharding, x, shape)

    return {name: place(x) for name, x in batch.items()}

  def all_rows(self, batch: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
    """Places a batch; every process gives all rows."""
    index, parts = self.part()

    def own(x):
      size = len(x) // parts
      return x[index * size : (index + 1) * size]

    return self.rows({name: own(x) for name, x in batch.items()})

  def gather(self, tree: Any) -> Any:
    """Returns whole arrays, on the host of every process."""
    if self.mesh is not None:
      tree = jax.jit(lambda x: x, out_shardings=self.replicated)(tree)
    return jax.device_get(tree)

  def within(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, run with the mesh and its rules for activations."""
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
  """Returns the layout of `--mesh`, over all devices of all processes.

  Args:
    text: as of `parse`; empty for one device.
    batch_size: rows of a batch, which are split over `data` and `fsdp`.
    devices: the devices; None: all devices of JAX.

  Raises:
    UsageError: as `parse`; or if the mesh and the machine have different
      numbers of devices, or processes cannot share a batch equally.
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
  # jax.make_mesh defaults to Explicit axes, but these models need Auto axes.
  mesh = jax.make_mesh(
    tuple(sizes.values()),
    AXES,
    (jax.sharding.AxisType.Auto,) * len(AXES),
    devices=devices,
  )
  if not _shares(mesh):
    # jax.make_mesh orders devices by their places in the machine, and may
    # spread those of a process. But the rows of a process must be neighbours.
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
  """Returns a process's part of a batch, and the number of parts.

  Returns None if the process's devices do not hold one of equal parts.
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
