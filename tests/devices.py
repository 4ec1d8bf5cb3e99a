"""Meshes of the tests, where there are the devices for them."""

import math

import jax
import pytest


def require(count: int) -> None:
  """Skips the test where JAX has fewer devices, as on one GPU."""
  if jax.device_count() < count:
    pytest.skip(f"needs {count} devices, JAX has {jax.device_count()}")


def mesh(**sizes: int) -> jax.sharding.Mesh:
  """A mesh of these axes, which JAX splits without being told."""
  require(math.prod(sizes.values()))
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    (jax.sharding.AxisType.Auto,) * len(sizes),
  )
