"""Stacks nodes that are alike: few large operations instead of many small ones.

Models without `nn.scan` have hundreds of small pairs. A GPU takes longer to
launch a kernel than to compute a small pair, and a compiler takes minutes for
hundreds of separate operations.
"""

from collections.abc import Sequence
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from bilora_jax import _nodes

# Numbers in the names of layers, as `layers_3` or `blocks.3`, but not in `w1`.
_NUMBER = re.compile(r"(?<![A-Za-z0-9])[0-9]+")


@dataclasses.dataclass(frozen=True)
class Stacks:
  """Which nodes of a tree are stacked.

  Attributes:
    groups: for each stack, the indices of its nodes among the nodes that are
      not masked, in the tree's order.
  """

  groups: tuple[tuple[int, ...], ...]

  def stack(self, nodes: Sequence[Any]) -> list[Any]:
    """Stacks the nodes of each group along a new leading axis.

    A node that is alone in its group gets no axis and does not change.
    """
    return [_stacked([nodes[i] for i in group]) for group in self.groups]

  def unstack(self, stacks: Sequence[Any]) -> list[Any]:
    """The nodes in the tree's order; the inverse of `stack`."""
    nodes: dict[int, Any] = {}
    for group, stack in zip(self.groups, stacks):
      if len(group) == 1:
        nodes[group[0]] = stack
        continue
      for j, i in enumerate(group):
        nodes[i] = jax.tree.map(lambda x, j=j: x[j], stack)
    return [nodes[i] for i in range(len(nodes))]


def _stacked(nodes: list[Any]) -> Any:
  if len(nodes) == 1:
    return nodes[0]
  return jax.tree.map(lambda *xs: jnp.stack(xs), *nodes)


def alike(tree: Any, others: Sequence[Any] | None = None) -> Stacks:
  """Groups nodes of the same kind, shape and name, except for numbers in names.

  The layers of one name have the same sharding, so that stacking moves no data
  between devices.

  Args:
    tree: a tree of nodes; masked nodes are left out.
    others: for each node, another value that must be equal within a group, such
      as its specs.
  """
  seen = [
    (path, node)
    for path, node in jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=_nodes.is_adapter
    )
    if _nodes.is_seen(node)
  ]
  groups: dict[Any, list[int]] = {}
  for i, (path, node) in enumerate(seen):
    name = _NUMBER.sub("", jax.tree_util.keystr(path))
    arrays, structure = jax.tree.flatten(node)
    kinds = tuple(map(jax.typeof, arrays))
    key = name, structure, kinds, others and others[i]
    groups.setdefault(key, []).append(i)
  return Stacks(tuple(map(tuple, groups.values())))
