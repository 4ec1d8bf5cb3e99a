"""Initialisations at zero, with other distributions than LoRA's uniform one."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilora_jax import _partition
from bilora_jax._factors import Factors, is_factors


def gaussian(key: jax.Array, adapters: Mapping[str, Any]) -> dict[str, Any]:
  r"""Gaussian initialisation: :math:`A_{ij} \sim N(0, 1 / r^2)` and B = 0.

  The distribution is that of PEFT's `init_lora_weights="gaussian"`. Primary and
  auxiliary draw from different keys.

  Args:
    key: a JAX random key.
    adapters: from `adapted.init`; only shapes and scales of the pairs matter.

  Returns:
    The adapters with new pairs and an unchanged `extra`.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bilora_jax import Factors
    >>> from bilora_jax.initializers import gaussian
    >>> pair = Factors(jnp.ones((3, 2)), jnp.ones((2, 4)), scale=2.0)
    >>> print(gaussian(jax.random.key(0), {'primary': {'w': pair}})
    ...   ['primary']['w'].weight().sum())
    0.0
  """

  def draw(key, pair):
    return jax.random.normal(key, pair.a.shape, jnp.float32) / pair.rank

  return _drawn(key, adapters, draw)


def orthogonal(key: jax.Array, adapters: Mapping[str, Any]) -> dict[str, Any]:
  r"""Orthogonal initialisation: :math:`A A^\top = I / 3` and B = 0.

  A is uniformly distributed among matrices with orthogonal rows. The rows have
  the root-mean-square length of LoRA's rows, whose entries are uniform in
  :math:`\pm 1 / \sqrt{n}`. If the rank is above the weight's input size, the
  columns are orthogonal instead, with the same length.

  Args:
    key: a JAX random key.
    adapters: from `adapted.init`; only shapes and scales of the pairs matter.

  Returns:
    The adapters with new pairs and an unchanged `extra`.

  References:
    Saxe et al, `Exact solutions to the nonlinear dynamics of learning in deep
    linear neural networks <https://arxiv.org/abs/1312.6120>`_, 2013.
  """
  draw = jax.nn.initializers.orthogonal(scale=3**-0.5)

  def draws(key, pair):
    *batch, size_in, rank = pair.a.shape
    keys = jax.random.split(key, tuple(batch))
    one = lambda k: draw(k, (size_in, rank), jnp.float32)  # noqa: E731
    for _ in batch:
      one = jax.vmap(one)
    return one(keys)

  return _drawn(key, adapters, draws)


def _drawn(
  key: jax.Array, adapters: Mapping[str, Any], draw: Any
) -> dict[str, Any]:
  _partition.check_parts(adapters)
  new = dict(adapters)
  for part, part_key in zip(("primary", "auxiliary"), jax.random.split(key)):
    if part not in adapters:
      continue
    tree = adapters[part]
    # The tree with one leaf in place of each pair.
    bare = jax.tree.map(lambda _: 0, tree, is_leaf=is_factors)
    keys = optax.tree.split_key_like(part_key, bare)
    new[part] = jax.tree.map(
      lambda pair, key: Factors(
        draw(key, pair), jnp.zeros_like(pair.b), pair.scale
      ),
      tree,
      keys,
      is_leaf=is_factors,
    )
  return new
