"""How the mesh that there is splits the axes of activations."""

import math

from flax.linen import spmd
import jax


def axes(name: str) -> tuple[str, ...]:
  """The mesh axes that an axis of this name is split over.

  They are those of flax's logical rules. There are none without a mesh, and
  none that has one device.
  """
  (found,) = spmd.logical_to_mesh_axes((name,)) or (None,)
  names = (found,) if isinstance(found, str) else found or ()
  sizes = jax.sharding.get_abstract_mesh().shape
  return tuple(x for x in names if sizes.get(x, 1) > 1)


def parts(name: str) -> int:
  """How many parts an axis of this name is split into; 1 without a mesh."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes[x] for x in axes(name))
