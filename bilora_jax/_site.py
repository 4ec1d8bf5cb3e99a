"""`Site`: a weight that can have adapters, and its axes."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax

from bilora_jax import _quantised

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Site:
  """A weight, and how its layer multiplies by it.

  Attributes:
    path: path of the weight, as `('layers', 'query', 'kernel')`.
    shape: shape of the weight, with leading scanned axes.
    scanned: number of leading axes that are scanned or mapped over, as layers.
    batch: batch axes of the weight, as experts.
    contracted: axes of the weight that the product sums over.
    remaining: axes of the weight that become axes of the output.
    convolution: whether the layer is a convolution.
    dtype: dtype in which the layer computes.
  """

  path: Path
  shape: tuple[int, ...]
  scanned: int
  batch: tuple[int, ...]
  contracted: tuple[int, ...]
  remaining: tuple[int, ...]
  convolution: bool
  dtype: Any

  @property
  def outer_shape(self) -> tuple[tuple[int, ...], int, int]:
    """`(*batch)`, `in` and `out` of the pair that adapts this weight."""
    return (
      self._sizes((*range(self.scanned), *self.batch)),
      math.prod(self._sizes(self.contracted)),
      math.prod(self._sizes(self.remaining)),
    )

  def is_used(self, batch: Sequence[int], contracted: Sequence[int]) -> bool:
    """Whether this weight's product has these axes, without scanned axes."""
    return (self.batch, self.contracted) == (
      tuple(self.scanned + axis for axis in batch),
      tuple(self.scanned + axis for axis in contracted),
    )

  def kernel(self, weight: jax.Array) -> jax.Array:
    """Converts a weight `(*batch, in, out)` to the axes of the kernel."""
    order = self._order
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return weight.reshape(self._sizes(order)).transpose(inverse)

  def matrices(self, kernel: jax.Array) -> jax.Array:
    """Undoes `kernel`: the kernel as `(*batch, in, out)`."""
    batch, size_in, size_out = self.outer_shape
    return kernel.transpose(self._order).reshape(*batch, size_in, size_out)

  def tiles(self, tile_size: int | None) -> tuple[int, ...]:
    """Sizes of the kernel's tiles, as `_quantised.tile_sizes` cuts them."""
    sizes = _quantised.tile_sizes(self._sizes(self.contracted), tile_size)
    along = dict(zip(self.contracted, sizes))
    return tuple(along.get(axis, 1) for axis in range(len(self.shape)))

  @property
  def _order(self) -> tuple[int, ...]:
    """The kernel's axes, in the order of batch, `in` and `out`."""
    batch = (*range(self.scanned), *self.batch)
    return (*batch, *self.contracted, *self.remaining)

  def _sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(self.shape[axis] for axis in axes)
