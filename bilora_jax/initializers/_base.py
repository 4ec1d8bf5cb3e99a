"""Initialisations from matrices: new pairs, and the base without them."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from bilora_jax._adapted import Adapted
from bilora_jax._factors import Factors, is_factors
from bilora_jax._site import Path

Start = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
"""A function from a float32 matrix `(in, out)` and a rank to `a` and `b`."""


def kernels(adapted: Adapted, variables: Any) -> dict[Path, jax.Array]:
  """The adapted kernels, in their stored shapes, by their paths.

  Raises:
    ValueError: if the variables are not the model's, or are not floats.
  """
  params = adapted._parameters(variables, as_floats=True)
  return {path: params[path] for path in adapted._plan.weights}


def check_ranks(name: str, adapted: Adapted, times: int) -> None:
  """Refuses ranks above the number of singular vectors of their weights.

  Args:
    name: name of the initializer, for the message.
    adapted: the model.
    times: the initializer takes `times * rank` singular vectors.

  Raises:
    ValueError: if a weight has too few; the message names every such weight.
  """
  wrong = [
    f"{'/'.join(path)}: rank {x.rank}, sides {size_in} and {size_out}"
    for path, x in adapted._plan.weights.items()
    for _, size_in, size_out in [x.site.outer_shape]
    if times * x.rank > min(size_in, size_out)
  ]
  if wrong:
    raise ValueError(
      f"{name} takes {'the rank' if times == 1 else f'{times} x the rank'} in "
      "singular vectors, and a weight has only as many as its smaller side: "
      f"{'; '.join(wrong)}."
    )


def start_from(
  adapted: Adapted,
  variables: Any,
  adapters: Mapping[str, Any],
  matrices: Mapping[Path, jax.Array],
  start: Start,
  *,
  rescale: bool,
) -> tuple[Any, dict[str, Any]]:
  """Makes new pairs for the primary and subtracts their weights from the base.

  Args:
    adapted: the model.
    variables: the model's, as floats, also if the spec has a `base_dtype`.
    adapters: from `adapted.init`; only the primary changes.
    matrices: the matrix from which each pair is made, by the path of its kernel
      and with the kernel's shape.
    start: function that makes the factors of a matrix.
    rescale: whether `scale * a @ b`, rather than `a @ b`, is the product of the
      factors that `start` returns.

  Returns:
    The new variables and the new adapters.

  Raises:
    ValueError: if variables or adapters are not the model's.
  """
  adapted.check(adapters)
  params = kernels(adapted, variables)
  primary: dict[Any, Any] = traverse_util.flatten_dict(
    adapters["primary"], is_leaf=lambda _, x: is_factors(x)
  )
  pairs, bases = {}, {}
  for path, x in adapted._plan.weights.items():
    one = jax.jit(_over_batches(start, primary[path]), static_argnums=1)
    a, b = one(x.site.matrices(matrices[path]).astype(jnp.float32), x.rank)
    # Both factors take the same share, so that neither is the larger.
    share = abs(x.scale) ** -0.5 if rescale else 1.0
    pairs[path] = Factors(share * a, share * b, x.scale)
    kernel = params[path]
    rest = kernel.astype(jnp.float32) - x.site.kernel(pairs[path].weight())
    bases[path] = rest.astype(kernel.dtype)
  return (
    adapted._host.replace(variables, bases),
    {**adapters, "primary": traverse_util.unflatten_dict(pairs)},
  )


def _over_batches(start: Start, pair: Factors) -> Start:
  for _ in pair.a.shape[:-2]:
    start = jax.vmap(start, in_axes=(0, None))
  return start
