"""Kernels of 4 or 8 bits: quantise, dequantise and shard them.

Users see a `qwix.QArray` with codes, in the kernel's shape, and float32 scales,
one for each tile of the kernel. Layers see a `StandIn`.
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

# By default Qwix maps the largest magnitude to 127.5, which int8 does not have.
_CALIBRATION = {"int8": f"absmax,{127.5 / 127}"}
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)

QTYPES = {"nf4": "nf4", "int8": "int8", "fp8": "float8_e4m3fn"}
"""Names in a spec -> names in Qwix."""


def tile_sizes(sizes: Sequence[int], tile_size: int | None) -> tuple[int, ...]:
  """Cuts the axes that a kernel's product sums over into tiles.

  Args:
    sizes: sizes of these axes.
    tile_size: wanted number of weights in a tile; None for all weights.

  Returns:
    Sizes of a tile along the axes. The last axes are filled first, each by the
    largest divisor of its size that fits. If the tile has under half of
    `tile_size` weights, it spans all of the axes instead.
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
  """The storage of a quantised kernel.

  Attributes:
    base_dtype: one of `QTYPES`.
    tiles: the size of a tile along each axis of the kernel.
  """

  base_dtype: str
  tiles: tuple[int, ...]

  def __str__(self) -> str:
    return f"{self.base_dtype} in tiles of {'x'.join(map(str, self.tiles))}"

  def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """The number of tiles along each axis of a kernel of this shape."""
    return tuple(size // tile for size, tile in zip(shape, self.tiles))

  def array(self, codes: Any, scale: Any) -> qwix.QArray:
    """A kernel of these codes and scales, arrays or other leaves."""
    return qwix.QArray(codes, scale, None, QTYPES[self.base_dtype])


def form_of(leaf: Any) -> str:
  """The storage of a parameter in words: a `Form` as text, or `floats`."""
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
  """Quantises a kernel by the largest magnitude of each tile.

  Args:
    kernel: a float kernel.
    form: storage of the result.
    shardings: shardings of the codes and the scales; None to leave them to XLA.
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
    # Qwix needs 8 bytes of memory for each weight to find the nearest level,
    # and flattens the array, which a mesh would have to gather.
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
  """The float32 kernel of a quantised array."""
  if array.qtype != "nf4":
    return qwix.dequantize(array)
  # Without Qwix, for the same reason as in `quantise`.
  levels = _nf4_levels().at[array.qvalue.astype(jnp.int32)]
  spread = _spread(array.scale, array.shape)
  return levels.get(mode="promise_in_bounds") * spread


def shardings(
  sharding: Any, shape: Sequence[int], form: Form
) -> tuple[Any, Any] | None:
  """Shardings of a kernel's codes and scales; None if it is not on a mesh."""
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
  """Names of the scales' axes: the kernel's, but None for axes of size 1."""
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
