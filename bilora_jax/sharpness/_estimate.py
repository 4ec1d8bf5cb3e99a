"""Means over random draws, with their standard errors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Estimate(NamedTuple):
  """The mean of independent draws.

  Attributes:
    mean: mean of the draws, float32 scalar.
    standard_error: standard error of the mean: the draws' standard deviation
      (with Bessel's correction) over the square root of their number, float32
      scalar.
  """

  mean: jax.Array
  standard_error: jax.Array


def estimate(draws: jax.Array) -> Estimate:
  """The estimate from draws `[n]`."""
  return Estimate(
    jnp.mean(draws), jnp.std(draws, ddof=1) / jnp.sqrt(draws.shape[0])
  )
