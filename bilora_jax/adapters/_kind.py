"""Functions that all kinds of adapters of kernels share."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Kind: TypeAlias = Callable[[jax.Array, jax.Array], Any]
"""A function from a random key and a kernel `(*batch, in, out)` to a node."""


def uniform(key: jax.Array, shape: Sequence[int], size_in: int) -> jax.Array:
  """Draws uniformly from `+-1/sqrt(size_in)`, as for LoRA's `a`, in float32."""
  bound = max(size_in, 1) ** -0.5
  return bound * jax.random.uniform(key, shape, jnp.float32, -1, 1)


def check_rank(rank: int) -> None:
  """Refuses a rank below 1."""
  if rank < 1:
    raise ValueError(f"rank is an integer of at least 1; got {rank}.")
