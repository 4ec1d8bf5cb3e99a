"""`Products`: sees and replaces the products of a model, by way of Qwix."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import opt_einsum.parser
import qwix


class Products(qwix.QuantizationProvider):
  """A provider of Qwix that does not change any product.

  Where the model calls a function of JAX or Flax, Qwix calls the method here
  instead. Inside of a method the functions are JAX's own.
  """

  def __init__(self):
    super().__init__([])

  def get_intercept_map(self) -> dict[str, Callable[..., Any]]:
    return super().get_intercept_map() | {
      "jax.lax.conv_general_dilated": self.conv_general_dilated,
      "jax.lax.dot_general": self.dot_general,
      "jax.numpy.dot": self.dot,
      "jax.numpy.einsum": self.einsum,
    }

  def process_model_inputs(self, model, model_args, model_kwargs):
    # Qwix would count operations here, module by module.
    return model, model_args, model_kwargs

  def dot_general(self, lhs, rhs, *args, **kwargs):
    return jax.lax.dot_general(lhs, rhs, *args, **kwargs)

  def conv_general_dilated(self, lhs, rhs, *args, **kwargs):
    return jax.lax.conv_general_dilated(lhs, rhs, *args, **kwargs)

  def dot(self, a, b, *args, **kwargs):
    return jnp.dot(a, b, *args, **kwargs)

  def einsum(self, subscripts, *operands, **kwargs):
    return jnp.einsum(subscripts, *operands, **kwargs)


def value(operand: Any) -> Any:
  """The array of an operand, which may be an NNX parameter."""
  return operand[...] if isinstance(operand, nnx.Variable) else operand


def dot_as_product(a: Any, b: Any):
  """The dimension numbers of a `jnp.dot`."""
  return ((a.ndim - 1,), (max(b.ndim - 2, 0),)), ((), ())


def einsum_as_product(subscripts: Any, *operands: Any):
  """Converts an einsum of two operands to a `dot_general` and a transpose.

  Returns:
    The dimension numbers and the order of axes, or None if there are none.
  """
  if len(operands) != 2 or not isinstance(subscripts, str):
    return None
  inputs, out, _ = opt_einsum.parser.parse_einsum_input(
    (subscripts, *(operand.shape for operand in operands)), shapes=True
  )
  lhs, rhs = inputs.split(",")
  shared = [letter for letter in rhs if letter in lhs]
  batch = [letter for letter in shared if letter in out]
  contracted = [letter for letter in shared if letter not in out]
  free = [letter for letter in lhs + rhs if letter not in shared]
  result = [*batch, *free]
  repeats = any(len(set(term)) < len(term) for term in (lhs, rhs))
  if repeats or sorted(result) != sorted(out):
    return None
  dimension_numbers = tuple(
    tuple(tuple(map(term.index, letters)) for term in (lhs, rhs))
    for letters in (contracted, batch)
  )
  return dimension_numbers, tuple(map(result.index, out))
