"""The partition of the trained parameters: primary, auxiliary and extra."""

from collections.abc import Mapping
import functools
import math
from typing import Any

import jax
import optax

PARTS = ("primary", "auxiliary", "extra")


def check_parts(adapters: Any) -> None:
  """Refuses a tree whose top level is not the partition.

  Raises:
    ValueError: if `adapters` is not a mapping, holds other parts than
      `primary`, `auxiliary` and `extra`, or has no `primary`.
  """
  if not isinstance(adapters, Mapping):
    raise ValueError(
      "adapters are a dict with the parts 'primary', 'auxiliary' and, if "
      f"anything else is trained, 'extra'; got a {type(adapters).__name__}."
    )
  unknown = sorted(set(adapters) - set(PARTS))
  if unknown or "primary" not in adapters:
    raise ValueError(
      "adapters hold 'primary', and may hold 'auxiliary' and 'extra'; got "
      f"{sorted(adapters)}."
    )


def without_auxiliary(adapters: Any) -> dict[str, Any]:
  """Drops the auxiliary, to evaluate, merge or keep the trained adapters.

  Args:
    adapters: `{'primary': ..., 'auxiliary': ..., 'extra': ...}`, the last two
      optional.

  Returns:
    The same leaves without the part `auxiliary`.

  Examples:
    >>> without_auxiliary({'primary': 1, 'auxiliary': 2, 'extra': 3})
    {'primary': 1, 'extra': 3}
  """
  check_parts(adapters)
  return {part: tree for part, tree in adapters.items() if part != "auxiliary"}


primary = without_auxiliary
"""A shorter name of `without_auxiliary`."""


def is_placeholder(params: Any) -> bool:
  """Whether params is the placeholder that `optax.tree.map_params` passes."""
  return isinstance(params, _placeholder())


@functools.cache
def _placeholder() -> type:
  seen = []

  def init(params):
    seen.append(type(params))
    return ()

  optax.tree.map_params(init, lambda x: x, ())
  return seen[0]


def labels(adapters: Mapping[str, Any]) -> dict[str, str]:
  """Labels for `optax.partition`: parts that descend the loss, and that climb.

  `primary` and `extra` share one label, so that their optimizer sees the same
  parameters as in plain LoRA: a global-norm clip inside it spans both.

  Returns:
    A prefix tree, `{'primary': 'primary', 'auxiliary': 'auxiliary',
    'extra': 'primary'}`, without the parts that are missing.
  """
  if is_placeholder(adapters):
    return {}
  check_parts(adapters)
  return {
    part: "auxiliary" if part == "auxiliary" else "primary" for part in adapters
  }


def count_parameters(adapters: Any) -> dict[str, int]:
  """The number of trained scalars in each part.

  Args:
    adapters: the partition, with arrays or `jax.ShapeDtypeStruct` as leaves.

  Examples:
    >>> import jax.numpy as jnp
    >>> count_parameters({'primary': jnp.zeros((3, 2)), 'extra': {}})
    {'primary': 6, 'extra': 0}
  """
  check_parts(adapters)
  return {
    part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    for part, tree in adapters.items()
  }
