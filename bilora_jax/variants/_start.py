"""Initialisations of the auxiliary."""

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilora_jax import _norms, _partition
from bilora_jax._factors import Factors, is_factors


def scattered(
  key: jax.Array, adapters: Mapping[str, Any], radius: float
) -> dict[str, Any]:
  r"""Initialises the auxiliary on the sphere, in a random direction.

  Both factors of each pair are Gaussian, with one standard deviation, so that
  every entry of every weight has the same variance. Then all factors are scaled
  by one number, so that

  .. math:: \sum_j \|s_j B_{2,j} A_{2,j}\|_F^2 = \rho^2

  LoRA's initialisation, b = 0, perturbs nothing and is not symmetric: only b
  moves in the first step.

  Args:
    key: random key of the draws.
    adapters: the partition, with an auxiliary, of which only shapes, dtypes and
      scales matter.
    radius: rho, the norm over all pairs, in units of the weights.

  Returns:
    The adapters with a new auxiliary; the other parts do not change.

  Raises:
    ValueError: if radius is not positive and finite, or there is no auxiliary,
      or the auxiliary holds an array outside of a pair.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bilora_jax import Factors
    >>> pair = Factors(jnp.ones((3, 1)), jnp.zeros((1, 2)), scale=2.0)
    >>> adapters = {'primary': {'w': pair}, 'auxiliary': {'w': pair}}
    >>> start = scattered(jax.random.key(0), adapters, radius=0.05)
    >>> print(f"{start['auxiliary']['w'].frobenius_norm():.3f}")
    0.050
  """
  # At radius 0 both factors would be zero, and so would their gradients.
  if not (math.isfinite(radius) and radius > 0):
    raise ValueError(
      "radius, the norm of the new auxiliary, is positive and finite; got "
      f"{radius}."
    )
  _partition.check_parts(adapters)
  if "auxiliary" not in adapters:
    raise ValueError(
      f"there is no auxiliary to scatter; the adapters hold {sorted(adapters)}."
    )
  _norms.pairs(adapters["auxiliary"], user="scattered")

  def draw(pair, key):
    keys = jax.random.split(key)
    # The entries of s a b have variance 1.
    size = math.sqrt(1 / (abs(pair.scale) * math.sqrt(pair.rank)))
    a, b = (
      size * jax.random.normal(k, x.shape)
      for k, x in zip(keys, (pair.a, pair.b))
    )
    return Factors(a, b, pair.scale)

  tree = adapters["auxiliary"]
  keys = optax.tree.split_key_like(key, _leaves_of_pairs(tree))
  drawn = jax.tree.map(draw, tree, keys, is_leaf=is_factors)
  norm, *_ = _norms.norms(drawn)
  factor = jnp.sqrt(radius / norm)
  auxiliary = jax.tree.map(
    lambda new, old: (factor * new).astype(old.dtype), drawn, tree
  )
  return {**adapters, "auxiliary": auxiliary}


def _leaves_of_pairs(tree: Any) -> Any:
  """The tree with one leaf in place of each pair."""
  return jax.tree.map(lambda _: 0, tree, is_leaf=is_factors)
