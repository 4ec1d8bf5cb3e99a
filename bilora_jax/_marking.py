"""Marks a model's products while it is traced abstractly."""

import inspect
import json
import os
from typing import Any

from flax import linen as nn
from flax import nnx
import jax
from jax import ad_checkpoint, core
import jax.numpy as jnp

from bilora_jax import _products

MARK = "bilora_jax product "
"""Beginning of the name of a marked product; its axes follow, in JSON."""

# Methods of `flax.linen.Module` that enter a model.
_ENTRIES = ("apply", "init_with_output")
# The file of JAX whose frames show a jitted function.
_PJIT = os.path.join(os.path.dirname(jax.__file__), "_src", "pjit.py")


class Finder(_products.Products):
  """Marks the second operand of each product, with the product's axes.

  Products in jitted functions have no mark, because JAX caches their traces.
  """

  def get_intercept_map(self):
    return super().get_intercept_map() | {
      "flax.linen.Module.param": self.nn_param,
    }

  def nn_param(self, module, name, *args, **kwargs):
    # `Module.param` traces the initializer for its shape, as slowly as init.
    stored = module.get_variable("params", name)
    return module.param(name, *args, **kwargs) if stored is None else stored

  def dot_general(self, lhs, rhs, dimension_numbers, *args, **kwargs):
    lhs, rhs = map(_products.value, (lhs, rhs))
    rhs = _marked(lhs, rhs, dimension_numbers)
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)

  def dot(self, a, b, *args, **kwargs):
    a, b = map(_products.value, (a, b))
    if min(jnp.ndim(a), jnp.ndim(b)) > 0:
      b = _marked(a, b, _products.dot_as_product(a, b))
    return jnp.dot(a, b, *args, **kwargs)

  def einsum(self, subscripts, *operands, **kwargs):
    operands = tuple(map(_products.value, operands))
    product = _products.einsum_as_product(subscripts, *operands)
    if product is not None:
      lhs, rhs = operands
      operands = lhs, _marked(lhs, rhs, product[0])
    return jnp.einsum(subscripts, *operands, **kwargs)

  def conv_general_dilated(
    self,
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count=1,
    batch_group_count=1,
    **kwargs,
  ):
    lhs, rhs = map(_products.value, (lhs, rhs))
    numbers = jax.lax.conv_dimension_numbers(
      lhs.shape, rhs.shape, dimension_numbers
    )
    last = rhs.ndim - 1
    # In a grouped convolution, the groups would have to divide the rank, and
    # the adapter would not be a product of two factors.
    if (
      feature_group_count == batch_group_count == 1
      and numbers.rhs_spec[0] == numbers.out_spec[1] == last
    ):
      axes = (((), tuple(range(last))), ((), ()))
      rhs = _marked(lhs, rhs, axes, convolution=True)
    return jax.lax.conv_general_dilated(
      lhs,
      rhs,
      window_strides,
      padding,
      lhs_dilation,
      rhs_dilation,
      dimension_numbers,
      feature_group_count,
      batch_group_count,
      **kwargs,
    )


def _marked(lhs: Any, rhs: Any, axes: Any, convolution: bool = False) -> Any:
  """The second operand of a product, with a mark in the traced program."""
  if not isinstance(rhs, core.Tracer) or rhs.ndim < 2 or _in_jitted_function():
    return rhs
  (_, contracted), (_, batch) = axes
  note = {
    "shape": rhs.shape,
    "batch": tuple(map(int, batch)),
    "contracted": tuple(map(int, contracted)),
    "convolution": convolution,
    "dtype": jnp.result_type(lhs).name,
  }
  return ad_checkpoint.checkpoint_name(rhs, MARK + json.dumps(note))


def _in_jitted_function() -> bool:
  """Whether JAX is tracing a jitted function that the model called.

  A jitted method of an NNX module does not count: its trace belongs to the
  module.
  """
  frame = inspect.currentframe()
  jitted = False
  while frame is not None:
    module = frame.f_locals.get("self")
    if isinstance(module, nnx.Module) or (
      isinstance(module, nn.Module) and frame.f_code.co_name in _ENTRIES
    ):
      return jitted
    jitted |= frame.f_code.co_filename == _PJIT
    frame = frame.f_back
  return False
