"""The parameters that move: their norms, directions, and points nearby."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

Loss = Callable[[Any], jax.Array]


class Space(NamedTuple):
  """The parameters that a mask selects to move, as a list of arrays.

  Attributes:
    names: their paths, as `jax.tree_util.keystr` writes them.
    moved: their values, in their dtypes.
    at: function from a list of float32 perturbations to the perturbed
      parameters, in the dtypes of the parameters.
    tree: function from such a list to a tree like the parameters, which is zero
      at parameters that do not move.
  """

  names: list[str]
  moved: list[jax.Array]
  at: Callable[[list[jax.Array]], Any]
  tree: Callable[[list[jax.Array]], Any]

  def zeros(self) -> list[jax.Array]:
    return [jnp.zeros(leaf.shape, jnp.float32) for leaf in self.moved]


def space(params: Any, mask: Any = True) -> Space:
  """Splits parameters by a mask.

  Raises:
    ValueError: if the mask does not fit, or selects no parameter or one that is
      not a float.
  """
  leaves, treedef = jax.tree.flatten(params)
  names = [
    jax.tree_util.keystr(path) or "the root"
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  prefix = mask(params) if callable(mask) else mask
  where = jax.tree.leaves(jax.tree.broadcast(prefix, params))
  for name, leaf, moves in zip(names, leaves, where):
    if not isinstance(moves, (bool, np.bool_)):
      raise ValueError(
        "mask is a bool, a tree of bools like the parameters or their upper "
        f"levels, or a function that returns one of these; it holds a "
        f"{type(moves).__name__} at {name}."
      )
    if moves and not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      raise ValueError(
        f"only floats can be perturbed; got {jnp.result_type(leaf)} at "
        f"{name}: exclude it by mask."
      )
  chosen = [i for i, moves in enumerate(where) if moves]
  if not chosen:
    raise ValueError(
      f"mask leaves none of the {len(leaves)} parameters free to move; at "
      "least one has to move."
    )
  moved = [jnp.asarray(leaves[i]) for i in chosen]

  def at(perturbations):
    new = list(leaves)
    for i, leaf, e in zip(chosen, moved, perturbations):
      new[i] = (leaf + e).astype(leaf.dtype)
    return jax.tree.unflatten(treedef, new)

  def tree(values):
    new = [jnp.zeros(jnp.shape(leaf), jnp.float32) for leaf in leaves]
    for i, value in zip(chosen, values):
      new[i] = value
    return jax.tree.unflatten(treedef, new)

  return Space([names[i] for i in chosen], moved, at, tree)


def direction(grads: Any, mask: Any = True, *, scale: Any = None) -> Any:
  r"""The unit direction of steepest ascent, with one norm over all that move.

  .. math::

    d = \frac{g}{\|g\|_2}, \qquad
    \text{adaptive: } d = \frac{T^2 g}{\|T g\|_2}, \quad \|T^{-1} d\|_2 = 1

  `move(params, direction(grads), radius)` is the point at which SAM takes its
  second gradient; with `scale=jax.tree.map(jnp.abs, params)`, it is the point
  of ASAM. Use it to measure another metric there, such as accuracy.

  Args:
    grads: a tree of floats.
    mask: which parameters move: a tree of bools like `grads`, or like its upper
      levels, or one bool, or a function from `grads` to such a mask.
    scale: T, a tree like `grads`; by default all ones.

  Returns:
    A tree like `grads`, in float32; zero at parameters that do not move, and
    everywhere if all gradients are zero.

  Raises:
    ValueError: if the mask does not fit, or nothing moves.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> params = {'w': jnp.array([3.0, 4.0]), 'v': jnp.array([1.0])}
    >>> ascent = direction(params, {'w': True, 'v': False})
    >>> print(move(params, ascent, 5.0)['w'])
    [6. 8.]

  References:
    Foret et al, `SAM <https://arxiv.org/abs/2010.01412>`_, 2021; Kwon et al,
    `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, with T = abs(w).
  """
  chosen = space(grads, mask)
  ascent = as_float32(chosen.moved)
  if scale is None:
    return chosen.tree(unit(ascent))
  factors = as_float32(space(scale, mask).moved)
  return chosen.tree(times(factors, unit(times(factors, ascent))))


def move(
  params: Any, direction: Any, radius: jax.typing.ArrayLike = 1.0
) -> Any:
  """The point `params + radius * direction`, in the parameters' dtypes.

  Args:
    params: a tree; leaves that are not floats do not move.
    direction: a tree like `params`.
    radius: scalar, in units of the parameters if the direction has norm 1.

  .. note::
    Half precision rounds small steps to zero: use float32 parameters, and a
    loss that casts them.
  """

  def one(p, d):
    if not jnp.issubdtype(jnp.result_type(p), jnp.floating):
      return p
    p = jnp.asarray(p)
    return (p + jnp.asarray(radius, jnp.float32) * d).astype(p.dtype)

  return jax.tree.map(one, params, direction)


def objective(
  loss: Loss, params: Any, mask: Any, adaptive: bool = False
) -> tuple[
  Callable[[list[jax.Array]], jax.Array],
  Callable[[list[jax.Array]], Any],
  list[jax.Array],
]:
  """The loss over a ball around zero, an ellipsoid with adaptive scaling.

  Returns:
    The loss in float32 as a function of a list u of arrays; a function from u
    to the perturbation, a tree like the parameters; and u = 0.
  """
  chosen = space(params, mask)
  factors = [jnp.abs(w) for w in as_float32(chosen.moved)] if adaptive else None

  def perturbation(u):
    return u if factors is None else times(factors, u)

  def value(u):
    return jnp.asarray(loss(chosen.at(perturbation(u))), jnp.float32)

  return value, lambda u: chosen.tree(perturbation(u)), chosen.zeros()


def as_float32(leaves: list[jax.Array]) -> list[jax.Array]:
  return [leaf.astype(jnp.float32) for leaf in leaves]


def times(left: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
  return [x * y for x, y in zip(left, right)]


def gaussian(key: jax.Array, like: list[jax.Array]) -> list[jax.Array]:
  """Float32 arrays like `like`, of independent standard normals."""
  keys = jax.random.split(key, len(like))
  return [
    jax.random.normal(k, x.shape, jnp.float32) for k, x in zip(keys, like)
  ]


def unit(leaves: list[jax.Array]) -> list[jax.Array]:
  """The leaves divided by their joint norm; zero stays zero."""
  norm = optax.tree.norm(leaves)
  inverse = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
  return optax.tree.scale(inverse, leaves)


def on_sphere(
  key: jax.Array, like: list[jax.Array], radius: jax.typing.ArrayLike
) -> list[jax.Array]:
  """A point of norm `radius` in a uniformly random direction."""
  return optax.tree.scale(radius, unit(gaussian(key, like)))


def check_radius(radius: Any) -> None:
  """Refuses a radius that is negative or not finite, unless it is traced."""
  if isinstance(radius, jax.core.Tracer):
    return
  if not (math.isfinite(radius) and radius >= 0):
    raise ValueError(
      f"radius, in units of the parameters, is finite and at least 0; got "
      f"{radius}."
    )


def check_at_least(least: int, **counts: int) -> None:
  """Refuses counts below `least`."""
  for name, count in counts.items():
    if count < least:
      raise ValueError(
        f"{name} is an integer of at least {least}; got {count}."
      )
