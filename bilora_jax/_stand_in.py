"""Weights that stand for others where a layer multiplies by them.

A model holds a `StandIn` where it expects an array; `Products` multiplies by
what it stands for: a quantised kernel, or one whose outputs are scaled.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax.core import meta
import jax
import jax.numpy as jnp
import qwix

from bilora_jax import _quantised


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["array", "gain"],
  meta_fields=["dtype"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class StandIn(meta.AxisMetadata):
  """A weight as the layers of a model have it.

  It stands for a float array that a layer may cast and multiply by. For Flax it
  is a box of the array, or of the codes: by these Qwix finds which parameter it
  is.

  Attributes:
    array: the kernel, of floats or quantised.
    dtype: that of the array it stands for.
    gain: `(*batch, out)` float32, what each output is multiplied by, adapters'
      part included; None for nothing.
  """

  array: Any
  dtype: Any
  gain: Any = None

  @property
  def shape(self) -> tuple[int, ...]:
    return self.array.shape

  @property
  def ndim(self) -> int:
    return len(self.shape)

  def astype(self, dtype: Any) -> "StandIn":
    return dataclasses.replace(self, dtype=jnp.dtype(dtype))

  def __getitem__(self, index: Any) -> "StandIn":
    # So parameters of NNX are read.
    return self if index is ... else self.__jax_array__()

  def __jax_array__(self) -> Any:
    raise ValueError(
      f"a quantised weight, or one with DoRA, here of shape {self.shape}, "
      "can be multiplied by, by dot_general, dot, einsum or a convolution, "
      "and nothing else. Leave its module out with LoraSpec(exclude=...), or "
      "set base_dtype=None and dora=False."
    )

  def unbox(self) -> jax.Array:
    array = self.array
    return array.qvalue if _quantised.is_quantised(array) else array

  def replace_boxed(self, val: Any) -> Any:
    return val

  def add_axis(self, index: int, params: dict[Any, Any]) -> "StandIn":
    return self

  def remove_axis(self, index: int, params: dict[Any, Any]) -> "StandIn":
    return self


class Products(qwix.PtqProvider):
  """Multiplies by a `StandIn` as by the float array it stands for.

  By itself Qwix 0.1.8 would, with quantised kernels, drop the precision that a
  layer asks for, compute in the scales' dtype, keep the float kernels for the
  backward pass, and refuse convolutions.
  """

  _weight: StandIn | None = None

  def known(self, rhs: Any) -> Any:
    """What Qwix finds the parameter of `rhs` by; for the next product."""
    if not isinstance(rhs, StandIn):
      return rhs
    self._weight = rhs
    return rhs.unbox()

  def dot_general(self, lhs, rhs, *args, **kwargs):
    return self._product(super().dot_general, lhs, rhs, args, kwargs)

  def conv_general_dilated(self, lhs, rhs, *args, **kwargs):
    return self._product(super().conv_general_dilated, lhs, rhs, args, kwargs)

  def nn_param(self, module, name, *args, **kwargs):
    stored = module.get_variable("params", name)
    if isinstance(stored, StandIn):
      return stored
    return super().nn_param(module, name, *args, **kwargs)

  def promote_dtype(self, *args, **kwargs):
    values = args[0] if isinstance(args[0], Sequence) else args
    promoted = super().promote_dtype(
      *(
        jnp.zeros((), x.dtype) if isinstance(x, StandIn) else x for x in values
      ),
      **kwargs,
    )
    return [
      x.astype(y.dtype) if isinstance(x, StandIn) else y
      for x, y in zip(values, promoted)
    ]

  def _product(self, multiply, lhs, rhs, args, kwargs):
    weight, self._weight = self._weight, None
    if weight is None:
      return multiply(lhs, rhs, *args, **kwargs)
    if not _quantised.is_quantised(weight.array):
      return multiply(lhs, weight.array.astype(weight.dtype), *args, **kwargs)

    # The backward pass needs the kernel too: it reads the codes again.
    @jax.checkpoint
    def product(lhs, array):
      kernel = _quantised.dequantise(array).astype(weight.dtype)
      return multiply(lhs, kernel, *args, **kwargs)

    return product(lhs, weight.array)


def scaled(
  result: jax.Array, rhs: Any, batch: int, sizes: Sequence[int]
) -> jax.Array:
  """A product's result with the gain of its weight, if that has one.

  Args:
    result: `(*batch, *rows, *outputs)`.
    rhs: what was multiplied by.
    batch: how many axes are batched over.
    sizes: of the outputs' axes.
  """
  if not isinstance(rhs, StandIn) or rhs.gain is None:
    return result
  rows = (1,) * (result.ndim - batch - len(sizes))
  gain = rhs.gain.reshape(*result.shape[:batch], *rows, *sizes)
  # In float32: a gain near 1 would lose what was learned of it.
  return (result.astype(jnp.float32) * gain).astype(result.dtype)
