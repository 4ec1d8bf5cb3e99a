"""Least squares on trees of `Factors`: what the tests of the update train."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference

from bilora_jax import Factors


class Shape(NamedTuple):
  """The shape of one adapted weight, and of its two pairs."""

  batch: tuple[int, ...]
  n: int  # in
  m: int  # out
  r1: int
  r2: int
  s1: float = 1.0
  s2: float = 1.0


# Unequal ranks and scales, and one pair stacked.
SMALL = {
  "x": Shape((), 8, 5, 2, 3, 2.0, 0.5),
  "y": Shape((2,), 4, 6, 3, 1, 1.0, 3.0),
}


def random_shapes(seed: int, pairs: int = 2) -> dict[str, Shape]:
  """Ranks 1 to 16, none to two batch axes, scales of their own."""
  rng = np.random.default_rng(seed)

  def one():
    batch = tuple(rng.integers(1, 4, size=rng.integers(0, 3)).tolist())
    n, m = rng.integers(2, 20, size=2).tolist()
    r1, r2 = rng.choice(np.arange(1, 17), size=2, replace=False).tolist()
    s1, s2 = rng.uniform(0.25, 2.0, size=2).tolist()
    return Shape(batch, n, m, r1, r2, s1, s2)

  return {f"pair{i}": one() for i in range(pairs)}


def make(
  shapes: dict[str, Shape], seed: int = 0, fresh: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Adapters and data, float32; `fresh` as at a run's start, with b = 0.

  NumPy arrays: eager JAX would compile for each of their shapes.
  """
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return np.float32(rng.normal(size=shape))

  def pair(batch, n, m, r, s):
    b = np.zeros((*batch, r, m), np.float32) if fresh else normal(*batch, r, m)
    return Factors(normal(*batch, n, r) / np.float32(np.sqrt(n)), b, s)

  items = shapes.items()
  adapters = {
    "primary": {k: pair(s.batch, s.n, s.m, s.r1, s.s1) for k, s in items},
    "auxiliary": {k: pair(s.batch, s.n, s.m, s.r2, s.s2) for k, s in items},
    "extra": {k: normal(*s.batch, 1, s.m) for k, s in items},
  }
  count = 24  # rows, more than any n: the problem is well conditioned
  data = {
    k: {
      "w0": normal(*s.batch, s.n, s.m),
      "x": normal(*s.batch, count, s.n),
      "y": normal(*s.batch, count, s.m),
    }
    for k, s in items
  }
  return adapters, data


def loss(adapters: dict[str, Any], data: dict[str, Any]) -> jax.Array:
  """`reference.py`'s L; parts that are absent count as zero."""
  total = jnp.float32(0)
  for name, fixed in data.items():
    w = fixed["w0"]
    for part in ("primary", "auxiliary"):
      if part in adapters:
        factors = adapters[part][name]
        w = w + factors.scale * (factors.a @ factors.b)
    residual = fixed["x"] @ w - fixed["y"]
    if "extra" in adapters:
      residual = residual + adapters["extra"][name]
    total += jnp.sum(residual**2) / (2 * residual.shape[-2])
  return total


def step(tx: optax.GradientTransformation) -> Callable[..., Any]:
  """The training step of the README, not jitted."""

  def one(adapters, state, data):
    grads = jax.grad(loss)(adapters, data)
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state

  return one


def train(
  tx: optax.GradientTransformation,
  adapters: dict[str, Any],
  data: dict[str, Any],
  steps: int,
) -> tuple[Any, Any]:
  """The adapters and the state after each step, stacked, as NumPy arrays."""

  @jax.jit
  def run(adapters, data):
    def body(carry, _):
      carry = step(tx)(*carry, data)
      return carry, carry

    start = (adapters, tx.init(adapters))
    return jax.lax.scan(body, start, length=steps)[1]

  return jax.device_get(run(adapters, data))


def at(history: Any, index: int) -> Any:
  """One step of what `train` returned."""
  return jax.tree.map(lambda x: x[index], history)


def dense_norm(auxiliary: Any) -> float:
  """The norm over all pairs by dense products in float64."""
  pairs = jax.tree.leaves(auxiliary, is_leaf=lambda x: isinstance(x, Factors))
  return float(np.sqrt(sum(np.sum(dense(pair) ** 2) for pair in pairs)))


def dense(pair: Factors) -> np.ndarray:
  """The weight of a pair in float64, (*batch, in, out)."""
  a, b = np.asarray(pair.a, np.float64), np.asarray(pair.b, np.float64)
  return pair.scale * (a @ b)


def relative_error(x: Any, y: Any) -> float:
  """The largest ||x - y|| / ||y|| over the arrays of two trees."""
  x, y = jax.tree.leaves(x), jax.tree.leaves(y)
  assert len(x) == len(y) > 0
  return max(_relative(np.float64(p), np.float64(q)) for p, q in zip(x, y))


def _relative(x: np.ndarray, y: np.ndarray) -> float:
  assert x.shape == y.shape
  # Not max(): it drops a NaN.
  size, error = np.linalg.norm(y), np.linalg.norm(x - y)
  assert np.isfinite(error)
  return float(error / size) if size > 0 else float(error)


def to_reference(
  adapters: dict[str, Any], data: dict[str, Any]
) -> tuple[list[reference.Layer], reference.Modules]:
  """The paper's letters: one layer per index of the batch axes, transposed."""
  layers: list[reference.Layer] = []
  modules: reference.Modules = {n: [] for n in ("B1", "A1", "B2", "A2")}

  def matrix(x, index):
    return np.asarray(x, np.float64)[index].T

  for name, fixed in data.items():
    one, two = adapters["primary"][name], adapters["auxiliary"][name]
    for i in np.ndindex(fixed["w0"].shape[:-2]):
      w0, x, y = (matrix(fixed[key], i) for key in ("w0", "x", "y"))
      layers.append(reference.Layer(w0, x, y, one.scale, two.scale))
      modules["B1"].append(matrix(one.b, i))
      modules["A1"].append(matrix(one.a, i))
      modules["B2"].append(matrix(two.b, i))
      modules["A2"].append(matrix(two.a, i))
      if "extra" in adapters:
        modules.setdefault("v", []).append(matrix(adapters["extra"][name], i))
  return layers, modules


def from_reference(
  modules: reference.Modules, like: dict[str, Any]
) -> dict[str, Any]:
  """Undoes `to_reference`: a tree of float64 arrays shaped as `like`."""
  letters = {name: iter(values) for name, values in modules.items()}

  def stacked(letter, x):
    count = int(np.prod(x.shape[:-2]))
    rows = [next(letters[letter]).T for _ in range(count)]
    return np.stack(rows).reshape(x.shape)

  def pairs(tree, which):
    return {
      name: Factors(
        stacked("A" + which, pair.a), stacked("B" + which, pair.b), pair.scale
      )
      for name, pair in tree.items()
    }

  tree: dict[str, Any] = {
    "primary": pairs(like["primary"], "1"),
    "auxiliary": pairs(like["auxiliary"], "2"),
  }
  if "extra" in like:
    tree["extra"] = {k: stacked("v", x) for k, x in like["extra"].items()}
  return tree
