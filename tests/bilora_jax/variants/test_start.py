"""The auxiliary's random start."""

import functools

import jax
import numpy as np
import problems
import pytest

from bilora_jax import Factors
from bilora_jax.variants import scattered

RADIUS = 0.07


def pair(n, r, m, scale, batch=()):
  a, b = np.zeros((*batch, n, r)), np.ones((*batch, r, m))
  return Factors(np.float32(a), np.float32(b), scale)


@functools.cache
def start(seed):
  tree = {
    "small": pair(30, 8, 50, 4.0),
    "large": pair(90, 2, 60, 0.25),
    "stacked": pair(40, 4, 40, 1.0, batch=(3,)),
  }
  adapters = {"primary": tree, "auxiliary": tree, "extra": {}}
  run = jax.jit(lambda key: scattered(key, adapters, RADIUS))
  return adapters, run(jax.random.key(seed, impl="unsafe_rbg"))


def test_it_lies_on_the_sphere():
  _, after = start(0)
  # Rounding to float32.
  norm = problems.dense_norm(after["auxiliary"])
  assert norm == pytest.approx(RADIUS, rel=1e-6)


def test_every_entry_has_the_same_variance():
  _, after = start(0)
  weights = {k: problems.dense(p) for k, p in after["auxiliary"].items()}
  entries = sum(w.size for w in weights.values())
  for weight in weights.values():
    ratio = np.mean(weight**2) / (RADIUS**2 / entries)
    # Of a Gaussian product the mean square varies by some
    # sqrt(2/n + 2/m) / sqrt(r), 0.17 at most here.
    assert 0.5 < ratio < 1.6
  # The factors share the size.
  for p in after["auxiliary"].values():
    assert 0.5 < np.mean(np.square(p.a)) / np.mean(np.square(p.b)) < 2


def test_all_else_stays_and_no_two_pairs_are_alike():
  before, after = start(0)
  for x, y in zip(
    jax.tree.leaves(before["primary"]), jax.tree.leaves(after["primary"])
  ):
    np.testing.assert_array_equal(x, y)
  stacked = np.asarray(after["auxiliary"]["stacked"].a)
  small = np.asarray(after["auxiliary"]["small"].b)
  rows = [*stacked.reshape(3, -1)[:, :32], small.reshape(-1)[:32]]
  correlation = np.corrcoef(rows) - np.eye(4)
  assert np.max(np.abs(correlation)) < 0.7


@pytest.mark.parametrize("radius", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_radii_are_refused(radius):
  adapters, _ = problems.make(problems.SMALL)
  with pytest.raises(ValueError, match=r"radius.* positive and finite; got"):
    scattered(jax.random.key(0), adapters, radius)


def test_what_has_no_auxiliary_is_refused():
  key = jax.random.key(0)
  with pytest.raises(ValueError, match=r"no auxiliary.* hold \['primary'\]"):
    scattered(key, {"primary": {}}, RADIUS)
  with pytest.raises(ValueError, match="scattered needs a tree of Factors"):
    scattered(key, {"primary": {}, "auxiliary": np.ones(2)}, RADIUS)
