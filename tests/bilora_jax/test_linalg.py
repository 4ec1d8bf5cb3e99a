"""Decompositions of batches: as NumPy's, and never two of a batch at once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilora_jax import Factors, _linalg, sharpness, variants


def _drawn(*shape):
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


_TALL = _drawn(2, 3, 7, 4)
_CASES = {
  "svd": (_linalg.svd, lambda x: np.linalg.svd(x, full_matrices=False), _TALL),
  "qr": (_linalg.qr, np.linalg.qr, _TALL),
  "eigh": (_linalg.eigh, np.linalg.eigh, _TALL.mT @ _TALL),
}


@pytest.mark.parametrize("name", _CASES)
def test_a_batch_is_decomposed_as_numpy_does(name):
  ours, theirs, x = _CASES[name]
  wanted = theirs(x)
  for decompose in (
    ours,
    jax.jit(ours),
    jax.vmap(ours),
    jax.vmap(jax.vmap(ours)),
  ):
    for found, part in zip(decompose(x), wanted, strict=True):
      assert found.shape == part.shape
      # Up to the signs of the vectors.
      np.testing.assert_allclose(np.abs(found), np.abs(part), atol=2e-5)


def test_a_pseudo_inverse_is_numpys_and_that_of_no_rank_is_zero():
  lost = _TALL.copy()
  lost[..., 1] = lost[..., 0]  # of rank 3, up to float32
  for x in (_TALL, _TALL.mT, lost, np.zeros((2, 5, 3), np.float32)):
    wanted = np.linalg.pinv(np.float64(x), rcond=1e-6)
    np.testing.assert_allclose(_linalg.pinv(x), wanted, atol=2e-5)


def _of_singular_values(shape, values):
  rng = np.random.default_rng(1)
  u, v = (np.linalg.qr(rng.standard_normal((n, len(values))))[0] for n in shape)
  return np.float32(37.0 * (u * values) @ v.T)


_SINGULAR_VALUES = {
  "equal": np.ones(4),
  "far apart": np.geomspace(1, 1e-6, 4),
  "of half the rank": np.array([1.0, 1.0, 0.0, 0.0]),
  "zero": np.zeros(4),
}


@pytest.mark.parametrize("name", _SINGULAR_VALUES)
@pytest.mark.parametrize("shape", [(40, 4), (4, 4)])
def test_a_basis_is_orthonormal_and_holds_the_matrix(name, shape):
  # With it one of another rank and of batch axes, in the same call.
  x = _of_singular_values(shape, _SINGULAR_VALUES[name])
  q, other = jax.jit(_linalg.orthonormal)([x, _drawn(2, 3, 9, 5)])
  q, other = np.float64(q), np.float64(other)
  np.testing.assert_allclose(q.T @ q, np.eye(4), atol=3e-5)
  rest = np.linalg.norm(x - q @ (q.T @ x))
  assert rest <= 2e-5 * np.linalg.norm(x)
  np.testing.assert_allclose(
    np.swapaxes(other, -1, -2) @ other,
    np.tile(np.eye(5), (2, 3, 1, 1)),
    atol=3e-5,
  )


def test_a_basis_of_more_columns_than_rows_spans_all():
  (q,) = _linalg.orthonormal([_drawn(3, 5)])
  np.testing.assert_allclose(q @ q.T, np.eye(3), atol=3e-5)


def test_a_basis_stays_in_the_rows_that_it_may_use():
  x = np.zeros((7, 4), np.float32)
  x[:5, :2] = _drawn(5, 2)  # two directions of four
  (q,) = _linalg.orthonormal([x], [np.arange(7) < 5])
  np.testing.assert_allclose(q.T @ q, np.eye(4), atol=3e-5)
  assert not np.any(q[5:])


def test_the_derivative_is_that_of_jax():
  def total(decompose):
    return lambda x: jnp.sum(decompose(x)[1] ** 3)

  theirs = total(lambda x: jnp.linalg.svd(x, full_matrices=False))
  wanted = jax.grad(theirs)(_TALL)
  np.testing.assert_allclose(
    jax.grad(total(_linalg.svd))(_TALL), wanted, rtol=1e-5
  )
  by_vmap = jax.vmap(jax.grad(total(_linalg.svd)))(_TALL)
  np.testing.assert_allclose(by_vmap, wanted, rtol=1e-5)


_LAYERS = {
  name: Factors(_drawn(5, 6, 2), _drawn(5, 2, 8), 2.0) for name in ("q", "v")
}
_DENSE = {name: _drawn(5, 6, 8) for name in _LAYERS}


def _loss(params):
  return optax.tree.norm(params, squared=True)


def _power(pairs):
  tx = variants.power_ascent()
  return tx.update(pairs, tx.init(pairs), pairs)[0]


@pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="LAPACK is the CPU's"
)
@pytest.mark.parametrize(
  "program, argument",
  [
    (lambda x: sharpness.low_rank(_loss, x, 1.0, 2), _DENSE),
    (lambda x: sharpness.gradient_overlap(_LAYERS, x, 2), _DENSE),
    (lambda x: sharpness.subspace_overlap(x, _LAYERS), _LAYERS),
    (_power, _LAYERS),
  ],
  ids=["low_rank", "gradient_overlap", "subspace_overlap", "power_ascent"],
)
def test_a_program_holds_no_batched_decomposition(program, argument):
  """Several at once hang on jaxlib 0.10's CPU, now and then; see `_linalg`."""
  seeds = jax.tree.map(lambda x: jnp.stack([x, x]), argument)
  compiled = jax.jit(jax.vmap(program)).lower(seeds).compile().as_text()
  calls = [line for line in compiled.splitlines() if '"lapack_' in line]
  assert calls
  for call in calls:
    results = call.split(" custom-call(")[0]
    axes = [
      len(x.split(",")) for x in re.findall(r"[fs]\d+\[([\d,]*)\]", results)
    ]
    assert max(axes) == 2, call
