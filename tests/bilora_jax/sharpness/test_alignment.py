"""Overlaps and angles of pairs, against dense linear algebra in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from bilora_jax import Factors, sharpness

RNG = np.random.default_rng(0)


def _pair(n, m, r, scale=1.0, batch=()):
  return Factors(
    jnp.float32(RNG.normal(size=(*batch, n, r))),
    jnp.float32(RNG.normal(size=(*batch, r, m))),
    scale,
  )


def _dense(pair):
  a, b = np.asarray(pair.a, np.float64), np.asarray(pair.b, np.float64)
  return pair.scale * a @ b


LEFT = {"x": _pair(9, 7, 2, 0.5), "y": {"z": _pair(6, 8, 3, 2.0, (2,))}}
RIGHT = {"x": _pair(9, 7, 4, 3.0), "y": {"z": _pair(6, 8, 1, 1.0, (2,))}}
GRADS = {
  "x": np.float32(RNG.normal(size=(9, 7))),
  "y": {"z": np.float32(RNG.normal(size=(2, 6, 8)))},
}
ZERO = jax.tree.map(jnp.zeros_like, LEFT)
FRESH = {
  "x": Factors(LEFT["x"].a, 0 * LEFT["x"].b, 0.5),
  "y": {"z": Factors(LEFT["y"]["z"].a, 0 * LEFT["y"]["z"].b, 2.0)},
}


def _flat(tree):
  pairs = [tree["x"], tree["y"]["z"]]
  return np.concatenate(
    [np.ravel(_dense(p) if isinstance(p, Factors) else p) for p in pairs]
  )


def _angle(x, y):
  return x @ y / (np.linalg.norm(x) * np.linalg.norm(y))


def _truncated(g, rank):
  u, sigma, vt = np.linalg.svd(np.float64(g))
  return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


def _expected(left, right):
  """Mean squared cosines of column and of row spaces, by SciPy."""
  return [
    np.mean(np.cos(scipy.linalg.subspace_angles(p, q)) ** 2)
    for p, q in ((left, right), (left.T, right.T))
  ]


def _check(overlap, weights):
  """Against dense `weights`, pairs of them in the order of the trees."""
  expected = [_expected(*pair) for pair in weights]
  ours = [
    np.concatenate([np.ravel(tree["x"]), np.ravel(tree["y"]["z"])])
    for tree in (overlap.inputs, overlap.outputs)
  ]
  np.testing.assert_allclose(np.transpose(ours), expected, rtol=1e-4)
  assert float(overlap.mean) == pytest.approx(np.mean(expected), rel=1e-4)


def _matrices(tree):
  return [_dense(tree["x"]), *_dense(tree["y"]["z"])]


def test_overlap_is_the_squared_cosine_of_the_principal_angles():
  _check(
    jax.jit(sharpness.subspace_overlap)(LEFT, RIGHT),
    list(zip(_matrices(LEFT), _matrices(RIGHT))),
  )


def test_dense_weights_overlap_as_their_pairs_do():
  dense = {"x": LEFT["x"].weight(), "y": {"z": LEFT["y"]["z"].weight()}}
  _check(
    jax.jit(sharpness.subspace_overlap)(dense, RIGHT),
    list(zip(_matrices(LEFT), _matrices(RIGHT))),
  )


def test_overlap_ends_at_zero_and_one():
  q = np.linalg.qr(RNG.normal(size=(8, 8)))[0]
  mix = RNG.normal(size=(2, 2))
  one = Factors(jnp.float32(q[:, :2]), jnp.float32(q[:2]))
  same = Factors(jnp.float32(q[:, :2] @ mix), jnp.float32(mix @ q[:2]), 3.0)
  wider = Factors(jnp.float32(q[:, :5]), jnp.float32(q[:5]))
  other = Factors(jnp.float32(q[:, 2:5]), jnp.float32(q[2:5]))
  overlaps = jax.jit(
    lambda: [sharpness.subspace_overlap(one, x) for x in (same, wider, other)]
  )()
  for overlap, expected in zip(overlaps, (1.0, 1.0, 0.0)):
    np.testing.assert_allclose(jax.tree.leaves(overlap), expected, atol=1e-5)


def test_the_rank_is_that_of_the_weight_not_of_the_factors():
  # b has rank one: so have the weight and its column space.
  b = np.outer(RNG.normal(size=3), RNG.normal(size=7))
  pair = Factors(jnp.float32(RNG.normal(size=(9, 3))), jnp.float32(b))
  other = _pair(9, 7, 2)
  ours = jax.jit(sharpness.subspace_overlap)(pair, other)
  np.testing.assert_allclose(
    [ours.inputs, ours.outputs],
    _expected(_truncated(_dense(pair), 1), _dense(other)),
    rtol=1e-3,
  )


@pytest.mark.parametrize("rank", [1, 3])
def test_gradient_overlap_is_with_the_largest_singular_directions(rank):
  grads = [GRADS["x"], *GRADS["y"]["z"]]
  _check(
    jax.jit(lambda *args: sharpness.gradient_overlap(*args, rank))(LEFT, GRADS),
    [(w, _truncated(g, rank)) for w, g in zip(_matrices(LEFT), grads)],
  )


def test_random_subspaces_overlap_as_the_docstring_says():
  n, left, right = 20, 3, 5
  a, other = RNG.normal(size=(400, n, left)), RNG.normal(size=(400, n, right))
  overlap = jax.jit(sharpness.subspace_overlap)(
    Factors(np.float32(a), np.ones((400, 1, 1)) * np.eye(left, right)),
    Factors(np.float32(other), np.ones((400, 1, 1)) * np.eye(right)),
  )
  # 400 draws of a standard deviation of 0.08.
  assert float(jnp.mean(overlap.inputs)) == pytest.approx(right / n, abs=0.016)


def test_cosine_is_that_of_the_flattened_weights():
  ours = jax.jit(sharpness.cosine)(LEFT, GRADS)
  expected = _angle(_flat(LEFT), _flat(GRADS))
  assert float(ours) == pytest.approx(expected, rel=1e-4)
  along = {"x": _dense(LEFT["x"]), "y": {"z": _dense(LEFT["y"]["z"])}}
  ours = jax.jit(sharpness.cosine)(LEFT, jax.tree.map(np.float32, along))
  assert float(ours) == pytest.approx(1, abs=1e-6)
  # Products of the squared norms would underflow.
  tiny = jax.tree.map(lambda x: np.float32(1e-4 * x), LEFT)
  small = jax.tree.map(lambda x: np.float32(1e-14 * x), GRADS)
  ours = jax.jit(sharpness.cosine)(tiny, small)
  assert float(ours) == pytest.approx(expected, rel=1e-4)


def test_turnover_is_one_minus_the_cosine_between_weights():
  turnover = jax.jit(sharpness.turnover)
  assert float(turnover(LEFT, RIGHT)) == pytest.approx(
    1 - _angle(_flat(LEFT), _flat(RIGHT)), rel=1e-5
  )
  # Neither the length nor how the weight is factored counts.
  same = jax.tree.map(lambda x: np.float32(3 * x), LEFT)
  back = {
    "x": Factors(-LEFT["x"].a, LEFT["x"].b, 0.5),
    "y": {"z": Factors(-LEFT["y"]["z"].a, LEFT["y"]["z"].b, 2.0)},
  }
  assert float(turnover(LEFT, same)) == pytest.approx(0, abs=1e-6)
  assert float(turnover(LEFT, back)) == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("zero", [ZERO, FRESH], ids=["a = b = 0", "b = 0"])
def test_a_pair_that_is_zero_gives_zero(zero):
  no_gradient = jax.tree.map(jnp.zeros_like, GRADS)

  @jax.jit
  def results(zero, no_gradient):
    return (
      sharpness.subspace_overlap(zero, RIGHT),
      sharpness.subspace_overlap(RIGHT, zero),
      sharpness.gradient_overlap(zero, GRADS, 2),
      sharpness.gradient_overlap(LEFT, no_gradient, 2),
      sharpness.cosine(zero, GRADS),
      sharpness.cosine(LEFT, no_gradient),
      sharpness.turnover(zero, LEFT),
      sharpness.turnover(LEFT, zero),
    )

  for value in jax.tree.leaves(results(zero, no_gradient)):
    np.testing.assert_array_equal(value, 0)


def test_half_precision_factors_are_summed_in_float32():
  halves = [
    jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    for tree in (LEFT, RIGHT)
  ]
  wholes = [
    jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in halves
  ]
  for one in (sharpness.turnover, sharpness.subspace_overlap):
    for ours, expected in zip(
      jax.tree.leaves(jax.jit(one)(*halves)),
      jax.tree.leaves(jax.jit(one)(*wholes)),
    ):
      assert ours.dtype == jnp.float32
      np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_the_product_of_the_factors_is_never_formed():
  pair = Factors(jnp.ones((50, 2)), jnp.ones((2, 40)))
  grad = jnp.ones((50, 40))
  for traced in (
    jax.make_jaxpr(sharpness.turnover)(pair, pair),
    jax.make_jaxpr(sharpness.subspace_overlap)(pair, pair),
  ):
    assert "50,40]" not in str(traced)
  # The gradient itself is squared; no matmul gives one of its shape.
  lines = str(jax.make_jaxpr(sharpness.cosine)(pair, grad)).splitlines()
  products = [line for line in lines if "dot_general" in line]
  assert products
  assert not any("50,40] = dot_general" in line for line in products)


def test_trees_and_shapes_that_differ_are_refused():
  with pytest.raises(ValueError, match=r"have the same weights"):
    sharpness.turnover(LEFT, {"x": LEFT["x"]})
  with pytest.raises(ValueError, match=r"have the same weights"):
    sharpness.subspace_overlap({}, {})
  wrong = {**GRADS, "x": np.zeros((7, 9))}
  with pytest.raises(ValueError, match=r"at \['x'\].*\(9, 7\) and \(7, 9\)"):
    sharpness.cosine(LEFT, wrong)
  with pytest.raises(ValueError, match=r"at least 1; got 0"):
    sharpness.gradient_overlap(LEFT, GRADS, 0)
