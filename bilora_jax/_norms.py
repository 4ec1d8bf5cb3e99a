"""The norm over a tree of nodes: the nodes in it, and what they add up to."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from bilora_jax import _nodes
from bilora_jax._factors import Factors, batch_axes, is_factors

# Squares whose sum is outside of these are taken anew, of scaled fields.
_LEAST, _MOST = 1e-30, 1e37


def norms(
  tree: Any, specs: Any = None, *, user: str = "keep_in_ball"
) -> tuple[jax.Array, list[jax.Array], list[tuple[str, ...]]]:
  """The norm over all nodes of a tree, and what it is made of.

  Args:
    tree: of nodes; those that a mask hides do not count.
    specs: as in `keep_in_ball`.
    user: who asks, for the error's message.

  Returns:
    The norm, the nodes' own, `(*batch)` each, and the mesh axes to add the
    squares of these up over.
  """
  found = nodes(tree, user)
  known = _node_specs(specs, tree)
  norm, each = _norms(tuple(found), known)
  return norm, each, _shards(found, known)


def nodes(tree: Any, user: str = "keep_in_ball") -> list[Any]:
  """The nodes of a tree, without those that a mask hides.

  Raises:
    ValueError: if anything else is in the tree, or a mask hides half a node.
  """
  found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_nodes.is_adapter)
  for path, node in found:
    where = jax.tree_util.keystr(path) or "the root"
    if not _nodes.is_adapter(node):
      raise ValueError(
        f"{user} needs a tree of Factors; got {type(node).__name__} at "
        f"{where}. Other nodes have a degree and a squared_norm, as those of "
        "bilora_jax.adapters."
      )
    hidden = [_nodes.is_masked(x) for x in _nodes.moving(node)]
    if any(hidden) and not all(hidden):
      raise ValueError(_half_hidden(user, node, where))
  return [node for _, node in found if _nodes.is_seen(node)]


def pairs(tree: Any, user: str) -> list[Factors]:
  """The pairs of a tree that has nothing else, without the hidden ones.

  Raises:
    ValueError: if anything else is in the tree, or a mask hides half a pair.
  """
  found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_nodes.is_adapter)
  for path, node in found:
    where = jax.tree_util.keystr(path) or "the root"
    if not is_factors(node):
      raise ValueError(
        f"{user} needs a tree of Factors; got {type(node).__name__} at {where}."
      )
    if _nodes.is_masked(node.a) != _nodes.is_masked(node.b):
      raise ValueError(_half_hidden(user, node, where))
  return [node for _, node in found if _nodes.is_seen(node)]


def _half_hidden(user: str, node: Any, where: str) -> str:
  whole = "both factors of a pair, or neither"
  if not is_factors(node):
    whole = f"all fields of a {type(node).__name__}, or none"
  return f"{user} needs {whole}; a mask hides a part of it at {where}."


def is_pair(node: Any) -> bool:
  """Whether a node is a pair that no mask hides."""
  return is_factors(node) and _nodes.is_seen(node)


def map_pairs(f: Callable[..., Any], *trees: Any) -> Any:
  """Applies f to the pairs; what a mask hides stays as it is."""
  return jax.tree.map(
    lambda *nodes: f(*nodes) if is_pair(nodes[0]) else nodes[0],
    *trees,
    is_leaf=is_factors,
  )


@functools.partial(jax.jit, static_argnums=1)
def _norms(
  found: tuple[Any, ...], specs: tuple[Factors | None, ...]
) -> tuple[jax.Array, list[jax.Array]]:
  """The norm over all nodes, and each node's."""
  shards = _shards(found, specs)

  def total(squares):
    sums = (
      across(jax.lax.psum, x, jnp.sum(s)) for x, s in zip(shards, squares)
    )
    return sum(sums, start=jnp.float32(0.0))

  squares = [
    node.squared_norm() if spec is None else node.squared_norm(spec)
    for node, spec in zip(found, specs)
  ]
  square = total(squares)

  def as_found():
    return jnp.sqrt(square), [jnp.sqrt(s) for s in squares]

  def of_scaled():
    each = _scaled_norms(found, specs)
    largest = jnp.float32(0.0)
    for axes, size in zip(shards, each):
      most = jnp.max(size, initial=0.0)
      largest = jnp.maximum(largest, across(jax.lax.pmax, axes, most))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return scale * jnp.sqrt(total([(x / scale) ** 2 for x in each])), each

  if not found:
    return as_found()
  # Squares leave float32 long before norms do; the other branch is seldom run.
  in_range = (square > _LEAST) & (square < _MOST)
  return jax.lax.cond(in_range, as_found, of_scaled)


def _scaled_norms(
  found: tuple[Any, ...], specs: tuple[Factors | None, ...]
) -> list[jax.Array]:
  """Each node's norm, whatever its entries; nodes of one shape at once."""
  alike: dict[Any, list[int]] = {}
  for i, (node, spec) in enumerate(zip(found, specs)):
    arrays, structure = jax.tree.flatten(node)
    kind = (structure, *map(jax.typeof, arrays), spec)
    alike.setdefault(kind, []).append(i)
  each: dict[int, jax.Array] = {}
  for (*_, spec), places in alike.items():

    def norm(node, spec=spec):
      return _nodes.norm(node) if spec is None else node.frobenius_norm(spec)

    stacked = jax.tree.map(
      lambda *xs: jnp.stack(xs), *(found[i] for i in places)
    )
    each |= dict(zip(places, jax.vmap(norm)(stacked)))
  return [each[i] for i in range(len(found))]


def _node_specs(specs: Any, tree: Any) -> tuple[Factors | None, ...]:
  """The specs of a tree's nodes, in the order of `nodes`."""
  if specs is None:
    return (None,) * len(nodes(tree))
  known = dict(
    jax.tree_util.tree_leaves_with_path(specs, is_leaf=_nodes.is_adapter)
  )
  found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_nodes.is_adapter)
  seen = [(path, node) for path, node in found if _nodes.is_seen(node)]
  missing = [path for path, _ in seen if not _nodes.is_adapter(known.get(path))]
  if missing:
    raise ValueError(
      "specs is a tree like the parameters, of Factors of PartitionSpec; it "
      f"has none at {', '.join(map(jax.tree_util.keystr, missing))}."
    )
  for path, node in seen:
    if not is_factors(node) and any(map(_splits, _nodes.moving(known[path]))):
      raise ValueError(
        f"specs may shard pairs alone; got {known[path]} at "
        f"{jax.tree_util.keystr(path)}."
      )
  return tuple(known[path] if is_factors(node) else None for path, node in seen)


def _splits(spec: Any) -> bool:
  return any(names not in (None, ()) for names in spec)


def _shards(
  found: Any, specs: tuple[Factors | None, ...]
) -> list[tuple[str, ...]]:
  """The mesh axes that the nodes' batch axes are sharded over."""
  return [
    () if spec is None else batch_axes(node, spec)
    for node, spec in zip(found, specs)
  ]


def across(reduce: Any, axes: tuple[str, ...], x: jax.Array) -> jax.Array:
  """A reduction over mesh axes, if there are any."""
  return reduce(x, axes) if axes else x
