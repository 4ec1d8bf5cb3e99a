"""Least squares on one pair and a bias: the problem, and its gradient."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from bilora_jax import Factors

SCALE = 0.5
ROWS = 8
Weights: TypeAlias = dict[str, Any]


def data() -> tuple[np.ndarray, np.ndarray]:
  """Inputs (8, 4) and outputs (8, 3), float64."""
  draws = np.random.default_rng(0)
  return draws.normal(size=(ROWS, 4)), draws.normal(size=(ROWS, 3))


def weights() -> Weights:
  """`a` (4, 2), `b` (2, 3) and the bias `c` (3,), float64."""
  draws = np.random.default_rng(1)
  shapes = {"a": (4, 2), "b": (2, 3), "c": (3,)}
  return {name: draws.normal(size=shape) for name, shape in shapes.items()}


def params(w: Weights, dtype: Any = jnp.float32) -> dict[str, Any]:
  """The weights as they are trained."""
  a, b, c = (jnp.asarray(w[name], dtype) for name in "abc")
  return {"bias": c, "layer": Factors(a, b, SCALE)}


def named(tree: Any) -> Weights:
  """What `params` was given."""
  return {"a": tree["layer"].a, "b": tree["layer"].b, "c": tree["bias"]}


def losses(tree: Any, x: jax.Array, y: jax.Array) -> jax.Array:
  """The mean square of each row's error, (B,)."""
  w = named(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree))
  return jnp.mean((SCALE * x @ w["a"] @ w["b"] + w["c"] - y) ** 2, axis=1)


def loss(tree: Any, x: jax.Array, y: jax.Array) -> jax.Array:
  """Their mean."""
  return jnp.mean(losses(tree, x, y))


def rows(w: Weights, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """`losses` in float64."""
  return np.mean((SCALE * x @ w["a"] @ w["b"] + w["c"] - y) ** 2, axis=1)


def gradient(w: Weights, x: np.ndarray, y: np.ndarray) -> Weights:
  """The gradient of `loss` in float64."""
  error = 2 * (SCALE * x @ w["a"] @ w["b"] + w["c"] - y) / y.size
  return {
    "a": SCALE * x.T @ error @ w["b"].T,
    "b": SCALE * (x @ w["a"]).T @ error,
    "c": error.sum(0),
  }
