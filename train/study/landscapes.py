"""The loss around final weights, on a line or a plane."""

from collections.abc import Callable
from typing import Any

import jax

from bilora_jax import sharpness

from ..data.objectives import Objective
from ..methods import method as methods
from . import landscape_rows, measure
from .spec import Landscape

# Kernels are (in, out), under scan with the layers in front.
_INPUT_AXES = -2

Draw = Callable[[Any, Any, Any, jax.Array], dict[str, jax.Array]]


def make(
  method: methods.Method,
  model: Any,
  targets: list[str],
  objective: Objective,
  options: Landscape,
) -> Draw:
  r"""Returns `(variables, evaluated, batches, key)` to the losses.

  .. math:: L(w + s d_1), \qquad L(w + s d_1 + t d_2)

  over the kernels of the adapted layers, merged, along directions that are
  drawn from the key alone and scaled to the norms of each method's own filters.

  Args:
    method: what was trained.
    model: without adapters.
    targets: paths of the kernels.
    objective: what was learned.
    options: of the study.

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
