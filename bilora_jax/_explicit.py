"""Products on meshes whose axes are Explicit: there JAX asks for the result's.

Of a product that sums over an axis that both operands split, the program has to
say how the result is split. (On other meshes the compiler finds it out.)
"""

import jax
from jax.sharding import PartitionSpec


def out_sharding(x: jax.Array, *axes: int | None) -> PartitionSpec | None:
  """How to split a result as an operand is.

  Args:
    x: the operand.
    axes: for each axis of the result the axis of x that it is split as; None
      for a whole one.

  Returns:
    None where no axis of the mesh is Explicit.
  """
  sharding = jax.typeof(x).sharding
  if not sharding.mesh.explicit_axes:
    return None
  spec = sharding.spec
  return PartitionSpec(*(None if i is None else spec[i] for i in axes))
