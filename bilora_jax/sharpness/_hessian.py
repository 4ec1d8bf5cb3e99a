"""The Hessian's largest eigenvalues and trace, from Hessian-vector products."""

from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

from bilora_jax.sharpness import _space
from bilora_jax.sharpness._estimate import Estimate, estimate

Vector = list[jax.Array]


def hessian_eigenvalues(
  loss: _space.Loss,
  params: Any,
  key: jax.Array,
  *,
  count: int = 1,
  iterations: int = 30,
  mask: Any = True,
) -> jax.Array:
  """The largest eigenvalues of the loss's Hessian, by the Lanczos iteration.

  Eigenvalues are ordered with their signs: the first determines worst-case
  sharpness at a minimum. Each result is, up to rounding, a lower bound, which
  rises with more iterations.

  Args:
    loss: `params` to a scalar, twice differentiable; see `over`.
    params: a tree of floats.
    key: random key of the first vector.
    count: number of eigenvalues.
    iterations: number of Hessian-vector products, cut to the number of numbers
      that move. The memory is one float32 copy of these numbers for each
      iteration, plus the memory of one Hessian-vector product.
    mask: which parameters the Hessian is taken in; see `direction`.

  Returns:
    The eigenvalues, descending, `[count]`, float32.

  Raises:
    ImportError: if matfree is missing; the extra `sharpness` installs it.
    ValueError: if the mask does not fit, `count` is below 1, or above
      `iterations` or the number of numbers that move.

  References:
    Lanczos, 1950, with full reorthogonalisation, as in `matfree
    <https://pnkraemer.github.io/matfree/>`_.
  """
  _space.check_at_least(1, count=count)
  decomp, eig, _ = _matfree()
  product, zero = _hessian(loss, params, mask)
  size = sum(x.size for x in zero)
  iterations = min(iterations, size)
  if count > iterations:
    raise ValueError(
      "count is at most the number of iterations and the number of numbers "
      f"that move, here {iterations}; got {count}."
    )
  start, noise = jax.random.split(key)
  # Lanczos vectors lose their orthogonality in less than float32.
  with jax.default_matmul_precision("float32"):
    eigh = eig.eigh_partial(decomp.tridiag_sym(iterations))
    values, _ = eigh(
      _never_stuck(product, noise), _space.on_sphere(start, zero, 1.0)
    )
  return jnp.sort(values, descending=True)[:count]


def hessian_trace(
  loss: _space.Loss,
  params: Any,
  key: jax.Array,
  *,
  draws: int = 16,
  mask: Any = True,
) -> Estimate:
  r"""The trace of the loss's Hessian, by Hutchinson's estimator.

  .. math:: \mathrm{tr}\, H = \mathbb{E}\, v^\top H v, \qquad v_i = \pm 1

  Args:
    loss: `params` to a scalar, twice differentiable; see `over`.
    params: a tree of floats.
    key: random key.
    draws: number of Hessian-vector products, computed one after the other.
    mask: which parameters the Hessian is taken in; see `direction`.

  Returns:
    Mean and standard error. Only the Hessian's off-diagonal elements cause an
    error.

  Raises:
    ImportError: if matfree is missing; the extra `sharpness` installs it.
    ValueError: if the mask does not fit, or there are fewer than 2 draws.

  References:
    Hutchinson, 1990, as in `matfree
    <https://pnkraemer.github.io/matfree/>`_.
  """
  _space.check_at_least(2, draws=draws)
  *_, stochtrace = _matfree()
  product, zero = _hessian(loss, params, mask)
  # One draw at a time: matfree would hold the products of all draws at once.
  one = stochtrace.estimator_monte_carlo(
    stochtrace.monte_carlo_trace(), stochtrace.sampler_signs(zero, num=1)
  )
  return estimate(
    jax.lax.map(lambda k: one(product, k), jax.random.split(key, draws))
  )


def _hessian(
  loss: _space.Loss, params: Any, mask: Any
) -> tuple[Callable[[Vector], Vector], Vector]:
  """The Hessian-vector product, forward over reverse, and a zero vector."""
  value, _, zero = _space.objective(loss, params, mask)
  return lambda v: jax.jvp(jax.grad(value), (zero,), (v,))[1], zero


def _never_stuck(
  product: Callable[[Vector], Vector], key: jax.Array
) -> Callable[[Vector], Vector]:
  """Adds noise of the size of rounding errors to a Hessian-vector product.

  Lanczos divides by zero if a product stays in the space spanned so far, as for
  a Hessian of low rank or with equal eigenvalues. Then the noise is the next
  vector, and the iteration continues in the rest of the space.
  """

  def noisy(v):
    exact = product(v)
    # The key depends on v: matfree does not tell which iteration it is.
    total = sum(jnp.sum(x) for x in v)
    bits = jax.lax.bitcast_convert_type(total, jnp.uint32)
    noise = _space.gaussian(jax.random.fold_in(key, bits), v)
    # At least 1e-15, whose square does not underflow, if the product is zero.
    epsilon = 4 * jnp.finfo(jnp.float32).eps
    size = epsilon * optax.tree.norm(exact) / optax.tree.norm(noise) + 1e-15
    return optax.tree.add_scale(exact, size, noise)

  return noisy


def _matfree() -> tuple[Any, Any, Any]:
  try:
    from matfree import decomp, eig, stochtrace
  except ImportError as error:
    raise ImportError(
      "the Hessian's eigenvalues and trace need matfree, which is not "
      "installed: pip install 'bilora_jax[sharpness]'."
    ) from error
  return decomp, eig, stochtrace
