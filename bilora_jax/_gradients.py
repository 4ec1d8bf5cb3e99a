"""Baselines that change where the gradient is taken."""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

ValueAndGrad = Callable[..., tuple[Any, Any]]


def sam(
  value_and_grad: ValueAndGrad, rho: float, mask: Any = True
) -> ValueAndGrad:
  r"""Sharpness-Aware Minimization: the gradient at the worst point nearby.

  .. math::

    \epsilon = \rho\, \frac{g(w)}{\|g(w)\|_2}, \qquad
    w \leftarrow w - \eta\, g(w + \epsilon)

  with one norm over all perturbed parameters; without gradient there is no
  perturbation. Of low-rank factors this is LoRA-SAM, whose two gradients a step
  Bi-LoRA does without.

  Args:
    value_and_grad: `(params, *args)` to the value, with auxiliary output if it
      has any, and the gradient; as `jax.value_and_grad` makes it.
    rho: radius of the perturbation, in units of the parameters.
    mask: which parameters are perturbed: a tree of bools like params, or of
      their upper levels, or one bool; or a function from params to it.

  Returns:
    A function like `value_and_grad`, that calls it twice: the value is that at
    `params`, the gradient that at the perturbed parameters.

  Raises:
    ValueError: if rho is negative or not finite.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> value_and_grad = sam(jax.value_and_grad(lambda w: w @ w), rho=0.5)
    >>> value, grad = value_and_grad(jnp.array([3.0, 4.0]))
    >>> print(value, grad)
    25.0 [6.6 8.8]

  References:
    Foret et al, `Sharpness-Aware Minimization
    <https://arxiv.org/abs/2010.01412>`_, 2021, equation (3).
  """
  if not (math.isfinite(rho) and rho >= 0):
    raise ValueError(
      f"rho, the radius of the perturbation, is finite and at least 0; got "
      f"{rho}."
    )

  def at_worst_point_nearby(params, *args, **kwargs):
    value, grads = value_and_grad(params, *args, **kwargs)
    where = mask(params) if callable(mask) else mask
    ascent = jax.tree.map(
      lambda perturbed, part: jax.tree.map(
        # In float32: squares of half-precision gradients underflow.
        lambda g: g.astype(jnp.float32) * perturbed,
        part,
      ),
      where,
      grads,
    )
    norm = optax.tree.norm(ascent)
    # At b = 0, where every adapter starts, the gradient of a is zero.
    scale = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1), 0)
    worst = jax.tree.map(
      lambda p, e: (p + scale * e).astype(p.dtype), params, ascent
    )
    return value, value_and_grad(worst, *args, **kwargs)[1]

  return at_worst_point_nearby
