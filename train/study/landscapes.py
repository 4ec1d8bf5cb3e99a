"""Measures the loss around final weights, on a line or a plane."""

from collections.abc import Callable
from typing import Any

import jax

from bilora_jax import sharpness

from ..data.objectives import Objective
from ..methods import method as methods
from . import landscape_rows, measure
from .spec import Landscape

# Kernels are (in, out), with scan (layers, in, out).
_INPUT_AXES = -2

Draw = Callable[[Any, Any, Any, jax.Array], dict[str, jax.Array]]


def make(
  method: methods.Method,
  model: Any,
  targets: list[str],
  objective: Objective,
  options: Landscape,
) -> Draw:
  r"""Returns a function from `(variables, evaluated, batches, key)` to losses.

  .. math:: L(w + s d_1), \qquad L(w + s d_1 + t d_2)

  Here, w are the merged kernels of the adapted layers. The directions depend
  only on the key, and are scaled to the norms of each method's own filters.

  Args:
    method: the method that trained the weights.
    model: the model without adapters.
    targets: the paths of the kernels.
    objective: the objective of the loss.
    options: the study's options of landscapes.

  References:
    Li et al, `Visualizing the Loss Landscape of Neural Nets
    <https://arxiv.org/abs/1712.09913>`_, 2018, section 4.
  """

  @jax.jit
  def draw(variables, evaluated, data, key):
    merged = method.merged(variables, evaluated)
    kernels, apply = measure.in_kernels(model, merged, targets)
    means, _ = measure.over(apply, objective, data)
    directions = [
      sharpness.filter_normalized(k, kernels, input_axes=_INPUT_AXES)
      for k in jax.random.split(key)
    ]

    def loss(params):
      return means(params)[0]

    steps = landscape_rows.steps(options)
    found = {"line": sharpness.landscape(loss, kernels, directions[:1], steps)}
    if options.plane:
      found["plane"] = sharpness.landscape(loss, kernels, directions, steps)
    return found

  return draw
