"""The norm over a tree of nodes."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bilora_jax import _nodes, _stacks
from bilora_jax._factors import Factors, batch_axes, is_factors


def norms(
  tree: Any, specs: Any = None, *, user: str = "keep_in_ball"
) -> tuple[jax.Array, list[jax.Array], list[tuple[str, ...]]]:
  """The norm over all nodes of a tree, and the norm of each node.

  Args:
    tree: a tree of nodes; masked nodes do not count.
    specs: as in `keep_in_ball`.
    user: name of the calling function, for error messages.

  Returns:
    The norm over all nodes, the norm of each node, `(*batch)`, and for each
    node the mesh axes over which its squared norms are summed.
  """
  seen = nodes(tree, user)
  known = _node_specs(specs, tree)
  norm, each = _norms(tuple(seen), known, _stacks.alike(tree, known))
  return norm, each, _shards(seen, known)


def nodes(tree: Any, user: str = "keep_in_ball") -> list[Any]:
  """The nodes of a tree that are not masked.

  Raises:
    ValueError: if the tree has a leaf outside of nodes, or a mask hides a part
      of a node.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_nodes.is_adapter)
  for path, node in leaves:
    where = jax.tree_util.keystr(path) or "the root"
    if not _nodes.is_adapter(node):
      raise ValueError(
        f"{user} needs a tree of Factors; got {type(node).__name__} at "
        f"{where}. Other nodes must have a degree and a squared_norm, like "
        "those of bilora_jax.adapters."
      )
    hidden = [_nodes.is_masked(x) for x in _nodes.moving(node)]
    if any(hidden) and not all(hidden):
      raise ValueError(_half_hidden(user, node, where))
  return [node for _, node in leaves if _nodes.is_seen(node)]


def pairs(tree: Any, user: str) -> list[Factors]:
  """The pairs of a tree that are not masked.

  Raises:
    ValueError: if the tree has a leaf outside of pairs, or a mask hides one
      factor of a pair.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_nodes.is_adapter)
  for path, node in leaves:
    where = jax.tree_util.keystr(path) or "the root"
    if not is_factors(node):
      raise ValueError(
        f"{user} needs a tree of Factors; got {type(node).__name__} at {where}."
      )
    if _nodes.is_masked(node.a) != _nodes.is_masked(node.b):
      raise ValueError(_half_hidden(user, node, where))
  return [node for _, node in leaves if _nodes.is_seen(node)]


def _half_hidden(user: str, node: Any, where: str) -> str:
  whole = "both factors of a pair, or neither"
  if not is_factors(node):
    whole = f"all fields of a {type(node).__name__}, or none"
  return f"{user} needs {whole}; a mask hides a part of it at {where}."


def is_pair(node: Any) -> bool:
  """Whether a node is a pair that is not masked."""
  return is_factors(node) and _nodes.is_seen(node)


def map_pairs(f: Callable[..., Any], *trees: Any) -> Any:
  """Applies f to all pairs; masked nodes do not change."""
  return jax.tree.map(
    lambda *nodes: f(*nodes) if is_pair(nodes[0]) else nodes[0],
    *trees,
    is_leaf=is_factors,
  )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _norms(
  found: tuple[Any, ...],
  specs: tuple[Factors | None, ...],
  stacks: _stacks.Stacks,
) -> tuple[jax.Array, list[jax.Array]]:
  """The norm over all nodes, and the norm of each node.

  Squares leave the range of float32 long before norms do, so all values are
  divided by powers of two before they are squared, which is exact.
  """
  firsts = [group[0] for group in stacks.groups]
  scaled = []
  for group, stack in zip(stacks.groups, stacks.stack(found)):
    measure = functools.partial(_scaled_square, spec=specs[group[0]])
    scaled.append((jax.vmap(measure) if len(group) > 1 else measure)(stack))
  shards = _shards([found[i] for i in firsts], [specs[i] for i in firsts])
  largest = functools.reduce(
    jnp.maximum,
    [
      across(jax.lax.pmax, axes, jnp.max(_size(*pair), initial=0.0))
      for axes, pair in zip(shards, scaled)
    ],
    jnp.float32(0.0),
  )
  scale = _nodes.power_of_two(largest)
  sums = [
    across(jax.lax.psum, axes, jnp.sum(square * (power / scale) ** 2))
    for axes, (square, power) in zip(shards, scaled)
  ]
  norm = scale * jnp.sqrt(sum(sums, start=jnp.float32(0.0)))
  each = [power * jnp.sqrt(square) for square, power in scaled]
  return norm, stacks.unstack(each)


def _scaled_square(
  node: Any, spec: Factors | None
) -> tuple[jax.Array, jax.Array]:
  if spec is None:
    return _nodes.scaled_square(node)
  return node.scaled_square(spec)


def _size(square: jax.Array, power: jax.Array) -> jax.Array:
  """The power, or 0 where the square is 0."""
  return jnp.where(square > 0, power, 0.0)


def _node_specs(specs: Any, tree: Any) -> tuple[Factors | None, ...]:
  """The specs of a tree's nodes, in the order of `nodes`; None for no specs."""
  if specs is None:
    return (None,) * len(nodes(tree))
  known = dict(
    jax.tree_util.tree_leaves_with_path(specs, is_leaf=_nodes.is_adapter)
  )
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_nodes.is_adapter)
  seen = [(path, node) for path, node in leaves if _nodes.is_seen(node)]
  missing = [path for path, _ in seen if not _nodes.is_adapter(known.get(path))]
  if missing:
    raise ValueError(
      "specs is a tree like the parameters, of Factors of PartitionSpec; it "
      f"has none at {', '.join(map(jax.tree_util.keystr, missing))}."
    )
  for path, node in seen:
    if not is_factors(node) and any(map(_splits, _nodes.moving(known[path]))):
      raise ValueError(
        f"specs may shard only pairs; got {known[path]} at "
        f"{jax.tree_util.keystr(path)}."
      )
  return tuple(known[path] if is_factors(node) else None for path, node in seen)


def _splits(spec: Any) -> bool:
  return any(names not in (None, ()) for names in spec)


def _shards(
  found: Any, specs: Sequence[Factors | None]
) -> list[tuple[str, ...]]:
  """The mesh axes that shard the nodes' batch axes."""
  return [
    () if spec is None else batch_axes(node, spec)
    for node, spec in zip(found, specs)
  ]


def across(reduce: Any, axes: tuple[str, ...], x: jax.Array) -> jax.Array:
  """Reduces x over mesh axes, if there are any."""
  return reduce(x, axes) if axes else x
