"""Adapted weights inside of a model's layers.

A model holds a `StandIn` in place of an array. `StandInProducts` multiplies by
the weight that it stands for: a float or quantised kernel plus a low-rank pair,
with or without scaled outputs.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any, NoReturn

from flax.linen import dtypes as linen_dtypes
import jax
import jax.numpy as jnp

from bilora_jax import _explicit, _products, _quantised
from bilora_jax._factors import Factors
from bilora_jax._site import Site


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["array", "pair", "gain", "key"],
  meta_fields=["site", "dtype", "dropout", "order"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class StandIn:
  """An adapted weight, in place of an array in a model's layers.

  It stands for a float array that a layer may cast and multiply by. All its
  arrays have the scanned axes first, so that scans and maps slice them alike.

  Attributes:
    array: the kernel, float or quantised.
    pair: the pair that is added to the kernel, in the dtype of its computation;
      None for no pair.
    gain: `(*batch, out)` float32, the factor of each output, including the
      pair's part; None for no factor.
    key: key for dropout at the input of the pair, `(*scanned,)`; None for no
      dropout.
    site: the weight's site.
    dtype: dtype of the array that it stands for.
    dropout: the dropout rate, if there is a key.
    order: for each axis, its index in the array, after a model has transposed
      it; None for all axes in order.
  """

  array: Any
  pair: Factors | None
  gain: Any
  key: Any
  site: Site
  dtype: Any
  dropout: float
  order: tuple[int, ...] | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    sizes = self.array.shape
    return tuple(sizes[i] for i in self.order) if self.order else sizes

  @property
  def ndim(self) -> int:
    return len(self.shape)

  def astype(self, dtype: Any) -> "StandIn":
    array = self.array
    if not _quantised.is_quantised(array):
      array = array.astype(dtype)
    return dataclasses.replace(self, array=array, dtype=jnp.dtype(dtype))

  @property
  def T(self) -> "StandIn":
    return self.transpose()

  def transpose(self, *axes: Any) -> "StandIn":
    return self.permuted(lambda x: x.transpose(*axes))

  def permuted(self, function: Any) -> "StandIn":
    """Permutes the axes as a function permutes those of arrays."""
    if self._leading_axes:
      self._refuse()
    order = self.order or range(self.ndim)
    # Different sizes identify the axes after the function.
    named = jax.ShapeDtypeStruct(tuple(1 + i for i in order), self.dtype)
    sizes = jax.eval_shape(function, named).shape
    return dataclasses.replace(self, order=tuple(size - 1 for size in sizes))

  def __getitem__(self, index: Any) -> "StandIn":
    if index is ...:  # reads an NNX parameter
      return self
    if jnp.ndim(index) or not self._leading_axes or self.order:
      self._refuse()
    if isinstance(index, int) and not -len(self) <= index < len(self):
      raise IndexError(index)  # ends a `for` loop
    return jax.tree.map(lambda x: x[index], self)

  def __len__(self) -> int:
    return self.shape[0]

  @property
  def _leading_axes(self) -> int:
    """The number of axes that are not yet scanned, mapped or indexed."""
    return self.site.scanned - (len(self.site.shape) - self.ndim)

  @property
  def __jax_array__(self) -> Any:
    # Some JAX functions, as `jax.typeof`, read this attribute without a call.
    self._refuse()

  def _refuse(self) -> NoReturn:
    raise ValueError(
      f"the adapted weight {'/'.join(self.site.path)}, here of shape "
      f"{self.shape}, can only be cast, transposed, and used in dot_general, "
      "dot, einsum or a convolution. Leave its module out with "
      "LoraSpec(exclude=...)."
    )

  def dropped(self, x: jax.Array) -> jax.Array:
    """Applies dropout to the input of the pair."""
    if self.key is None:
      return x
    kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
    return jnp.where(kept, x / (1 - self.dropout), jnp.zeros_like(x))

  def check_use(self, batch: Sequence[int], contracted: Sequence[int]) -> None:
    """Refuses a product along other axes than those of the pair."""
    order = self.order or range(self.ndim)
    if not self.site.is_used(
      [order[i] for i in batch], [order[i] for i in contracted]
    ):
      raise ValueError(
        f"a product contracts the axes {tuple(contracted)} of the adapted "
        f"weight {'/'.join(self.site.path)}, but did not when adapt traced the "
        "model. Give adapt inputs and methods with the same product, or leave "
        "its module out with LoraSpec(exclude=...)."
      )


_TRANSPOSES = (
  (jax.lax, "transpose"),
  (jnp, "matrix_transpose"),
  (jnp, "moveaxis"),
  (jnp, "permute_dims"),
  (jnp, "swapaxes"),
  (jnp, "transpose"),
)


class StandInProducts(_products.Products):
  """Multiplies by a `StandIn` as by the float array that it stands for.

  The backward pass dequantises kernels again, so that no float kernel is kept.
  """

  def get_intercept_map(self):
    return super().get_intercept_map() | {
      "jax.lax.with_sharding_constraint": self.with_sharding_constraint,
      "jax.numpy.asarray": self.asarray,
      "jax.numpy.astype": self.asarray,
      "flax.linen.Module.param": self.nn_param,
      "flax.linen.dtypes.promote_dtype": self.promote_dtype,
      "flax.nnx.nn.dtypes.promote_dtype": self.promote_dtype,
      **{
        f"{module.__name__}.{name}": _of_stand_ins(getattr(module, name))
        for module, name in _TRANSPOSES
      },
    }

  def dot_general(
    self,
    lhs,
    rhs,
    dimension_numbers,
    precision=None,
    preferred_element_type=None,
    **kwargs,
  ):
    lhs, weight = map(_products.value, (lhs, rhs))
    args = (dimension_numbers, precision, preferred_element_type)
    if not isinstance(weight, StandIn):
      return jax.lax.dot_general(lhs, weight, *args, **kwargs)
    (contracted_in, contracted), (batch_in, batch) = dimension_numbers
    weight.check_use(batch, contracted)
    result = _multiplied(
      lambda kernel: jax.lax.dot_general(lhs, kernel, *args, **kwargs), weight
    )
    sizes, pair = weight.shape, weight.pair
    outputs = [
      size for i, size in enumerate(sizes) if i not in (*contracted, *batch)
    ]
    if pair is not None:
      batch_sizes = [sizes[i] for i in batch]
      first = tuple(range(len(batch)))
      summed = tuple(range(len(batch), len(batch) + len(contracted)))
      rows = set(range(lhs.ndim)) - {*batch_in, *contracted_in}
      hidden = jax.lax.dot_general(
        weight.dropped(lhs),
        pair.a.reshape(
          *batch_sizes, *(sizes[i] for i in contracted), pair.rank
        ),
        ((contracted_in, summed), (batch_in, first)),
        precision=precision,
        out_sharding=_explicit.out_sharding(lhs, *batch_in, *rows, None),
      )
      delta = jax.lax.dot_general(
        hidden,
        pair.b.reshape(*batch_sizes, pair.rank, *outputs),
        (((hidden.ndim - 1,), (len(batch),)), (first, first)),
        precision=precision,
        **kwargs,
      )
      result += delta * pair.scale
    result = _scaled(result, weight, len(batch), outputs)
    # Adapters may compute in more bits than their layer; the output may not.
    return result.astype(
      preferred_element_type or jnp.result_type(lhs, weight.dtype)
    )

  def dot(self, a, b, *args, **kwargs):
    a, b = map(_products.value, (a, b))
    if not isinstance(b, StandIn):
      return jnp.dot(a, b, *args, **kwargs)
    a, b = self.promote_dtype(a, b)
    return self.dot_general(
      a, b, _products.dot_as_product(a, b), *args, **kwargs
    )

  def einsum(self, subscripts, *operands, **kwargs):
    operands = tuple(map(_products.value, operands))
    if not any(isinstance(x, StandIn) for x in operands):
      return jnp.einsum(subscripts, *operands, **kwargs)
    product = _products.einsum_as_product(subscripts, *operands)
    if product is None or not isinstance(operands[1], StandIn):
      return jnp.einsum(subscripts, *map(jnp.asarray, operands), **kwargs)
    dimension_numbers, order = product
    lhs, rhs = self.promote_dtype(*operands)
    result = self.dot_general(
      lhs,
      rhs,
      dimension_numbers,
      precision=kwargs.get("precision"),
      preferred_element_type=kwargs.get("preferred_element_type"),
      out_sharding=_before(order, kwargs.get("out_sharding")),
    )
    return result.transpose(order)

  def conv_general_dilated(self, lhs, rhs, *args, **kwargs):
    lhs, weight = map(_products.value, (lhs, rhs))
    if not isinstance(weight, StandIn):
      return jax.lax.conv_general_dilated(lhs, weight, *args, **kwargs)
    weight.check_use((), range(weight.ndim - 1))

    def convolved(x, kernel):
      return jax.lax.conv_general_dilated(x, kernel, *args, **kwargs)

    result = _multiplied(lambda kernel: convolved(lhs, kernel), weight)
    pair = weight.pair
    if pair is not None:
      a = pair.a.reshape(*weight.shape[:-1], pair.rank)
      result += convolved(weight.dropped(lhs), a) @ pair.b * pair.scale
    return _scaled(result, weight, 0, weight.shape[-1:])

  def asarray(self, a, dtype=None, *args, **kwargs):
    if not isinstance(a, StandIn):
      return jnp.asarray(a, dtype, *args, **kwargs)
    return a if dtype is None else a.astype(dtype)

  def with_sharding_constraint(self, x, shardings, *args, **kwargs):
    def constrained(array):
      return jax.lax.with_sharding_constraint(array, shardings, *args, **kwargs)

    if not isinstance(x, StandIn):
      return constrained(x)
    # A quantised kernel may have too few scales for this sharding.
    if _quantised.is_quantised(x.array) or x.order:
      return x
    return dataclasses.replace(x, array=constrained(x.array))

  def nn_param(self, module, name, *args, **kwargs):
    stored = module.get_variable("params", name)
    if isinstance(stored, StandIn):
      return stored
    return module.param(name, *args, **kwargs)

  def promote_dtype(self, *args, **kwargs):
    values = args[0] if isinstance(args[0], Sequence) else args
    promoted = linen_dtypes.promote_dtype(
      *(
        jnp.zeros((), x.dtype) if isinstance(x, StandIn) else x for x in values
      ),
      **kwargs,
    )
    return [
      x.astype(y.dtype) if isinstance(x, StandIn) else y
      for x, y in zip(values, promoted)
    ]


def _before(order: Sequence[int], out_sharding: Any) -> Any:
  """The sharding of an einsum's product before its axes are put in order."""
  if out_sharding is None:
    return None
  spec = getattr(out_sharding, "spec", out_sharding)
  names = [*spec, *(None,) * (len(order) - len(spec))]
  return jax.sharding.PartitionSpec(
    *(names[order.index(axis)] for axis in range(len(order)))
  )


