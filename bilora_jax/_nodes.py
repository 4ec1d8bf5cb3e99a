"""Adapters as nodes of a tree: the interface for balls and files."""

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
  """The interface of a node of the parameters that a ball can hold.

  A node is a pytree, as made by `jax.tree_util.register_dataclass`. Stacked
  fields, such as layers under `nn.scan`, share leading batch axes. Three
  attributes are optional:

  - `held`, names of fields that no step moves and no clip scales: they shape
    the perturbation, but are not trained.
  - `kept`, names of fields that do not change if a radius of 0 sets the
    perturbation to zero. At degree 2 or more, the gradient is zero if all
    fields are zero.
  - `scaled_square()`, the square of `norm / p` for a power of two p, and p,
    `(*batch)` each, for a node whose fields may have very different sizes.

  Attributes:
    degree: k; if all fields that are not held are multiplied by `t`, the
      perturbation is multiplied by `t**k`.
  """

  degree: ClassVar[int]

  def squared_norm(self) -> jax.Array:
    """The square of the perturbation's norm, `(*batch)`, in float32.

    It may be infinite, NaN or zero if squares leave the range of float32: the
    ball divides fields by their magnitude first, or calls `scaled_square`.
    """
    ...


def is_adapter(node: Any) -> bool:
  """Whether a node is an adapter; use as `is_leaf` in maps over adapters."""
  kind = type(node)
  return hasattr(kind, "degree") and hasattr(kind, "squared_norm")


def is_masked(node: Any) -> bool:
  """Whether a node is masked by Optax."""
  return isinstance(node, optax.MaskedNode)


def is_seen(node: Any) -> bool:
  """Whether a node is an adapter that is not masked."""
  return is_adapter(node) and not any(map(is_masked, moving(node)))


def map_fields(f: Callable[..., Any], node: Any, *rest: Any) -> Any:
  """Maps `f(name, x, *xs)` over arrays and masks, with their fields' names."""

  def named(path, *xs):
    # If JAX has no names for a node's fields, no field is held or kept.
    return f(getattr(path[0], "name", None), *xs)

  return jax.tree_util.tree_map_with_path(named, node, *rest, is_leaf=is_masked)


def is_held(node: Any, name: str) -> bool:
  """Whether a field is in `held`: no step moves it."""
  return name in getattr(node, "held", ())


def is_kept(node: Any, name: str) -> bool:
  """Whether a field is in `kept`: it does not change at a radius of 0."""
  return name in getattr(node, "kept", ())


def moving(node: Any) -> list[Any]:
  """The arrays of a node that steps move, or masks in their place."""
  moved = map_fields(lambda name, x: None if is_held(node, name) else x, node)
  return jax.tree.leaves(moved, is_leaf=is_masked)


def scaled_square(node: Any) -> tuple[jax.Array, jax.Array]:
  """The square of `norm / p` of a node for a power of two p, and p.

  Both are in float32's range if the norm is: fields are divided by their
  magnitude before they are squared.

  Args:
    node: an adapter, such as `bilora_jax.Factors`.

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

  The result is right for any norm in float32's range, even if its square is not
  in the range. The derivative at a norm of 0 is 0.

  Args:
    node: an adapter, such as `bilora_jax.Factors`.
  """
  square, power = scaled_square(node)
  return power * safe_sqrt(square)


def without_held(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Hides fields in `held` from an optimizer, so that they do not change.

  `bilora` wraps its optimizers itself. Wrap the optimizer of a run without an
  auxiliary.

  Args:
    optimizer: an optimizer of a tree that contains nodes.

  Returns:
    A transformation of this tree, without a state for fields in `held`. For
    trees without such fields, state and updates are those of the optimizer.

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
  """The tree with masks in place of fields in `held`."""

  def one(node):
    if not is_adapter(node):
      return node
    return map_fields(
      lambda name, x: optax.MaskedNode() if is_held(node, name) else x, node
    )

  return jax.tree.map(one, tree, is_leaf=is_adapter)


def magnitude(x: jax.Array, batch: int) -> jax.Array:
  """The largest power of two up to each array's largest entry; 1 for zeros.

  It is a scale, `(*batch)` float32, without a gradient.
  """
  x = jax.lax.stop_gradient(jnp.abs(x.astype(jnp.float32)))
  size = jnp.max(x, axis=tuple(range(batch, x.ndim)), initial=0.0)
  return power_of_two(size)


def power_of_two(x: jax.Array) -> jax.Array:
  """The largest power of two up to x; 1 for zeros, infinities and NaN."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  # A float without its fraction.
  power = jax.lax.bitcast_convert_type(bits & _EXPONENT, jnp.float32)
  # With 1, infinite entries give an infinite norm, and not NaN.
  return jnp.where((power > 0) & jnp.isfinite(x), power, 1.0)


def over(x: jax.Array, size: jax.Array) -> jax.Array:
  """Divides each array of a batch by a number, in float32."""
  return x.astype(jnp.float32) / expanded(size, x.ndim)


def expanded(x: jax.Array, ndim: int) -> jax.Array:
  """An array `(*batch)` with trailing axes of size 1, up to `ndim` axes."""
  return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))


def safe_sqrt(square: jax.Array) -> jax.Array:
  """The square root, with the derivative 0 at 0 instead of infinity."""
  some = square > 0
  return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), square)


def static(default: Any = dataclasses.MISSING) -> Any:
  """A field of a node that is part of the tree's structure, not an array."""
  return dataclasses.field(default=default, metadata={"static": True})


def register(node: _Class) -> _Class:
  """Registers a dataclass as a pytree node with JAX, `jax.export` and Flax.

  Use as a decorator of a frozen dataclass. Its fields are arrays, or numbers
  and strings that are `static`.
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
        f"the state does not fit the {node.__name__} at "
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
