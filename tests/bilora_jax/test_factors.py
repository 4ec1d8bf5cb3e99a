"""The norm of a pair, and joining along the rank."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

from bilora_jax import Factors
from bilora_jax._factors import is_factors

SEEDS = st.integers(0, 2**32 - 1)


def pair(seed, batch, n, m, r, scale, magnitude=1.0):
  rng = np.random.default_rng(seed)
  return Factors(
    np.float32(magnitude * rng.normal(size=(*batch, n, r))),
    np.float32(rng.normal(size=(*batch, r, m))),
    scale,
  )


# Every new shape compiles: few of them, all of them odd.
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_gram_norm_is_the_dense_norm(rank, batch):
  norm = jax.jit(Factors.frobenius_norm)
  square = jax.jit(Factors.squared_norm)

  @settings(max_examples=10, deadline=None, derandomize=True)
  @given(seed=SEEDS, exponent=st.integers(-6, 6))
  def check(seed, exponent):
    factors = pair(seed, batch, 9, 7, rank, -1.5, 10.0**exponent)
    expected = np.linalg.norm(problems.dense(factors), axis=(-2, -1))
    assert norm(factors).shape == batch
    assert norm(factors).dtype == jnp.float32
    # Sums of a few hundred float32 products, of which some cancel.
    np.testing.assert_allclose(norm(factors), expected, rtol=5e-6)
    np.testing.assert_allclose(square(factors), expected**2, rtol=1e-5)

  check()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
  seed=SEEDS,
  batch=st.lists(st.integers(0, 3), max_size=2),
  n=st.integers(1, 12),
  m=st.integers(1, 12),
  rank=st.integers(1, 16),
)
def test_gram_norm_is_the_dense_norm_of_any_shape(seed, batch, n, m, rank):
  factors = pair(seed, batch, n, m, rank, 0.5)
  # A product that nearly cancels is known to the rounding of its terms only.
  terms = np.linalg.norm(
    np.abs(np.float64(factors.a)) @ np.abs(np.float64(factors.b)),
    axis=(-2, -1),
  )
  expected = np.linalg.norm(problems.dense(factors), axis=(-2, -1))
  np.testing.assert_array_less(
    np.abs(np.float64(factors.squared_norm()) - expected**2),
    1e-5 * terms**2 + 1e-30,
  )


def test_the_scale_counts_and_its_sign_does_not():
  plain = pair(0, (), 5, 4, 2, 1.0)
  scaled = Factors(plain.a, plain.b, -3.0)
  np.testing.assert_allclose(
    scaled.frobenius_norm(), 3 * plain.frobenius_norm(), rtol=1e-6
  )
  np.testing.assert_allclose(
    scaled.squared_norm(), 9 * plain.squared_norm(), rtol=1e-6
  )


def test_norm_of_bfloat16_is_taken_in_float32():
  full = pair(0, (), 64, 48, 8, 1.0)
  half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), full)
  assert half.frobenius_norm().dtype == jnp.float32
  # In bfloat16 arithmetic the error would be about 4e-3.
  np.testing.assert_allclose(
    half.frobenius_norm(), np.linalg.norm(problems.dense(half)), rtol=2e-6
  )


def test_norm_of_zeros_is_zero_and_cancellation_is_not_nan():
  zero = Factors(jnp.zeros((3, 2)), jnp.zeros((2, 4)))
  assert float(zero.frobenius_norm()) == 0
  # a b = 0 exactly, term by term against its own negative.
  a = np.float32(np.random.default_rng(0).normal(size=(50, 9, 1)))
  b = np.float32(np.random.default_rng(1).normal(size=(50, 1, 7)))
  cancelled = Factors(
    np.concatenate([a, a], -1), np.concatenate([b, -b], -2), 1.0
  )
  norms = np.asarray(cancelled.frobenius_norm())
  assert np.all(np.isfinite(norms)) and np.all(norms >= 0)


def test_weight_is_scale_a_b():
  factors = pair(0, (2, 3), 5, 4, 2, 0.5)
  weight = factors.weight()
  assert weight.shape == (2, 3, 5, 4)
  # Sums of two float32 products.
  np.testing.assert_allclose(weight, problems.dense(factors), atol=1e-6)
  assert factors.rank == 2


def test_a_pair_is_one_node_with_a_static_scale():
  factors = pair(0, (), 5, 4, 2, 0.5)
  leaves, treedef = jax.tree.flatten(factors)
  assert [x.shape for x in leaves] == [(5, 2), (2, 4)]
  assert jax.tree.unflatten(treedef, leaves).scale == 0.5
  assert treedef != jax.tree.structure(Factors(*leaves, 0.25))
  assert is_factors(factors) and not is_factors(leaves)
  assert jax.tree.leaves({"w": factors}, is_leaf=is_factors) == [factors]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
  seed=SEEDS,
  batch=st.sampled_from([(), (2,), (0, 3)]),
  ranks=st.sampled_from([(1, 16), (4, 4), (3, 1), (0, 2)]),
)
def test_split_undoes_join_to_the_bit_and_weights_add(seed, batch, ranks):
  one = pair(seed, batch, 5, 4, ranks[0], 0.5)
  two = pair(seed // 2, batch, 5, 4, ranks[1], 0.5)
  both = one.join(two)
  assert (both.rank, both.scale) == (sum(ranks), 0.5)
  for got, expected in zip(both.split(ranks[0]), (one, two)):
    assert got.scale == expected.scale
    np.testing.assert_array_equal(got.a, expected.a)
    np.testing.assert_array_equal(got.b, expected.b)
  # Only the order of summation differs, in float64.
  np.testing.assert_allclose(
    problems.dense(both), problems.dense(one) + problems.dense(two), atol=1e-13
  )


def test_join_refuses_unequal_scales():
  with pytest.raises(ValueError, match=r"equal scale .*; got 0\.5 and 2\.0\."):
    pair(0, (), 5, 4, 2, 0.5).join(pair(0, (), 5, 4, 2, 2.0))


@pytest.mark.parametrize(
  ("batch", "n", "m"), [((2,), 5, 4), ((), 6, 4), ((), 5, 3)], ids=str
)
def test_join_refuses_unequal_shapes(batch, n, m):
  with pytest.raises(ValueError, match=r"agree; got \(\(5,\), \(4,\)\) and"):
    pair(0, (), 5, 4, 2, 1.0).join(pair(0, batch, n, m, 2, 1.0))


@pytest.mark.parametrize("rank", [-1, 3])
def test_split_refuses_a_rank_out_of_range(rank):
  with pytest.raises(
    ValueError, match=rf"rank 2 can be split at 0 to 2; got {rank}\."
  ):
    pair(0, (), 5, 4, 2, 1.0).split(rank)
