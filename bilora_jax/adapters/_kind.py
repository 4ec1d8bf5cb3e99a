"""What all kinds of kernels' adapters share: how one is made, and drawn."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Kind: TypeAlias = Callable[[jax.Array, jax.Array], Any]
"""From a random key and a kernel `(*batch, in, out)` to a node."""


def uniform(key: jax.Array, shape: Sequence[int], size_in: int) -> jax.Array:
  """Uniform in `+-1/sqrt(size_in)`, as LoRA's `a`: float32."""
  bound = max(size_in, 1) ** -0.5
  return bound * jax.random.uniform(key, shape, jnp.float32, -1, 1)


def check_rank(rank: int) -> None:
  """Refuses a rank below 1."""
  if rank < 1:
    raise ValueError(f"rank is an integer of at least 1; got {rank}.")