def _of_stand_ins(function: Any) -> Any:
  """Lets a function that transposes arrays transpose stand-ins too."""

  def transpose(x, *args, **kwargs):
    x = _products.value(x)
    if not isinstance(x, StandIn):
      return function(x, *args, **kwargs)
    return x.permuted(lambda array: function(array, *args, **kwargs))

  return transpose


def _multiplied(multiply: Any, weight: StandIn) -> jax.Array:
  def transposed(array):
    return array.transpose(weight.order) if weight.order else array

  if not _quantised.is_quantised(weight.array):
    return multiply(transposed(weight.array))

  # The backward pass needs the kernel too, and dequantises the codes again.
  @jax.checkpoint
  def product(array):
    kernel = _quantised.dequantise(array).astype(weight.dtype)
    return multiply(transposed(kernel))

  return product(weight.array)


def _scaled(
  result: jax.Array, weight: StandIn, batch: int, sizes: Sequence[int]
) -> jax.Array:
  """Multiplies a product's result by the gain of its weight, if there is one.

  Args:
    result: `(*batch, *rows, *outputs)`.
    weight: the weight of the product.
    batch: number of batch axes.
    sizes: sizes of the output axes.
  """
  if weight.gain is None:
    return result
  rows = (1,) * (result.ndim - batch - len(sizes))
  gain = weight.gain.reshape(*result.shape[:batch], *rows, *sizes)
  # In float32, as half precision would round small changes of a gain near 1.
  return (result.astype(jnp.float32) * gain).astype(result.dtype)
