"""Equations (9) and (10) of the Bi-LoRA paper, in float64 NumPy.

Written from the paper (arXiv 2508.19564), in its letters and shapes, and
without the library: layer j has a frozen `W0` (m, n), and modules `B` (m, r)
and `A` (r, n). The problem is least squares, with the gradient by hand:

  L = sum_j 1/(2k) ||(W0 + s1 B1 A1 + s2 B2 A2) X + v - Y||_F^2,
  G = dL/dW = R X^T / k with R the residual.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np

# 'B1', 'A1', 'B2', 'A2' and, if anything else is trained, 'v'; by layer.
Modules = dict[str, list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Layer:
  """What is fixed in one layer: weight, inputs, targets and scales."""

  W0: np.ndarray  # (m, n)
  X: np.ndarray  # (n, k)
  Y: np.ndarray  # (m, k)
  s1: float
  s2: float


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """`update(gradient, value, memory, t)` is the step and the new memory."""

  init: Callable[[np.ndarray], Any]
  update: Callable[..., tuple[np.ndarray, Any]]


def sgd(eta: float) -> Optimizer:
  """Gradient descent."""
  return Optimizer(lambda _: None, lambda g, *_: (-eta * g, None))


def adamw(
  eta: float,
  weight_decay: float = 0.0,
  beta1: float = 0.9,
  beta2: float = 0.999,
  eps: float = 1e-8,
) -> Optimizer:
  """Kingma & Ba, algorithm 1; Loshchilov & Hutter, algorithm 2, with decay."""

  def update(g, value, memory, t):
    m, v = memory
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    step = m_hat / (np.sqrt(v_hat) + eps) + weight_decay * value
    return -eta * step, (m, v)

  return Optimizer(lambda x: (np.zeros_like(x), np.zeros_like(x)), update)


def gradients(layers: list[Layer], modules: Modules) -> Modules:
  """dL/dB = s G A^T, dL/dA = s B^T G, dL/dv = R 1 / k, at equal values."""
  grads: Modules = {name: [] for name in modules}
  for j, layer in enumerate(layers):
    B1, A1, B2, A2 = (modules[name][j] for name in ("B1", "A1", "B2", "A2"))
    v = modules["v"][j] if "v" in modules else 0.0
    k = layer.X.shape[1]
    W = layer.W0 + layer.s1 * B1 @ A1 + layer.s2 * B2 @ A2
    R = W @ layer.X + v - layer.Y
    G = R @ layer.X.T / k
    grads["B1"].append(layer.s1 * G @ A1.T)
    grads["A1"].append(layer.s1 * B1.T @ G)
    grads["B2"].append(layer.s2 * G @ A2.T)
    grads["A2"].append(layer.s2 * B2.T @ G)
    if "v" in modules:
      grads["v"].append(R.sum(axis=1, keepdims=True) / k)
  return grads


def norms(layers: list[Layer], modules: Modules) -> np.ndarray:
  """||s2 B2 A2||_F of each layer, through the dense product."""
  return np.array(
    [
      np.linalg.norm(layer.s2 * B2 @ A2)
      for layer, B2, A2 in zip(layers, modules["B2"], modules["A2"])
    ]
  )


def train(
  layers: list[Layer],
  modules: Modules,
  steps: int,
  optimizer: Optimizer,
  rho: Callable[[int], float],
  auxiliary_optimizer: Optimizer | None = None,
  clip: str | None = "global",
  direction: str = "ascent",
) -> tuple[Modules, list[float], list[float]]:
  """Runs equation (9), then (10), `steps` times.

  Returns:
    The modules, and for each step the norm c before the clip and the smallest
    factor of the clip.
  """
  modules = {name: list(values) for name, values in modules.items()}
  of = dict.fromkeys(modules, optimizer)
  if auxiliary_optimizer is not None:
    of["B2"] = of["A2"] = auxiliary_optimizer
  memories = {n: [of[n].init(x) for x in modules[n]] for n in modules}
  cs, factors = [], []
  for t in range(1, steps + 1):
    grads = gradients(layers, modules)
    for name in modules:
      sign = -1 if name in ("B2", "A2") and direction == "ascent" else 1
      for j, value in enumerate(modules[name]):
        step, memories[name][j] = of[name].update(
          sign * grads[name][j], value, memories[name][j], t
        )
        modules[name][j] = value + step
    radius, each = rho(t - 1), norms(layers, modules)
    c = np.sqrt(np.sum(each**2))
    balls = each if clip == "layer" else np.full_like(each, c)
    factor = [
      np.sqrt(radius / ball) if clip is not None and ball > radius else 1.0
      for ball in balls
    ]
    for name in ("B2", "A2"):
      modules[name] = [f * x for f, x in zip(factor, modules[name])]
    cs.append(float(c))
    factors.append(float(min(factor)))
  return modules, cs, factors
