"""Lanczos and Hutchinson, against `jax.hessian`."""

import sys

import jax
import jax.extend.core
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import quadratic

from bilora_jax import sharpness

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(16, 4)))
Y = np.float32(RNG.normal(size=(16, 2)))
PARAMS = {
  "u": jnp.float32(RNG.normal(size=(4, 5))),
  "bias": jnp.float32(RNG.normal(size=5)),
  "v": jnp.float32(RNG.normal(size=(5, 2))),
}


def _loss(params):
  hidden = jnp.tanh(X @ params["u"] + params["bias"])
  return jnp.mean((hidden @ params["v"] - Y) ** 2)


def _eigenvalues(loss, params, **options):
  return jax.jit(
    lambda params: sharpness.hessian_eigenvalues(loss, params, KEY, **options)
  )(params)


def _dense(mask):
  """The Hessian in what moves, by JAX, without our product."""
  moved = {k: PARAMS[k] for k in PARAMS if mask[k]}
  flat, unravel = jax.flatten_util.ravel_pytree(moved)
  dense = jax.jit(jax.hessian(lambda x: _loss({**PARAMS, **unravel(x)})))
  return np.asarray(dense(flat), np.float64)


MASKS = [dict.fromkeys(PARAMS, True), {"u": False, "bias": True, "v": True}]


@pytest.mark.parametrize("mask", MASKS, ids=["all", "without u"])
def test_eigenvalues_are_those_of_the_dense_hessian(mask):
  expected = np.linalg.eigvalsh(_dense(mask))[::-1]
  # Of the part, more iterations than it has dimensions.
  ours = _eigenvalues(_loss, PARAMS, count=5, iterations=25, mask=mask)
  np.testing.assert_allclose(ours, expected[:5], rtol=1e-3, atol=1e-4)


def test_fewer_iterations_are_a_lower_bound_that_rises():
  top = np.linalg.eigvalsh(_dense(MASKS[0]))[-1]
  one, few = (
    float(_eigenvalues(_loss, PARAMS, iterations=n)[0]) for n in (1, 4)
  )
  assert one < few - 0.05 * top
  # Rounding.
  assert few < top * (1 + 1e-5)


def test_invariant_subspaces_do_not_end_the_iteration():
  @jax.jit
  def ours(hessian):
    return sharpness.hessian_eigenvalues(
      quadratic.loss(hessian, np.ones(7)),
      quadratic.tree(np.ones(7)),
      KEY,
      count=7,
    )

  # Zero, a multiple of one, both exact; of rank one; of repeated eigenvalues.
  for eigenvalues, dense in (
    ([0.0] * 7, np.diag),
    ([2.0] * 7, np.diag),
    ([0.0] * 6 + [5.0], quadratic.symmetric),
    ([-9.0, -9, 1, 1, 1, 4, 4], quadratic.symmetric),
  ):
    np.testing.assert_allclose(
      ours(dense(np.array(eigenvalues))), eigenvalues[::-1], atol=1e-4
    )


def test_the_trace_is_that_of_the_dense_hessian():
  hessian = _dense(MASKS[1])
  mean, error = jax.jit(
    lambda params: sharpness.hessian_trace(
      _loss, params, KEY, draws=500, mask=MASKS[1]
    )
  )(PARAMS)
  # Var v'Hv = 2 sum_{i != j} H_ij^2 for random signs.
  off = hessian - np.diag(np.diag(hessian))
  expected = np.sqrt(2 * np.sum(off**2) / 500)
  assert float(error) == pytest.approx(expected, rel=0.2)
  assert abs(float(mean) - np.trace(hessian)) < 4 * expected


def test_a_diagonal_hessian_needs_no_luck():
  diagonal = np.arange(-1.0, 6)
  loss = quadratic.loss(np.diag(diagonal), np.ones(7))
  mean, error = jax.jit(
    lambda params: sharpness.hessian_trace(loss, params, KEY, draws=2)
  )(quadratic.tree(np.ones(7)))
  assert float(mean) == pytest.approx(np.sum(diagonal), rel=1e-5)
  assert float(error) < 1e-4


def test_half_precision_parameters_have_float32_products():
  params = {k: x.astype(jnp.bfloat16) for k, x in PARAMS.items()}

  def loss(params):
    return _loss({k: x.astype(jnp.float32) for k, x in params.items()})

  ours = _eigenvalues(loss, params, iterations=20)
  assert ours.dtype == jnp.float32
  # Parameters, and vectors on their way in and out, are rounded by 0.4%.
  top = np.linalg.eigvalsh(_dense(MASKS[0]))[-1]
  np.testing.assert_allclose(ours, [top], rtol=2e-2)


def test_nothing_is_as_large_as_a_hessian():
  n = sum(x.size for x in PARAMS.values())
  iterations = 6

  def both(params):
    return (
      sharpness.hessian_eigenvalues(_loss, params, KEY, iterations=iterations),
      sharpness.hessian_trace(_loss, params, KEY, draws=200),
    )

  def sizes(jaxpr):
    for equation in jaxpr.eqns:
      yield from (v.aval.size for v in equation.outvars)
    for inner in jax.extend.core.subjaxprs(jaxpr):
      yield from sizes(inner)

  largest = max(sizes(jax.make_jaxpr(both)(PARAMS).jaxpr))
  # The Lanczos vectors, and of 200 draws the keys, of two numbers each.
  assert n * iterations <= largest <= 2 * 200 < n * n


def test_counts_that_cannot_be_are_refused():
  w = jnp.ones(3)
  with pytest.raises(ValueError, match=r"count .*at least 1; got 0"):
    sharpness.hessian_eigenvalues(jnp.sum, w, KEY, count=0)
  with pytest.raises(ValueError, match=r"here 3; got 4"):
    sharpness.hessian_eigenvalues(jnp.sum, w, KEY, count=4)
  with pytest.raises(ValueError, match=r"draws .*at least 2; got 1"):
    sharpness.hessian_trace(jnp.sum, w, KEY, draws=1)


def test_without_matfree_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "matfree", None)
  with pytest.raises(ImportError, match=r"bilora_jax\[sharpness\]"):
    sharpness.hessian_trace(jnp.sum, jnp.ones(3), KEY)
