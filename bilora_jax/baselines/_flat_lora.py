"""Flat-LoRA: noise on the whole weights while the adapters are trained.

With a loss of `{'trained': adapters, 'weights': weights}`,

  def merged(params):
    pair = params['trained']['w']
    return {'w': params['weights']['w'] + pair.weight()}

  estimator = baselines.flat_lora(
    0.05, steps, merged, mask={'trained': False, 'weights': True}
  )
  params = {'trained': adapters, 'weights': weights}
  state, opt_state = estimator.init(params), tx.init(params['trained'])
  for key, batch in batches:
    (loss, grads), state = estimator.estimate(
      jax.value_and_grad(loss_fn), state, key, params, batch
    )
    updates, opt_state = tx.update(
      grads['trained'], opt_state, params['trained']
    )
    trained = optax.apply_updates(params['trained'], updates)
    params = {**params, 'trained': trained}
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilora_jax.baselines import _estimator
from bilora_jax.baselines._estimator import GradientEstimator


class FlatLoRAState(NamedTuple):
  """State of `flat_lora`.

  Attributes:
    count: number of steps so far, int32 scalar.
  """

  count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def flat_lora(
  rho: float,
  steps: int,
  merged: Callable[[Any], Any],
  mask: Any,
  *,
  input_axes: Any = None,
) -> GradientEstimator:
  r"""Flat-LoRA: random perturbation of whole weights, in proportion to them.

  Let :math:`W'` be the merged weights, (in, out) like JAX's kernels. In step t
  of T, the gradient is taken at :math:`W' + e`,

  .. math::

    e_{ij} \sim N\!\left(
      0,\, \Big(f_t\, \rho\, \frac{\|W'_{:j}\|_2}{\sqrt n}\Big)^2\right),
    \qquad f_t = \frac{1 - \cos(\pi t / T)}{2}

  where n is the length of column j, the weights of one output; in the paper a
  row, as its weights are (out, in). The noise is drawn from the step's key,
  added to the frozen weights and never stored; it is zero in the first step.

  Args:
    rho: size of the noise, relative to the weights.
    steps: T, number of steps of the run; later steps have the full noise.
    merged: function from params to the weights that the layers compute with,
      `W0 + scale * a @ b`: one for each leaf that `mask` selects, in the same
      order and of the same shape.
    mask: which parameters the noise is added to, as in `sam`. To train
      adapters, differentiate `{'trained': adapters, 'weights': kernels}` with
      the mask `{'trained': False, 'weights': True}` and use the gradient of
      `'trained'` only: under `jax.jit` the other gradient is never computed.
    input_axes: the axes of a weight that belong to one output: a tuple of ints,
      or a tree of tuples like params or like their upper levels (None where
      there is no noise), or a function from params to either. By default all
      axes but the last; for layers stacked along a first axis, `(-2,)`.

  Returns:
    A `GradientEstimator` with a counter as state, of one gradient a step: value
    and gradient are those at the perturbed parameters.

  Raises:
    ValueError: if rho is negative or not finite, or steps is below 1; on
      estimate, if the merged weights do not have the shapes of the perturbed
      parameters.

  References:
    Li et al, `Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape
    <https://arxiv.org/abs/2409.14396>`_, 2025.
  """
  _estimator.check_size("rho", "the size of the noise", rho)
  _estimator.check_steps("steps", "of the whole run", steps)

  def init(params):
    del params
    return FlatLoRAState(count=jnp.zeros([], jnp.int32))

  def estimate(value_and_grad, state, key, params, *args, **kwargs):
    kernels = _estimator.selected(params, mask, params)
    weights = _like(kernels, merged(params))
    axes = _axes(input_axes, params, kernels)
    done = jnp.minimum(state.count / steps, 1.0)
    size = rho * (1 - jnp.cos(math.pi * done)) / 2

    def noise(weight, draw, axis):
      # The root mean square is the norm over the root of n.
      square = jnp.mean(weight.astype(jnp.float32) ** 2, axis, keepdims=True)
      return size * jnp.sqrt(square) * draw

    draws = _estimator.drawn(_estimator.normal, key, kernels)
    shift = jax.tree.map(noise, weights, draws, axes)
    near = _estimator.shifted(params, shift)
    count = jnp.asarray(optax.safe_increment(state.count))
    return value_and_grad(near, *args, **kwargs), FlatLoRAState(count)

  return GradientEstimator(init, estimate)


def _like(kernels: Any, merged: Any) -> Any:
  """The merged weights in the structure of the perturbed parameters."""
  leaves, structure = jax.tree.flatten(kernels)
  weights = jax.tree.leaves(merged)
  wanted, got = [x.shape for x in leaves], [jnp.shape(x) for x in weights]
  if wanted != got:
    raise ValueError(
      "merged returns one weight, of the same shape, for each parameter that "
      f"the mask selects; expected the shapes {wanted}, got {got}."
    )
  return structure.unflatten(weights)


def _axes(input_axes: Any, params: Any, kernels: Any) -> Any:
  """The axes of each kernel that belong to one output."""
  prefix = input_axes(params) if callable(input_axes) else input_axes
  return jax.tree.map(
    lambda axes, part: jax.tree.map(
      lambda x: tuple(range(x.ndim - 1)) if axes is None else axes, part
    ),
    prefix,
    kernels,
    is_leaf=lambda node: node is None or _is_axes(node),
  )


def _is_axes(node: Any) -> bool:
  return isinstance(node, tuple) and all(isinstance(i, int) for i in node)
