"""Adapters as nodes of a tree: what a ball, and a file, has to know of one."""

from collections.abc import Callable
import dataclasses
import functools
import json
from typing import Any, ClassVar, Protocol, TypeVar

from flax import serialization
import jax
from jax import export
import jax.numpy as jnp
import optax

_Class = TypeVar("_Class", bound=type)

# The bits of a float32 that hold its exponent.
_EXPONENT = 0x7F800000


class Adapter(Protocol):
  """What a node of the parameters needs to have, to be kept in a ball.

  A node is a pytree, as `jax.tree_util.register_dataclass` makes one. Fields
  that are stacked, as layers under `nn.scan` are, share leading batch axes.
  Three attributes are optional:

  - `held`, names of fields that no step moves and no clip scales: they shape
    the perturbation, and are not learned.
  - `kept`, names of fields that stay where a radius of 0 sets the perturbation
    to zero. Of degree 2 or more, nothing climbs again from all zeros.
  - `scaled_square()`, the square over a power of two squared, and that power,
    `(*batch)` each, for a node whose fields may be of very different sizes.

  Attributes:
    degree: k; the perturbation is multiplied by `t**k` where all fields that
      are not held are multiplied by `t`.
  """

  degree: ClassVar[int]

  def squared_norm(self) -> jax.Array:
    """The square of the perturbation's norm, `(*batch)`, in float32.

    It may be infinite, NaN or zero where squares leave float32: the ball takes
    it of fields that are divided by their magnitude, or takes `scaled_square`.
    """
    ...


def is_adapter(node: Any) -> bool:
  """Whether a node is an adapter; the `is_leaf` of maps over adapters."""
  kind = type(node)
  return hasattr(kind, "degree") and hasattr(kind, "squared_norm")


def is_masked(node: Any) -> bool:
  """Whether a mask of Optax hides what was here."""
  return isinstance(node, optax.MaskedNode)


def is_seen(node: Any) -> bool:
  """Whether a node is an adapter that no mask hides."""
  return is_adapter(node) and not any(map(is_masked, moving(node)))


def map_fields(f: Callable[..., Any], node: Any, *rest: Any) -> Any:
  """Maps `f(name, x, *xs)` over arrays and masks, by their fields' names."""

  def named(path, *xs):
    # Of nodes whose fields JAX has no names of, none is held or kept.
    return f(getattr(path[0], "name", None), *xs)

  return jax.tree_util.tree_map_with_path(named, node, *rest, is_leaf=is_masked)


def is_held(node: Any, name: str) -> bool:
  """Whether a field is one that no step moves."""
  return name in getattr(node, "held", ())


def is_kept(node: Any, name: str) -> bool:
  """Whether a field is one that stays where the radius is 0."""
  return name in getattr(node, "kept", ())


def moving(node: Any) -> list[Any]:
  """The arrays of a node that steps move, or the masks that hide them."""
  moved = map_fields(lambda name, x: None if is_held(node, name) else x, node)
  return jax.tree.leaves(moved, is_leaf=is_masked)


def scaled_square(node: Any) -> tuple[jax.Array, jax.Array]:
  """The square of a node's norm over a power of two squared, and that power.

  Both are in float32's range wherever the norm is: fields are divided by their
  magnitude before anything is squared.

  Args:
    node: an adapter, as `bilora_jax.Factors` is one.

  Returns:
    Two arrays `(*batch)`, for each index of the batch axes.
  """
  if hasattr(node, "scaled_square"):
    return node.scaled_square()
  fields = moving(node)
  batch = jax.eval_shape(lambda: node.squared_norm()).ndim
  size = functools.reduce(
    jnp.maximum, [magnitude(field, batch) for field in fields]
  )
  scaled = map_fields(
    lambda name, x: x if is_held(node, name) else over(x, size), node
  )
  power = functools.reduce(jnp.multiply, [size] * node.degree)
  return scaled.squared_norm(), power


def norm(node: Any) -> jax.Array:
  """The norm of a node's perturbation, `(*batch)`, in float32.

  It is in float32's range wherever the norm is. The derivative at a norm of 0
  is 0.

  Args:
    node: an adapter, as `bilora_jax.Factors` is one.
  """
  square, power = scaled_square(node)
  return power * safe_sqrt(square)


