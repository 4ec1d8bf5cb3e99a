"""Every kind of adapter in float64 NumPy, with its gradient by hand.

Written without the library. Weights are (in, out), dense; parameters are a dict
by the names of the node's fields.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import reference

Params = dict[str, np.ndarray]


class Kind(NamedTuple):
  """What a kind of adapter does to a kernel.

  Attributes:
    degree: how its weight grows with its parameters.
    delta: `(params, kernel, scale)` to the dense weight that it adds.
    pull: `(params, kernel, scale, G)` to the parameters' gradients, with G that
      of the dense weight.
    fixed: the parameters that are not trained.
  """

  degree: int
  delta: Callable[[Params, np.ndarray, float], np.ndarray]
  pull: Callable[[Params, np.ndarray, float, np.ndarray], Params]
  fixed: tuple[str, ...] = ()


def _pull_lora(p, kernel, s, g):
  return {"a": s * g @ p["b"].T, "b": s * p["a"].T @ g}


def _pull_loha(p, kernel, s, g):
  one, two = p["a1"] @ p["b1"], p["a2"] @ p["b2"]
  return {
    "a1": s * (g * two) @ p["b1"].T,
    "b1": s * p["a1"].T @ (g * two),
    "a2": s * (g * one) @ p["b2"].T,
    "b2": s * p["a2"].T @ (g * one),
  }


def _pull_lokr(p, kernel, s, g):
  u, cols = p["c"].shape
  blocks = s * g.reshape(u, len(p["a"]), cols, -1)
  block = np.einsum("uvpq,up->vq", blocks, p["c"])
  return {
    "c": np.einsum("uvpq,vq->up", blocks, p["a"] @ p["b"]),
    "a": block @ p["b"].T,
    "b": p["a"].T @ block,
  }


def _pull_vera(p, kernel, s, g):
  return {
    "d": np.einsum("ij,ir,rj,j->r", g, p["a"], p["b"], p["g"]),
    "g": np.einsum("ij,ir,rj,r->j", g, p["a"], p["b"], p["d"]),
  }


KERNELS = {
  "lora": Kind(2, lambda p, w, s: s * p["a"] @ p["b"], _pull_lora),
  "loha": Kind(
    4,
    lambda p, w, s: s * (p["a1"] @ p["b1"]) * (p["a2"] @ p["b2"]),
    _pull_loha,
  ),
  "lokr": Kind(
    3, lambda p, w, s: s * np.kron(p["c"], p["a"] @ p["b"]), _pull_lokr
  ),
  "vera": Kind(
    2,
    lambda p, w, s: p["a"] @ np.diag(p["d"]) @ p["b"] @ np.diag(p["g"]),
    _pull_vera,
    fixed=("a", "b"),
  ),
  "ia3": Kind(
    1,
    lambda p, w, s: w @ np.diag(p["gain"]),
    lambda p, w, s, g: {"gain": np.sum(g * w, axis=0)},
    fixed=("norms",),
  ),
}
DEGREES = {
  **{name: kind.degree for name, kind in KERNELS.items()},
  "prompt": 1,
  "bottleneck": 1,
}


class Problem(NamedTuple):
  """Least squares, one to each adapter: inputs, targets, kernels and scales.

  The prompt is in front of `x`, and the sequence is mixed by `mix`; the
  bottleneck, with tanh, is an own network.
  """

  x: dict[str, np.ndarray]
  y: dict[str, np.ndarray]
  kernels: dict[str, np.ndarray]
  scales: dict[str, float]
  mix: np.ndarray


def perturbation(name: str, params: Params, problem: Problem) -> np.ndarray:
  """What the ball takes the norm of, as one vector."""
  if name in KERNELS:
    delta = KERNELS[name].delta
    return delta(params, problem.kernels[name], problem.scales[name]).ravel()
  return np.concatenate([x.ravel() for x in params.values()])


def gradients(
  problem: Problem, primary: dict[str, Params], auxiliary: dict[str, Params]
) -> tuple[dict[str, Params], dict[str, Params]]:
  """Of `sum_j |output_j - y_j|^2 / (2 rows)`, in both parts."""
  of: tuple[dict[str, Params], dict[str, Params]] = ({}, {})
  for name, kind in KERNELS.items():
    kernel, s = problem.kernels[name], problem.scales[name]
    parts = (primary[name], auxiliary[name])
    whole = kernel + sum(kind.delta(p, kernel, s) for p in parts)
    x = problem.x[name]
    g = x.T @ (x @ whole - problem.y[name]) / len(x)
    for grads, p in zip(of, parts):
      grads[name] = kind.pull(p, kernel, s, g)

  tokens = primary["prompt"]["tokens"] + auxiliary["prompt"]["tokens"]
  sequence = np.concatenate([tokens, problem.x["prompt"]])
  residual = problem.mix @ sequence - problem.y["prompt"]
  g = problem.mix[:, : len(tokens)].T @ residual / len(problem.mix)
  for grads in of:
    grads["prompt"] = {"tokens": g}

  x = problem.x["bottleneck"]
  p = {
    k: v + auxiliary["bottleneck"][k] for k, v in primary["bottleneck"].items()
  }
  hidden = np.tanh(x @ p["down"] + p["down_bias"])
  output = x + hidden @ p["up"] + p["up_bias"]
  residual = (output - problem.y["bottleneck"]) / len(x)
  before = (residual @ p["up"].T) * (1 - hidden**2)
  for grads in of:
    grads["bottleneck"] = {
      "down": x.T @ before,
      "down_bias": before.sum(0),
      "up": hidden.T @ residual,
      "up_bias": residual.sum(0),
    }
  return of


def train(
  problem: Problem,
  primary: dict[str, Params],
  auxiliary: dict[str, Params],
  steps: int,
  optimizer: reference.Optimizer,
  rho: float,
) -> tuple[dict[str, Params], dict[str, Params], list[float]]:
  """Ascent and descent from the same gradient, then one ball over all.

  Returns:
    Both parts, and the norm before the clip at each step.
  """
  parts = tuple(
    {name: dict(p) for name, p in part.items()} for part in (primary, auxiliary)
  )
  memory: dict[Any, Any] = {}
  norms = []
  for t in range(1, steps + 1):
    of = gradients(problem, *parts)
    for i, (part, grads) in enumerate(zip(parts, of)):
      for name, by_field in grads.items():
        for field, g in by_field.items():
          value, key = part[name][field], (i, name, field)
          step, memory[key] = optimizer.update(
            -g if i else g, value, memory.get(key, optimizer.init(value)), t
          )
          part[name][field] = value + step
    each = [perturbation(name, p, problem) for name, p in parts[1].items()]
    c = float(np.linalg.norm(np.concatenate(each)))
    norms.append(c)
    if c > rho:
      for name, p in parts[1].items():
        fixed = KERNELS[name].fixed if name in KERNELS else ()
        for field in set(p) - set(fixed):
          p[field] = (rho / c) ** (1 / DEGREES[name]) * p[field]
  return (*parts, norms)
