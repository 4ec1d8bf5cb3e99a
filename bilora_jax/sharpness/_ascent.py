"""The highest loss nearby: one gradient step away, or anywhere in the ball."""

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from bilora_jax.sharpness import _space


class Ascent(NamedTuple):
  """The highest point found.

  Attributes:
    rise: the loss there minus the loss at the parameters, float32 scalar.
    perturbation: what to add to the parameters, a float32 tree like them.
  """

  rise: jax.Array
  perturbation: Any


def one_step(
  loss: _space.Loss,
  params: Any,
  radii: Any,
  *,
  mask: Any = True,
  adaptive: bool = False,
) -> jax.Array:
  r"""How far the loss rises along its gradient.

  .. math:: L\left(w + r\, \frac{g}{\|g\|_2}\right) - L(w)

  The cost is one gradient, and one loss for each radius. To evaluate another
  metric at the same points, see `direction` and `move`.

  Args:
    loss: `params` to a scalar; see `over` for a mean over batches.
    params: a tree of floats: adapters for LoRA space, merged kernels for the
      full space.
    radii: r, `[n]`, in units of the parameters.
    mask: which parameters move and count in the norm; see `direction`.
    adaptive: whether the step is that of ASAM; see `direction`.

  Returns:
    The rises, `[n]`, float32.

  Raises:
    ValueError: if the mask does not fit, or radii are not a one-dimensional
      array of finite numbers of at least 0.

  Examples:
    >>> import jax.numpy as jnp
    >>> print(one_step(lambda w: w @ w, jnp.array([3.0, 4.0]), [0.0, 1.0]))
    [ 0. 11.]

  References:
    Liu et al, `Bi-LoRA <https://arxiv.org/abs/2508.19564>`_, 2025, Table A6.
  """
  radii = _checked_radii(radii)
  value, _, zero = _space.objective(loss, params, mask, adaptive)
  start, grads = jax.value_and_grad(value)(zero)
  ascent = _space.unit(grads)
  there = jax.lax.map(lambda r: value(optax.tree.scale(r, ascent)), radii)
  return there - start


def projected_ascent(
  loss: _space.Loss,
  params: Any,
  radius: jax.typing.ArrayLike,
  key: jax.Array,
  *,
  steps: int = 20,
  restarts: int = 1,
  step_size: jax.typing.ArrayLike | None = None,
  mask: Any = True,
  adaptive: bool = False,
) -> Ascent:
  r"""How far the loss rises at the worst point of a ball, by gradient ascent.

  .. math::

    \max_{\|\epsilon\|_2 \le r} L(w + \epsilon) - L(w), \qquad
    \epsilon_{t+1} = \Pi_r\left(
      \epsilon_t + \eta_t \frac{g(w + \epsilon_t)}{\|g(w + \epsilon_t)\|_2}
    \right), \quad \eta_t = \eta \left(1 - \frac{t}{T}\right)

  If `adaptive`, the ball is :math:`\|T_w^{-1} \epsilon\|_2 \le r` with
  :math:`T_w = |w|`, and the same steps are taken in :math:`T_w^{-1} \epsilon`.
  The result is the highest of all points visited, including w itself: a lower
  bound of the maximum that is never negative and never below `one_step`.

  Args:
    loss: `params` to a scalar. For m-sharpness, use the loss of m rows, and
      take the mean of the rises over many such losses.
    params: a tree of floats.
    radius: r, scalar, in units of the parameters.
    key: random key of the starting points.
    steps: T, number of gradients from each starting point.
    restarts: number of starting points, used one after the other. The first is
      the point of `one_step`, or random if the gradient is zero; the others are
      uniform in the ball.
    step_size: eta, scalar, by default `radius`.
    mask: which parameters move and count in the norm; see `direction`.
    adaptive: whether the ball is an ellipsoid with half axes `radius * abs(w)`.

  Returns:
    The rise, and the perturbation with this rise.

  Raises:
    ValueError: if the mask does not fit, the radius is negative or not finite,
      or a count is below 1.

  References:
    Andriushchenko et al, `A Modern Look at the Relationship between Sharpness
    and Generalization <https://arxiv.org/abs/2302.07011>`_, 2023, who climb
    with Auto-PGD: momentum, and steps halved where progress stalls.
  """
  _space.check_radius(radius)
  _space.check_at_least(1, steps=steps, restarts=restarts)
  value, as_tree, zero = _space.objective(loss, params, mask, adaptive)
  value_and_grad = jax.value_and_grad(value)
  radius = jnp.asarray(radius, jnp.float32)
  rate = radius if step_size is None else jnp.asarray(step_size, jnp.float32)
  start, grads = value_and_grad(zero)
  uphill = optax.tree.scale(radius, _space.unit(grads))
  climbs = optax.tree.norm(grads) > 0

  def highest(best, u, height):
    higher = height > best[0]
    return jax.tree.map(
      lambda old, new: jnp.where(higher, new, old), best, (height, u)
    )

  def climb(best, index):
    first = (index == 0) & climbs
    u = jax.tree.map(
      lambda x, y: jnp.where(first, x, y),
      uphill,
      _in_ball(jax.random.fold_in(key, index), zero, radius),
    )

    def step(carry, t):
      u, best = carry
      height, grads = value_and_grad(u)
      best = highest(best, u, height)
      ahead = optax.tree.scale(rate * (1 - t / steps), _space.unit(grads))
      return (_projected(optax.tree.add(u, ahead), radius), best), None

    (u, best), _ = jax.lax.scan(
      step, (u, best), jnp.arange(steps, dtype=jnp.float32)
    )
    return highest(best, u, value(u)), None

  (height, u), _ = jax.lax.scan(climb, (start, zero), jnp.arange(restarts))
  return Ascent(height - start, as_tree(u))


def _in_ball(
  key: jax.Array, like: list[jax.Array], radius: jax.Array
) -> list[jax.Array]:
  """A point drawn uniformly from the ball."""
  where, how_far = jax.random.split(key)
  size = sum(x.size for x in like)
  share = jax.random.uniform(how_far, dtype=jnp.float32) ** (1 / size)
  return _space.on_sphere(where, like, radius * share)


def _projected(u: list[jax.Array], radius: jax.Array) -> list[jax.Array]:
  norm = optax.tree.norm(u)
  outside = norm > radius
  return optax.tree.scale(
    jnp.where(outside, radius / jnp.where(outside, norm, 1), 1), u
  )


def _checked_radii(radii: Any) -> jax.Array:
  if not any(isinstance(r, jax.core.Tracer) for r in jax.tree.leaves(radii)):
    known = np.asarray(radii, np.float32)
    if known.ndim != 1 or not np.all(np.isfinite(known) & (known >= 0)):
      raise ValueError(
        "radii are a list of finite numbers of at least 0; got "
        f"{known.tolist()}."
      )
  return jnp.asarray(radii, jnp.float32)
