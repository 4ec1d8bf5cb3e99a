"""How the current mesh splits the axes of activations."""

import math

from flax.linen import spmd
import jax


def axes(name: str) -> tuple[str, ...]:
  """Returns the mesh axes that split an axis of this name.

  flax's logical rules decide. Without a mesh there are none, and mesh axes of
  one device are left out.
  """
  (found,) = spmd.logical_to_mesh_axes((name,)) or (None,)
  names = (found,) if isinstance(found, str) else found or ()
  sizes = jax.sharding.get_abstract_mesh().shape
  return tuple(x for x in names if sizes.get(x, 1) > 1)


def parts(name: str) -> int:
  """Returns into how many parts the mesh splits an axis; 1 without a mesh."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes[x] for x in axes(name))
