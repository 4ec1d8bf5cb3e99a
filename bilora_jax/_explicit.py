"""Shardings of products on meshes with Explicit axes.

If a product sums over an axis that is sharded in both operands, JAX needs the
sharding of the result from the program. (On other meshes the compiler infers
it.)
"""

import jax
from jax.sharding import PartitionSpec


def out_sharding(x: jax.Array, *axes: int | None) -> PartitionSpec | None:
  """Derives the sharding of a result from the sharding of an operand.

  Args:
    x: the operand.
    *axes: for each axis of the result, the axis of x with the same sharding;
      None for an axis that is not sharded.

  Returns:
    The sharding, or None if no axis of the mesh is Explicit.
  """
  sharding = jax.typeof(x).sharding
  if not sharding.mesh.explicit_axes:
    return None
  spec = sharding.spec
  return PartitionSpec(*(None if i is None else spec[i] for i in axes))
