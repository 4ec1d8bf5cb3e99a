"""EFlat-LoRA: a perturbation of the whole weights, carried by the factor `b`.

With `loss_fn(params, batch)` and any optimizer `tx`,

  estimator = baselines.eflat_lora(rho=0.05)
  state, opt_state = estimator.init(params), tx.init(params)
  for key, batch in batches:
    (loss, grads), state = estimator.estimate(
      jax.value_and_grad(loss_fn), state, key, params, batch
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from bilora_jax import _linalg
from bilora_jax._factors import Factors, is_factors
from bilora_jax.baselines import _estimator
from bilora_jax.baselines._estimator import GradientEstimator


class EFlatLoRAState(NamedTuple):
  """State of `eflat_lora`.

  Attributes:
    count: number of steps so far, int32 scalar.
    average: the average perturbation of each perturbed `b`: like params,
      float32, and None at all other leaves.
  """

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
  average: Any


def eflat_lora(
  rho: float, beta: float = 0.1, mask: Any = True
) -> GradientEstimator:
  r"""EFlat-LoRA, later named EFMLoRA: SAM of the whole weights, one gradient.

  A pair has the weight :math:`s\,ab`. Step t takes its one gradient at
  :math:`\tilde b = b + \hat E_{t-1}`. From this gradient it estimates the
  gradient in the whole weight,

  .. math::

    \bar G = \frac{1}{2s} \left( (a^\top)^+ g_b + g_a (\tilde b^\top)^+ \right),

  then the part of SAM's perturbation that `b` alone can carry, and its average:

  .. math::

    E_t = \frac{\rho}{s}\, a^+ \frac{\bar G}{\|\bar G\|_F}, \qquad
    \hat E_t = (1 - \beta)\, \hat E_{t-1} + \beta E_t .

  The first gradient is plain, and :math:`\hat E_1 = E_1`. No (in, out) matrix
  is formed: the estimate is a pair of rank 2r.

  The paper's weights are (out, in): its A and B are the transposed `a` and `b`.
  This implementation interprets the paper at four points. Equation (9) of the
  paper multiplies the perturbation by the gradient's sign, which would lose the
  sign; equation (16) and the proofs do not, and neither does this function. The
  paper writes the norm for one weight; here one norm is over all pairs, as in
  SAM. The paper does not say at which `b` the estimate is taken; here it is the
  `b` of the gradient. The paper lets rho fall during training, without a rule
  except :math:`\rho_0 / \sqrt t` in Theorem 2; here rho is the argument.

  Args:
    rho: radius of the perturbation of all whole weights together, in units of
      the weights.
    beta: weight of the newest perturbation in the average, in (0, 1]; with 1,
      only the last step counts. The paper's value could not be found.
    mask: which pairs are perturbed, as in `sam`: a pair is perturbed if both
      its factors are selected. Parameters outside of pairs are not perturbed.

  Returns:
    A `GradientEstimator` whose state has the size of the perturbed `b`, of one
    gradient a step: value and gradient are those at the perturbed parameters.

  Raises:
    ValueError: if rho is negative or not finite, or beta is not in (0, 1]; on
      init, if the mask selects parameters, but no whole pair.

  References:
    Deng et al, `Efficiently Seeking Flat Minima for Better Generalization in
    Fine-Tuning Large Language Models and Beyond
    <https://arxiv.org/abs/2508.00522>`_, 2025, version 3, equations (10) to
    (18) and algorithm 2.
  """
  _estimator.check_size("rho", "the radius of the perturbation", rho)
  _estimator.check_size("beta", "the weight of the newest perturbation", beta)
  if not isinstance(beta, jax.core.Tracer) and not 0 < beta <= 1:
    raise ValueError(f"beta is above 0 and at most 1; got {beta}.")

  def init(params):
    chosen = _estimator.selected(params, mask, params)
    if jax.tree.leaves(chosen) and not any(
      _is_whole(node) for node in jax.tree.leaves(chosen, is_leaf=is_factors)
    ):
      raise ValueError(
        "eflat_lora perturbs low-rank pairs, of which the mask must select "
        "both factors; it selects none among the parameters."
      )
    return EFlatLoRAState(
      count=jnp.zeros([], jnp.int32),
      average=_of_pairs(
        lambda pair: Factors(None, jnp.zeros_like(pair.b), pair.scale), chosen
      ),
    )

  def estimate(value_and_grad, state, key, params, *args, **kwargs):
    del key
    near = _estimator.shifted(params, state.average)
    value, grads = value_and_grad(near, *args, **kwargs)
    new = _carried(
      rho,
      _estimator.selected(near, mask, params),
      _estimator.selected(grads, mask, params),
    )
    weight = jnp.where(state.count == 0, 1.0, beta)
    average = jax.tree.map(
      lambda old, new: (1 - weight) * old + weight * new, state.average, new
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    return (value, grads), EFlatLoRAState(count, average)

  return GradientEstimator(init, estimate)


def _carried(rho: Any, params: Any, grads: Any) -> Any:
  """The perturbation of each `b`, from the gradients."""
  estimates = _of_pairs(_estimate, params, grads)
  # One norm over all weights, as in SAM.
  norm = optax.tree.norm(
    [x.frobenius_norm() for x in jax.tree.leaves(estimates, is_leaf=is_factors)]
  )
  size = _estimator.quotient(rho, norm)

  def carried(pair, estimate):
    inverse = jnp.swapaxes(estimate.a[..., : pair.rank], -1, -2)
    inner = _matmul(inverse, estimate.a)
    # The scale of the estimate, over that of the pair whose part `b` is.
    scale = size * estimate.scale / pair.scale
    return Factors(None, scale * _matmul(inner, estimate.b), pair.scale)

  return _of_pairs(carried, params, estimates)


def _estimate(pair: Factors, grad: Factors) -> Factors:
  """The whole weight's gradient, of rank 2r, from the factors' gradients."""
  half = 0.5 / pair.scale
  a, b = (jnp.swapaxes(_linalg.pinv(x), -1, -2) for x in (pair.a, pair.b))
  return Factors(a, grad.b, half).join(Factors(grad.a, b, half))


def _of_pairs(function: Callable[..., Factors], *trees: Any) -> Any:
  """Applies a function to whole pairs; all other leaves become None."""
  return jax.tree.map(
    lambda node, *others: (
      function(node, *others)
      if _is_whole(node)
      else jax.tree.map(lambda _: None, node)
    ),
    *trees,
    is_leaf=is_factors,
  )


def _is_whole(node: Any) -> bool:
  return is_factors(node) and node.a is not None and node.b is not None


_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
