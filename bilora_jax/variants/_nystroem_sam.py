"""SAM of the whole weights, with the memory of SAM of the factors."""

from bilora_jax import _norms, _partition
from bilora_jax.baselines import _estimator
from bilora_jax.baselines._estimator import GradientEstimator
from bilora_jax.variants import _sketches


def nystroem_sam(
  rho: float, rank: int = 16, core_rank: int | None = None
) -> GradientEstimator:
  r"""SAM of the whole weights, without the gradient of any whole weight.

  SAM's perturbation of a weight is :math:`\rho\, G / \|G\|_F`, and the
  gradient G is as large as the weight. Here a pair :math:`W = s\,a\,b` is added
  to the primary. At first the pair's factors are random and orthonormal, times
  a small number, and perturb next to nothing; their gradients are two thin
  sketches of G. Then the pair becomes the generalised Nystroem approximation of
  G from these sketches,

  .. math::

    W' = \rho\, \frac{\hat G}{\|\hat G\|_F}, \qquad
    \hat G = (G b^\top)\, (a^\top G b^\top)_k^+\, (a^\top G),

  with one norm over all pairs. The second gradient is taken with this pair
  added, in the primary and in all other trained parameters. If every G has rank
  k or less, this is `sam` of the whole weights.

  Args:
    rho: radius of the perturbation, in units of the weights.
    rank: r, rank of the sketches.
    core_rank: k, rank of the perturbation; by default half of `rank`. The core
      has as many columns as rows, and its smaller singular values are noise:
      without the cut, the approximation is worthless.

  Returns:
    A `GradientEstimator` without state, of two gradients a step. The value is
    taken at the sketches, which is `params` up to rounding; the gradient is
    taken at the perturbed weights. Its params are adapters without an
    auxiliary; its `value_and_grad` must also take adapters with an auxiliary of
    rank r.

  Raises:
    ValueError: if rho is negative or not finite, rank is below 1, or core_rank
      is not from 1 to rank; on estimate, if params are not adapters, or have an
      auxiliary.

  References:
    Nakatsukasa, `Fast and stable randomized low-rank matrix approximation
    <https://arxiv.org/abs/2009.11392>`_, 2020, and Tropp et al, `Practical
    sketching algorithms for low-rank matrix approximation
    <https://arxiv.org/abs/1609.00048>`_, 2017, for the approximation; Foret et
    al, `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_,
    2021, for the perturbation that it approximates.
  """
  _estimator.check_size("rho", "the radius of the perturbation", rho)
  if rank < 1:
    raise ValueError(f"rank, of the sketches, is at least 1; got {rank}.")
  _sketches.core_rank_of(rank, core_rank)

  def estimate(value_and_grad, state, key, params, *args, **kwargs):
    _partition.check_parts(params)
    if "auxiliary" in params:
      raise ValueError(
        "nystroem_sam adds an auxiliary to the adapters, which must have none; "
        f"they hold {sorted(params)}."
      )
    _norms.pairs(params["primary"], user="nystroem_sam")

    def beside(pairs):
      return value_and_grad({**params, "auxiliary": pairs}, *args, **kwargs)

    sketches = _sketches.drawn(key, params["primary"], rank)
    value, grads = beside(sketches)
    worst = _sketches.ascent(sketches, grads["auxiliary"], core_rank, rho)
    _, grads = beside(worst)
    return (value, {part: grads[part] for part in params}), state

  return GradientEstimator(_estimator.stateless, estimate)
