"""What every gradient estimator shares: its protocol, masks and norms."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import optax

Draw: TypeAlias = Callable[[jax.Array, tuple[int, ...]], jax.Array]


class GradientEstimator(NamedTuple):
  """A way to take the gradient, as a pair of pure functions.

  An estimator is to `jax.value_and_grad` what an
  `optax.GradientTransformation` is to the gradient: state is passed, never
  kept. Both functions work under `jax.jit`.

  Attributes:
    init: `(params) -> state`. Trees in it have the paths of params, in
      float32, with None where nothing is perturbed; `()` for the stateless.
    estimate: `(value_and_grad, state, key, params, *args, **kwargs) ->
      ((value, grads), state)`. `value_and_grad` takes `(params, *args,
      **kwargs)` and gives the value, or `(value, aux)`, and the gradient, as
      `jax.value_and_grad` makes it. `key` is this step's PRNG key.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from bilora_jax import baselines
    >>> estimator = baselines.sam(rho=0.5)
    >>> params = jnp.array([3.0, 4.0])
    >>> state = estimator.init(params)
    >>> value_and_grad = jax.value_and_grad(lambda w: w @ w)
    >>> (value, grads), state = estimator.estimate(
    ...     value_and_grad, state, jax.random.key(0), params
    ... )
    >>> print(value, grads)
    25.0 [6.6 8.8]
  """

  init: Callable[[Any], Any]
  estimate: Callable[..., tuple[tuple[Any, Any], Any]]


def stateless(init_params: Any) -> tuple[()]:
  """The `init` of estimators without state."""
  del init_params
  return ()


def gradient() -> GradientEstimator:
  """The gradient as it is: one a step, value and gradient at `params`."""

  def estimate(value_and_grad, state, key, params, *args, **kwargs):
    del key
    return value_and_grad(params, *args, **kwargs), state

  return GradientEstimator(stateless, estimate)


def check_size(name: str, what: str, size: float) -> None:
  """Refuses a radius or a deviation that cannot be, if it is known."""
  if isinstance(size, jax.core.Tracer):
    return
  if callable(size):
    raise ValueError(
      f"{name}, {what}, is a number; got the function {size!r}. Of a schedule, "
      "give the value at the step: the estimator may be made inside the jitted "
      "step, and its state be kept between."
    )
  if not (math.isfinite(size) and size >= 0):
    raise ValueError(f"{name}, {what}, is finite and at least 0; got {size}.")


def check_steps(name: str, what: str, steps: int) -> None:
  """Refuses a number of steps that cannot be."""
  if steps < 1:
    raise ValueError(f"{name}, the steps {what}, is at least 1; got {steps}.")


def selected(tree: Any, mask: Any, params: Any) -> Any:
  """The part of a tree like params that is perturbed, in float32.

  Args:
    tree: like params.
    mask: a tree of bools like params, or of their upper levels, or one bool; or
      a function from params to it.
    params: what a function is given.

  Returns:
    A tree like params, with None, which is no leaf, at what is not perturbed.
  """
  where = mask(params) if callable(mask) else mask
  return jax.tree.map(
    lambda perturbed, part: jax.tree.map(
      # In float32: squares of half-precision gradients underflow.
      lambda x: x.astype(jnp.float32) if perturbed else None,
      part,
    ),
    where,
    tree,
  )


def zeros_of_selected(mask: Any, params: Any) -> Any:
  """Where an estimator's state starts: `selected` of zeros."""
  return jax.tree.map(jnp.zeros_like, selected(params, mask, params))


def drawn(draw: Draw, key: jax.Array, tree: Any) -> Any:
  """A random tree; the leaves, in order, have the keys that `key` splits in."""
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(key, len(leaves))
  return structure.unflatten([draw(k, x.shape) for k, x in zip(keys, leaves)])


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Draws from N(0, 1), in float32 whatever the default is."""
  return jax.random.normal(key, shape, jnp.float32)


def scaled_to(length: float | jax.Array, tree: Any) -> Any:
  """The tree with another norm, one over all leaves; zero stays zero."""
  scale = quotient(length, optax.tree.norm(tree))
  return jax.tree.map(lambda x: scale * x, tree)


def quotient(numerator: Any, norm: jax.Array) -> jax.Array:
  """`numerator / norm`, and 0 where the norm is 0."""
  # At b = 0, where every adapter starts, the gradient of a is zero.
  return jnp.where(norm > 0, numerator / jnp.where(norm > 0, norm, 1), 0)


def shifted(params: Any, shift: Any) -> Any:
  """`params + shift`, in the dtypes of params; None shifts nothing."""
  return jax.tree.map(
    lambda e, p: p if e is None else (p + e).astype(p.dtype),
    shift,
    params,
    is_leaf=lambda e: e is None,
  )
