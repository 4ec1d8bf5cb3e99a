"""Nodes that are alike, as one stack: few large operations, not many small.

Layers that are written out have hundreds of small pairs. A GPU takes longer to
launch a kernel than such a pair's own take to run, and a compiler takes minutes
where each is for itself.
"""

from collections.abc import Sequence
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from bilora_jax import _nodes

# In the names of layers, as `layers_3` or `blocks.3`; not that of `w1`.
_NUMBER = re.compile(r"(?<![A-Za-z0-9])[0-9]+")


@dataclasses.dataclass(frozen=True)
class Stacks:
  """Which nodes of a tree are stacked.

  Attributes:
    groups: of each stack, the places of its nodes among those that no mask
      hides, in the tree's order.
  """

  groups: tuple[tuple[int, ...], ...]

  def stack(self, nodes: Sequence[Any]) -> list[Any]:
    """One node for each group, with an axis in front for its members.

    A node that is alone in its group has none, and stays as it is.
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
  """Groups the nodes of one kind, shape and name, numbers in names apart.

  Nodes of one name are sharded alike, layer by layer, so that stacking moves
  nothing between devices.

  Args:
    tree: of nodes, of which those that a mask hides are left out.
    others: of each node, what must be equal too within a group, as its specs.
  """
  found = [
    (path, node)
    for path, node in jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=_nodes.is_adapter
    )
    if _nodes.is_seen(node)
  ]
  groups: dict[Any, list[int]] = {}
  for i, (path, node) in enumerate(found):
    name = _NUMBER.sub("", jax.tree_util.keystr(path))
    arrays, structure = jax.tree.flatten(node)
    kinds = tuple(map(jax.typeof, arrays))
    key = name, structure, kinds, others and others[i]
    groups.setdefault(key, []).append(i)
  return Stacks(tuple(map(tuple, groups.values())))
