"""Training by the equations in float64 NumPy, each method's own in a hook."""

from collections.abc import Callable
from typing import Any

import numpy as np
import reference

# `(modules, grads or memories, t)`, to be changed in place; t counts from 0.
Hook = Callable[[reference.Modules, Any, int], None]


def train(
  layers: list[reference.Layer],
  modules: reference.Modules,
  steps: int,
  optimizers: dict[str, reference.Optimizer],
  before: Hook | None = None,
  after: Hook | None = None,
) -> reference.Modules:
  """Runs the optimizers, by module; the others stay.

  The auxiliary's are fed the negated gradient. `before` sees the gradients,
  which are then not taken anew, and `after` what the optimizers remember.
  """
  modules = {name: list(values) for name, values in modules.items()}
  memories = {
    name: [optimizer.init(x) for x in modules[name]]
    for name, optimizer in optimizers.items()
  }
  for t in range(steps):
    grads = reference.gradients(layers, modules)
    if before is not None:
      before(modules, grads, t)
    for name, optimizer in optimizers.items():
      sign = -1 if name in ("B2", "A2") else 1
      for j, value in enumerate(modules[name]):
        step, memories[name][j] = optimizer.update(
          sign * grads[name][j], value, memories[name][j], t + 1
        )
        modules[name][j] = value + step
    if after is not None:
      after(modules, memories, t)
  return modules


def clip(
  layers: list[reference.Layer],
  modules: reference.Modules,
  radius: float,
  each: bool = False,
) -> list[tuple[float, float]]:
  """Equation (10), in place; what each layer's B2 and A2 were multiplied by."""
  sizes = reference.norms(layers, modules)
  if not each:
    sizes = np.full_like(sizes, np.linalg.norm(sizes))
  factors = []
  for j, size in enumerate(sizes):
    f = np.sqrt(radius / size) if size > radius else 1.0
    # At rho = 0 A2 stays.
    factors.append((f, f if radius > 0 else 1.0))
    modules["B2"][j] = factors[j][0] * modules["B2"][j]
    modules["A2"][j] = factors[j][1] * modules["A2"][j]
  return factors
