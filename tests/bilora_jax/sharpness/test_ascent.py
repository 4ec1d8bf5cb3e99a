"""Worst cases nearby, against quadratics solved densely in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratic

from bilora_jax import sharpness

KEY = jax.random.key(0)
RADII = [0.0, 0.25, 1.0, 3.0]
SUMMIT = quadratic.symmetric(-np.arange(1.0, 8))
INDEFINITE = quadratic.symmetric(np.array([-4.0, -2, -1, 0, 0.5, 1, 3]))
ONLY_V = np.array([False] * 3 + [True] * 4)


def _problem(hessian, seed=0):
  rng = np.random.default_rng(seed)
  w, linear = rng.normal(size=(2, quadratic.SIZE))
  return w, linear, hessian @ w + linear


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
  ("mask", "moves"),
  [
    (True, True),
    ({"u": False, "v": True}, ONLY_V),
    (lambda params: {k: k == "v" for k in params}, ONLY_V),
  ],
  ids=["all", "v", "v, by a function"],
)
def test_one_step_is_the_loss_along_the_gradient(mask, moves, adaptive):
  w, linear, g = _problem(INDEFINITE)
  scale = np.abs(w) if adaptive else 1.0
  along = moves * scale * g
  step = scale * along / np.linalg.norm(along)
  loss = quadratic.loss(INDEFINITE, linear)
  rises = jax.jit(
    lambda params: sharpness.one_step(
      loss, params, RADII, mask=mask, adaptive=adaptive
    )
  )(quadratic.tree(w))
  expected = [
    r * g @ step + 0.5 * r**2 * step @ INDEFINITE @ step for r in RADII
  ]
  # Differences of float32 losses of some 10.
  np.testing.assert_allclose(rises, expected, rtol=1e-5, atol=1e-5)


def test_the_points_of_one_step_serve_any_metric():
  w, linear, g = _problem(INDEFINITE)
  params, loss = quadratic.tree(w), quadratic.loss(INDEFINITE, linear)

  @jax.jit
  def points(params):
    grads = jax.grad(loss)(params)
    plain = sharpness.direction(grads, {"u": True, "v": False})
    scale = jax.tree.map(jnp.abs, params)
    adaptive = sharpness.direction(grads, scale=scale)
    return [sharpness.move(params, d, 2.0) for d in (plain, adaptive)]

  plain, adaptive = points(params)
  part = np.where(ONLY_V, 0, g)
  np.testing.assert_allclose(
    quadratic.flat(plain),
    w + 2 * part / np.linalg.norm(part),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    quadratic.flat(adaptive),
    w + 2 * w**2 * g / np.linalg.norm(w * g),
    rtol=1e-5,
  )


@pytest.mark.parametrize("adaptive", [False, True])
def test_projected_ascent_finds_the_maximum_of_a_ball(adaptive):
  @jax.jit
  def climb(hessian, linear, params, radius):
    return sharpness.projected_ascent(
      quadratic.loss(hessian, linear),
      params,
      radius,
      KEY,
      steps=200,
      restarts=2,
      adaptive=adaptive,
    )

  inside = []
  for hessian in (INDEFINITE, SUMMIT):
    w, linear, g = _problem(hessian)
    scale = np.abs(w) if adaptive else np.ones_like(w)
    for radius in (0.3, 2.0, 20.0):
      rise, e = climb(hessian, linear, quadratic.tree(w), radius)
      e = quadratic.flat(e)
      # In the ball's own coordinates the quadratic is another.
      best = quadratic.highest(
        scale[:, None] * hessian * scale, scale * g, radius
      )
      assert (1 - 1e-3) * best <= rise <= (1 + 1e-5) * best
      np.testing.assert_allclose(
        rise, g @ e + 0.5 * e @ hessian @ e, rtol=1e-4, atol=1e-5
      )
      norm = np.linalg.norm(e / scale)
      assert norm <= radius * (1 + 1e-6)
      inside.append(norm < 0.9 * radius)
  # Of the summit the far ball holds the top; the others end on the sphere.
  assert inside == [False] * 5 + [True]


def test_from_a_stationary_point_ascent_finds_the_top_eigenvector():
  rise, perturbation = jax.jit(
    lambda params: sharpness.projected_ascent(
      quadratic.loss(INDEFINITE, np.zeros(7)), params, 0.5, KEY, steps=100
    )
  )(quadratic.tree(np.zeros(7)))
  assert float(rise) == pytest.approx(0.5 * 0.5**2 * 3, rel=1e-4)
  e = quadratic.flat(perturbation)
  np.testing.assert_allclose(INDEFINITE @ e, 3 * e, atol=0.02)


def test_restarts_look_beyond_the_hill_that_the_gradient_points_to():
  # The higher one is to be seen from a fifth of the ball.
  def loss(w):
    return 0.1 * w + 5 * jnp.maximum(-w - 0.6, 0)

  rises = jax.jit(
    lambda w: [
      sharpness.projected_ascent(loss, w, 1.0, KEY, steps=5, restarts=n).rise
      for n in (1, 24)
    ]
  )(jnp.zeros(()))
  np.testing.assert_allclose(rises, [0.1, 1.9], rtol=1e-5)


def test_ascent_is_never_below_one_step_nor_zero():
  # Uphill for a short way only, so that the last point is seldom the best.
  def loss(w):
    return jnp.sin(9 * w) - w**2

  @jax.jit
  def both(w, radii):
    def one(r):
      return sharpness.projected_ascent(loss, w, r, KEY, steps=2).rise

    return sharpness.one_step(loss, w, radii), jax.lax.map(one, radii)

  once, rises = both(jnp.float32(0), jnp.linspace(0, 2, 81))
  assert np.min(once) < 0 < np.max(once)
  # Rounding: the same point in two compilations.
  assert np.all(rises >= np.maximum(once, 0) - 1e-5)


def test_what_the_mask_holds_stays_and_need_not_be_a_float():
  params = {"w": jnp.ones(2), "codes": jnp.arange(3, dtype=jnp.int8)}
  mask = {"w": True, "codes": False}

  def loss(params):
    return jnp.sum(params["w"] ** 2) * jnp.sum(params["codes"])

  rise, perturbation = jax.jit(
    lambda params: sharpness.projected_ascent(
      loss, params, 1.0, KEY, steps=3, mask=mask
    )
  )(params)
  # 3 ((sqrt 2 + 1)^2 - 2).
  assert float(rise) == pytest.approx(3 * (1 + 2 * 2**0.5), rel=1e-5)
  np.testing.assert_array_equal(perturbation["codes"], 0)
  moved = sharpness.move(params, perturbation)
  assert moved["codes"].dtype == jnp.int8


def test_half_precision_does_not_underflow_and_keeps_its_dtype():
  # The gradient, 2e-4, squared is less than the least float16.
  w = {"w": jnp.full(4, 1e-4, jnp.float16), "v": jnp.ones(4, jnp.bfloat16)}
  seen = []

  def loss(params):
    seen.extend(x.dtype for x in jax.tree.leaves(params))
    return jnp.sum(params["w"].astype(jnp.float32) ** 2)

  rises = jax.jit(lambda w: sharpness.one_step(loss, w, [2.0]))(w)
  np.testing.assert_allclose(rises, [4 * (1 + 1e-4) ** 2], rtol=1e-3)
  assert set(seen) == {jnp.float16.dtype, jnp.bfloat16.dtype}


def test_the_number_of_radii_costs_no_tracing():
  traces = []

  def loss(w):
    traces.append(w)
    return w @ w

  counts = []
  for n in (2, 50):
    traces.clear()
    jax.make_jaxpr(
      lambda w, n=n: sharpness.one_step(loss, w, np.linspace(0, 1, n))
    )(np.ones(3))
    counts.append(len(traces))
  assert counts[0] == counts[1]


@pytest.mark.parametrize("radius", [-1.0, float("nan"), float("inf")])
def test_a_radius_that_cannot_be_is_refused(radius):
  with pytest.raises(ValueError, match=r"radii are .*at least 0; got"):
    sharpness.one_step(jnp.sum, jnp.ones(3), [radius])
  with pytest.raises(ValueError, match=r"finite and at least 0; got"):
    sharpness.projected_ascent(jnp.sum, jnp.ones(3), radius, KEY)
  with pytest.raises(ValueError, match=r"finite and at least 0; got"):
    sharpness.average(jnp.sum, jnp.ones(3), radius, KEY)
  with pytest.raises(ValueError, match=r"finite and at least 0; got"):
    sharpness.low_rank(jnp.sum, jnp.ones((3, 2)), radius, 1)


def test_counts_and_masks_that_cannot_be_are_refused():
  w = {"w": jnp.ones(3), "codes": jnp.zeros(2, jnp.int8)}
  with pytest.raises(ValueError, match=r"steps .*at least 1; got 0"):
    sharpness.projected_ascent(jnp.sum, w["w"], 1.0, KEY, steps=0)
  with pytest.raises(ValueError, match=r"restarts .*at least 1; got 0"):
    sharpness.projected_ascent(jnp.sum, w["w"], 1.0, KEY, restarts=0)
  with pytest.raises(ValueError, match=r"leaves none of the 1 parameters"):
    sharpness.one_step(jnp.sum, w["w"], [1.0], mask=False)
  with pytest.raises(ValueError, match=r"got int8 at \['codes'\]"):
    sharpness.one_step(lambda p: jnp.sum(p["w"]), w, [1.0])
  with pytest.raises(ValueError, match=r"holds a str at \['w'\]"):
    sharpness.direction(w, {"w": "yes", "codes": False})
