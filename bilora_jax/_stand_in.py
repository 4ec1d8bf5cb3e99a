"""Adapted weights, where a layer multiplies by them.

A model holds a `StandIn` where it expects an array; `StandInProducts`
multiplies by what it stands for: a kernel of floats or of few bits, plus a
low-rank pair, its outputs scaled or not.
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
  """A weight as the layers of a model have it.

  It stands for a float array that a layer may cast and multiply by. Its arrays
  have the scanned axes first, so that scans and maps slice them all alike.

  Attributes:
    array: the kernel, of floats or quantised.
    pair: what is added to it, in the dtype that it is computed in; None for
      nothing.
    gain: `(*batch, out)` float32, what each output is multiplied by, the
      pair's part included; None for nothing.
    key: for dropout at the input of the pair, `(*scanned,)`; None for none.
    site: the weight.
    dtype: that of the array it stands for.
    dropout: the rate, where there is a key.
    order: which axis of the array each of its axes is, where a model has
      transposed it; None for all in order.
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
    """With its axes in the order that a function puts those of arrays in."""
    if self._leading_axes:
      self._refuse()
    order = self.order or range(self.ndim)
    # Sizes by which the axes are known again.
    named = jax.ShapeDtypeStruct(tuple(1 + i for i in order), self.dtype)
    sizes = jax.eval_shape(function, named).shape
    return dataclasses.replace(self, order=tuple(size - 1 for size in sizes))

  def __getitem__(self, index: Any) -> "StandIn":
    if index is ...:  # so parameters of NNX are read
      return self
    if jnp.ndim(index) or not self._leading_axes or self.order:
      self._refuse()
    if isinstance(index, int) and not -len(self) <= index < len(self):
      raise IndexError(index)  # which ends a `for`
    return jax.tree.map(lambda x: x[index], self)

  def __len__(self) -> int:
    return self.shape[0]

  @property
  def _leading_axes(self) -> int:
    """How many axes are left to be scanned, mapped or indexed."""
    return self.site.scanned - (len(self.site.shape) - self.ndim)

  @property
  def __jax_array__(self) -> Any:
    # Some of JAX, as `jax.typeof`, asks for it and does not call it.
    self._refuse()

  def _refuse(self) -> NoReturn:
    raise ValueError(
      f"the adapted weight {'/'.join(self.site.path)}, here of shape "
      f"{self.shape}, can be cast, transposed and multiplied by, by "
      "dot_general, dot, einsum or a convolution, and nothing else. Leave its "
      "module out with LoraSpec(exclude=...)."
    )

  def dropped(self, x: jax.Array) -> jax.Array:
    """The input of the pair, some of it dropped and the rest scaled."""
    if self.key is None:
      return x
    kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
    return jnp.where(kept, x / (1 - self.dropout), jnp.zeros_like(x))

  def check_use(self, batch: Sequence[int], contracted: Sequence[int]) -> None:
    """Refuses a product of other axes than the pair is made for."""
    order = self.order or range(self.ndim)
    if not self.site.is_used(
      [order[i] for i in batch], [order[i] for i in contracted]
    ):
      raise ValueError(
        f"the adapted weight {'/'.join(self.site.path)} is multiplied by along "
        f"its axes {tuple(contracted)} here, and was not where adapt traced "
        "the model. Give adapt inputs and methods that use it so, or leave "
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
  """Multiplies by a `StandIn` as by the float array it stands for.

  Quantised kernels become floats again in the backward pass: none is kept.
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
    # Adapters may compute in more bits than their layer, that is not to show.
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
    # Of quantised kernels the scales may be too few for it.
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
  """How an einsum's product is split before its axes are put in order."""
  if out_sharding is None:
    return None
  spec = getattr(out_sharding, "spec", out_sharding)
  names = [*spec, *(None,) * (len(order) - len(spec))]
  return jax.sharding.PartitionSpec(
    *(names[order.index(axis)] for axis in range(len(order)))
  )


def _of_stand_ins(function: Any) -> Any:
  """A function that transposes arrays, which transposes stand-ins too."""

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

  # The backward pass needs the kernel too: it reads the codes again.
  @jax.checkpoint
  def product(array):
    kernel = _quantised.dequantise(array).astype(weight.dtype)
    return multiply(transposed(kernel))

  return product(weight.array)


def _scaled(
  result: jax.Array, weight: StandIn, batch: int, sizes: Sequence[int]
) -> jax.Array:
  """A product's result with the gain of its weight, if that has one.

  Args:
    result: `(*batch, *rows, *outputs)`.
    weight: what was multiplied by.
    batch: how many axes are batched over.
    sizes: of the outputs' axes.
  """
  if weight.gain is None:
    return result
  rows = (1,) * (result.ndim - batch - len(sizes))
  gain = weight.gain.reshape(*result.shape[:batch], *rows, *sizes)
  # In float32: a gain near 1 would lose what was learned of it.
  return (result.astype(jnp.float32) * gain).astype(result.dtype)
