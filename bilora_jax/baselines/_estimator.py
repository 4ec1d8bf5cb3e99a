"""The protocol of gradient estimators, and their masks and norms."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import optax

Draw: TypeAlias = Callable[[jax.Array, tuple[int, ...]], jax.Array]


class GradientEstimator(NamedTuple):
  """An estimator of the gradient, as a pair of pure functions.

  An estimator transforms `jax.value_and_grad` as an
  `optax.GradientTransformation` transforms the gradient: state is passed, never
  kept. Both functions work under `jax.jit`.

  Attributes:
    init: `(params) -> state`. Trees in the state have the paths of params, in
      float32, with None where nothing is perturbed; an estimator without state
      has `()`.
    estimate: `(value_and_grad, state, key, params, *args, **kwargs) ->
      ((value, grads), state)`. `value_and_grad` takes `(params, *args,
      **kwargs)` and returns the value, or `(value, aux)`, and the gradient, as
      a function made by `jax.value_and_grad`. `key` is the PRNG key of this
      step.

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
  """The plain gradient: one a step, value and gradient at `params`."""

  def estimate(value_and_grad, state, key, params, *args, **kwargs):
    del key
    return value_and_grad(params, *args, **kwargs), state

  return GradientEstimator(stateless, estimate)


def check_size(name: str, what: str, size: float) -> None:
  """Refuses a negative or infinite radius or deviation that is not traced."""
  if isinstance(size, jax.core.Tracer):
    return
  if callable(size):
    raise ValueError(
      f"{name}, {what}, is a number; got the function {size!r}. Give the value "
      "of a schedule at the step: the estimator may be made inside the jitted "
      "step, and its state be kept between steps."
    )
  if not (math.isfinite(size) and size >= 0):
    raise ValueError(f"{name}, {what}, is finite and at least 0; got {size}.")


def check_steps(name: str, what: str, steps: int) -> None:
  """Refuses a number of steps below 1."""
  if steps < 1:
    raise ValueError(f"{name}, the steps {what}, is at least 1; got {steps}.")


def selected(tree: Any, mask: Any, params: Any) -> Any:
  """The part of a tree like params that is perturbed, in float32.

  Args:
    tree: like params.
    mask: a tree of bools like params, or like their upper levels, or one bool,
      or a function from params to such a mask.
    params: argument of the mask, if the mask is a function.

  Returns:
    A tree like params, with None, which is not a leaf, in place of parameters
    that are not perturbed.
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
  """The initial state of an estimator: zeros like the perturbed parameters."""
  return jax.tree.map(jnp.zeros_like, selected(params, mask, params))


def drawn(draw: Draw, key: jax.Array, tree: Any) -> Any:
  """A random tree; `key` is split into one key for each leaf, in order."""
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(key, len(leaves))
  return structure.unflatten([draw(k, x.shape) for k, x in zip(keys, leaves)])


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Draws from N(0, 1) in float32, even if JAX's default is float64."""
  return jax.random.normal(key, shape, jnp.float32)


def scaled_to(length: float | jax.Array, tree: Any) -> Any:
  """Scales the tree to a norm, taken over all leaves; zero stays zero."""
  scale = quotient(length, optax.tree.norm(tree))
  return jax.tree.map(lambda x: scale * x, tree)


def quotient(numerator: Any, norm: jax.Array) -> jax.Array:
  """`numerator / norm`, and 0 where the norm is 0."""
  # At b = 0, as every adapter starts, the gradient of a is zero.
  return jnp.where(norm > 0, numerator / jnp.where(norm > 0, norm, 1), 0)


def shifted(params: Any, shift: Any) -> Any:
  """`params + shift`, in the dtypes of params; None shifts nothing."""
  return jax.tree.map(
    lambda e, p: p if e is None else (p + e).astype(p.dtype),
    shift,
    params,
    is_leaf=lambda e: e is None,
  )