def without_held(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """The optimizer, to which what nodes hold is hidden: it stays as it is.

  `bilora` does this by itself. Use it around the optimizer of a run without an
  auxiliary.

  Args:
    optimizer: of any tree with nodes in it.

  Returns:
    A transformation of that tree. There is no state of what is held; of trees
    where nothing is, the state and the updates are those of the optimizer.

  Examples:
    >>> import jax.numpy as jnp, optax
    >>> from bilora_jax import adapters
    >>> params = adapters.IA3(jnp.zeros(3), norms=jnp.ones(3), size_in=5)
    >>> tx = adapters.without_held(optax.adamw(0.1, weight_decay=0.5))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(updates.norms)
    [0. 0. 0.]
  """
  inner = optax.with_extra_args_support(optimizer)

  def init_fn(params):
    return inner.init(_hidden(params))

  def update_fn(updates, state, params=None, **extra_args):
    seen = None if params is None else _hidden(params)
    new, state = inner.update(_hidden(updates), state, seen, **extra_args)

    def stay(x, old):
      held = is_masked(x) and not is_masked(old)
      return jnp.zeros_like(old) if held else x

    return jax.tree.map(stay, new, updates, is_leaf=is_masked), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _hidden(tree: Any) -> Any:
  """The tree with masks in place of what nodes hold."""

  def one(node):
    if not is_adapter(node):
      return node
    return map_fields(
      lambda name, x: optax.MaskedNode() if is_held(node, name) else x, node
    )

  return jax.tree.map(one, tree, is_leaf=is_adapter)


def magnitude(x: jax.Array, batch: int) -> jax.Array:
  """The largest power of two below each array's largest entry; 1 for zeros.

  It is a scale, `(*batch)` float32, and no gradient goes through it.
  """
  x = jax.lax.stop_gradient(jnp.abs(x.astype(jnp.float32)))
  size = jnp.max(x, axis=tuple(range(batch, x.ndim)), initial=0.0)
  return power_of_two(size)


def power_of_two(x: jax.Array) -> jax.Array:
  """The largest power of two that is at most x; 1 of zeros, infinities, NaN."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  # A float without its fraction.
  power = jax.lax.bitcast_convert_type(bits & _EXPONENT, jnp.float32)
  # Infinite entries have an infinite norm, and not infinity over infinity.
  return jnp.where((power > 0) & jnp.isfinite(x), power, 1.0)


def over(x: jax.Array, size: jax.Array) -> jax.Array:
  """Each array of a batch over a number, in float32."""
  return x.astype(jnp.float32) / expanded(size, x.ndim)


def expanded(x: jax.Array, ndim: int) -> jax.Array:
  """An array `(*batch)` with axes of size 1 behind, to have `ndim`."""
  return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))


def safe_sqrt(square: jax.Array) -> jax.Array:
  """The root, whose derivative at 0 is 0 here and not infinity."""
  some = square > 0
  return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), square)


def static(default: Any = dataclasses.MISSING) -> Any:
  """A field of a node that is no array, and part of the tree's structure."""
  return dataclasses.field(default=default, metadata={"static": True})


def register(node: _Class) -> _Class:
  """Makes a dataclass a node of trees, for JAX, `jax.export` and Flax's files.

  Use as a decorator of a frozen dataclass, whose fields are arrays, or
  `static`: numbers and strings.
  """
  names = {True: [], False: []}
  for field in dataclasses.fields(node):
    names[bool(field.metadata.get("static"))].append(field.name)
  jax.tree_util.register_dataclass(node, names[False], names[True])
  export.register_pytree_node_serialization(
    node,
    serialized_name=f"bilora_jax.{node.__name__}",
    serialize_auxdata=lambda values: json.dumps(values).encode(),
    deserialize_auxdata=lambda text: tuple(json.loads(bytes(text))),
  )

  def to_state(x: Any) -> dict[str, Any]:
    arrays = {n: getattr(x, n) for n in names[False]}
    return {
      **{n: serialization.to_state_dict(y) for n, y in arrays.items()},
      **{n: getattr(x, n) for n in names[True]},
    }

  def from_state(x: Any, state: dict[str, Any]) -> Any:
    missing = sorted({*names[False], *names[True]} - set(state))
    other = [
      f"{n} is {state[n]!r} there and {getattr(x, n)!r} here"
      for n in names[True]
      if n in state and state[n] != getattr(x, n)
    ]
    if missing or other:
      faults = [f"{n} is missing" for n in missing] + other
      raise ValueError(
        f"the state is not of this {node.__name__}, at "
        f"{serialization.current_path()}: {'; '.join(faults)}."
      )
    return dataclasses.replace(
      x,
      **{
        n: serialization.from_state_dict(getattr(x, n), state[n], name=n)
        for n in names[False]
      },
    )

  serialization.register_serialization_state(node, to_state, from_state)
  return node
