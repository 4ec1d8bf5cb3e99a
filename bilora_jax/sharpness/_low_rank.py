"""The worst perturbation of low rank: the best possible auxiliary."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilora_jax import _linalg
from bilora_jax.sharpness import _space


class LowRank(NamedTuple):
  """The maximiser of the linearised loss among perturbations of low rank.

  Attributes:
    linearised: the rise of the linearised loss there, float32 scalar.
    rise: the rise of the loss itself there, float32 scalar.
    perturbation: what to add to the parameters, a float32 tree like them.
  """

  linearised: jax.Array
  rise: jax.Array
  perturbation: Any


def low_rank(
  loss: _space.Loss,
  params: Any,
  radius: jax.typing.ArrayLike,
  rank: int,
  *,
  mask: Any = True,
) -> LowRank:
  r"""How far the loss rises at the best possible auxiliary.

  Over matrices :math:`W_l` with :math:`\sum_l \|W_l\|_F^2 \le \rho^2` and rank
  at most r each,

  .. math::

    \max \sum_l \langle G_l, W_l \rangle
    = \rho \sqrt{\sum_l \sum_{i \le r} \sigma_{l,i}^2}
    \quad \text{at} \quad
    W_l = \rho\, \frac{G_{l,r}}{\sqrt{\sum_k \|G_{k,r}\|_F^2}}

  with :math:`G_l` the gradient, :math:`\sigma_{l,i}` its singular values and
  :math:`G_{l,r}` its best approximation of rank r. One normaliser spans all
  layers. The cost is a singular value decomposition of each matrix.

  Args:
    loss: `params` to a scalar.
    params: a tree of floats. The last two axes of a leaf are a matrix,
      `(*batch, in, out)`, with one matrix for each index of the batch axes;
      leaves of fewer axes do not move.
    radius: rho, scalar, in units of the weights.
    rank: r; a gradient of lower rank is not truncated.
    mask: which parameters move; see `direction`.

  Returns:
    The linearised rise, the rise of the loss, and the perturbation.

  Raises:
    ValueError: if the mask does not fit or leaves no matrix, the radius is
      negative or not finite, or the rank is below 1.

  References:
    Liu et al, `Bi-LoRA <https://arxiv.org/abs/2508.19564>`_, 2025, proposition
    3, corrected: as printed, :math:`\rho\, U_r V_r^\top` has norm
    :math:`\rho \sqrt{r}` and leaves the ball.
  """
  _space.check_radius(radius)
  _space.check_at_least(1, rank=rank)
  value, as_tree, zero = _space.objective(loss, params, mask)
  if not any(leaf.ndim >= 2 for leaf in zero):
    raise ValueError(
      "low_rank moves matrices, of 2 or more axes; the parameters that the "
      f"mask selects have the shapes {[leaf.shape for leaf in zero]}."
    )
  start, grads = jax.value_and_grad(value)(zero)
  nearest = [_truncated(g, rank) for g in grads]
  # <G, G_r> / ||G_r|| = ||G_r||, as G - G_r is orthogonal to G_r.
  linearised = jnp.asarray(radius * optax.tree.norm(nearest))
  worst = optax.tree.scale(radius, _space.unit(nearest))
  return LowRank(linearised, value(worst) - start, as_tree(worst))


def _truncated(g: jax.Array, rank: int) -> jax.Array:
  """The best approximation of rank `rank` of each matrix; zero for a vector."""
  if g.ndim < 2:
    return jnp.zeros_like(g)
  u, sigma, vt = _linalg.svd(g)
  return jnp.matmul(
    u[..., :rank] * sigma[..., None, :rank],
    vt[..., :rank, :],
    precision=jax.lax.Precision.HIGHEST,
  )
