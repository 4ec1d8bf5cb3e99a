"""Kernels of 4 or 8 bits: made, read and sharded.

Users meet them as `qwix.QArray`, of codes that have the kernel's shape and
float32 scales, one for each tile of it; layers, as a `StandIn`.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix

# By itself Qwix makes the largest magnitude 127.5, which int8 has not.
_CALIBRATION = {"int8": f"absmax,{127.5 / 127}"}
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)

QTYPES = {"nf4": "nf4", "int8": "int8", "fp8": "float8_e4m3fn"}
"""What a spec calls them -> what Qwix does."""


def tile_sizes(sizes: Sequence[int], tile_size: int | None) -> tuple[int, ...]:
  """How the axes that a kernel sums over are cut into tiles of one scale.

  Args:
    sizes: of these axes.
    tile_size: how many weights a tile should have; None for all.

  Returns:
    Sizes of a tile along the axes. The last are filled first, each by the
    largest divisor of its size that there is room for; a tile that would come
    out under half of `tile_size` is all of the axes instead.
  """
  if tile_size is None:
    return tuple(sizes)
  tiles, room = [], tile_size
  for size in reversed(sizes):
    tiles.insert(0, max(t for t in range(1, room + 1) if size % t == 0))
    room //= tiles[0]
  return tuple(tiles if 2 * math.prod(tiles) >= tile_size else sizes)


@dataclasses.dataclass(frozen=True)
class Form:
  """In what a kernel is stored.

  Attributes:
    base_dtype: one of `QTYPES`.
    tiles: the size of a tile along each axis of the kernel.
  """

  base_dtype: str
  tiles: tuple[int, ...]

  def __str__(self) -> str:
    return f"{self.base_dtype} in tiles of {'x'.join(map(str, self.tiles))}"

  def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """How many tiles there are along each axis of a kernel of this shape."""
    return tuple(size // tile for size, tile in zip(shape, self.tiles))

  def array(self, codes: Any, scale: Any) -> qwix.QArray:
    """A kernel of these codes and scales, or of what stands in for them."""
    return qwix.QArray(codes, scale, None, QTYPES[self.base_dtype])


def form_of(leaf: Any) -> str:
  """In what a parameter is stored, in words: of a `Form`, or `floats`."""
  if is_quantised(leaf):
    names = {qtype: name for name, qtype in QTYPES.items()}
    qtype = leaf.qtype
    if not isinstance(qtype, str):
      qtype = jnp.dtype(qtype).name
    return str(Form(names.get(qtype, qtype), leaf.scale_tile_shape))
  return "floats" if isinstance(leaf, _ARRAYS) else type(leaf).__name__


def is_quantised(node: Any) -> bool:
  """Whether a node is a quantised kernel."""
  return isinstance(node, qwix.QArray)


@functools.partial(jax.jit, static_argnames=("form", "shardings"))
def quantise(
  kernel: jax.Array, form: Form, shardings: tuple[Any, Any] | None = None
) -> qwix.QArray:
  """The kernel in few bits, by the largest magnitude of each tile.

  Args:
    kernel: of floats.
    form: in what to store it.
    shardings: of the codes and the scales; None to leave them to XLA.
  """
  sizes = dict(enumerate(form.tiles))
  array = qwix.quantize(
    kernel.astype(jnp.float32),
    QTYPES[form.base_dtype],
    channelwise_axes=[axis for axis, size in sizes.items() if size == 1],
    tiled_axes={axis: size for axis, size in sizes.items() if size > 1},
    calibration_method=_CALIBRATION.get(form.base_dtype, "absmax"),
  )
  codes, scale = array.qvalue, array.scale
  if form.base_dtype == "nf4":
    # Qwix looks for the nearest level with 8 bytes of memory a weight, and in
    # a flattened array, which a mesh would have to gather.
    values, levels = kernel / _spread(scale, kernel.shape), _nf4_levels()
    codes = jnp.zeros(kernel.shape, jnp.uint8)
    for middle in (levels[1:] + levels[:-1]) / 2:
      codes += values > middle
    codes = codes.astype(jnp.uint4)
  if shardings is not None:
    codes, scale = map(
      jax.lax.with_sharding_constraint, (codes, scale), shardings
    )
  return form.array(codes, scale)


def dequantise(array: qwix.QArray) -> jax.Array:
  """The float32 kernel that an array stands for."""
  if array.qtype != "nf4":
    return qwix.dequantize(array)
  # Not by Qwix, for the same reason as above.
  levels = _nf4_levels().at[array.qvalue.astype(jnp.int32)]
  spread = _spread(array.scale, array.shape)
  return levels.get(mode="promise_in_bounds") * spread


def shardings(
  sharding: Any, shape: Sequence[int], form: Form
) -> tuple[Any, Any] | None:
  """Those of the codes and the scales of a kernel; None if not on a mesh."""
  if not isinstance(sharding, jax.sharding.NamedSharding) or not isinstance(
    sharding.mesh, jax.sharding.Mesh
  ):
    return None
  axes = []
  for names, count in zip(sharding.spec, form.scale_shape(shape)):
    group = (names,) if isinstance(names, str) else names or ()
    parts = math.prod(sharding.mesh.shape[name] for name in group)
    axes.append(None if count % parts else names)
  spec = jax.sharding.PartitionSpec(*axes)
  return sharding, jax.sharding.NamedSharding(sharding.mesh, spec)


def scale_axes(
  names: Sequence[Any], scale_shape: Sequence[int]
) -> tuple[Any, ...]:
  """Names of the scales' axes, given the kernel's: none where there is one."""
  return tuple(
    None if size == 1 else name for name, size in zip(names, scale_shape)
  )


def _nf4_levels() -> jax.Array:
  codes = jnp.arange(16, dtype=jnp.uint8).astype(jnp.uint4)
  return qwix.dequantize(qwix.QArray(codes, jnp.ones(1), None, "nf4"))


def _spread(scale: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Each scale repeated over its tile."""
  for axis, (count, size) in enumerate(zip(scale.shape, shape)):
    scale = jnp.repeat(scale, size // count, axis)
  return scale
