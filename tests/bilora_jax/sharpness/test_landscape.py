"""Filter norms, and losses on a line and a grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratic

from bilora_jax import sharpness

RNG = np.random.default_rng(0)
PARAMS = {
  "kernel": jnp.float32(RNG.normal(size=(5, 3))),
  "bias": jnp.float32(RNG.normal(size=3)),
  "convolution": jnp.float32(RNG.normal(size=(2, 2, 3, 4))),
  "zero": jnp.zeros((2, 3)),
}


def test_each_filter_has_the_norm_of_the_weights_into_one_output():
  drawn = jax.jit(sharpness.filter_normalized)(jax.random.key(0), PARAMS)
  for name in ("kernel", "convolution", "zero"):
    w, d = (
      np.asarray(x[name], np.float64).reshape(-1, x[name].shape[-1])
      for x in (PARAMS, drawn)
    )
    np.testing.assert_allclose(
      np.linalg.norm(d, axis=0), np.linalg.norm(w, axis=0), rtol=1e-5
    )
  np.testing.assert_array_equal(drawn["bias"], 0)
  # A direction of its own, not the weights'.
  w, d = np.ravel(PARAMS["convolution"]), np.ravel(drawn["convolution"])
  assert abs(w @ d) < 0.5 * (w @ w)


def _by_name(name, shape):
  return -2 if name == "['stack']" and len(shape) == 3 else 0


@pytest.mark.parametrize("input_axes", [-2, _by_name], ids=["-2", "a function"])
def test_scanned_layers_have_filters_of_their_own(input_axes):
  params = {"stack": jnp.float32(RNG.normal(size=(3, 5, 2)))}
  drawn = jax.jit(
    lambda params: sharpness.filter_normalized(
      jax.random.key(0), params, input_axes=input_axes
    )
  )(params)
  np.testing.assert_allclose(
    np.linalg.norm(drawn["stack"], axis=1),
    np.linalg.norm(params["stack"], axis=1),
    rtol=1e-5,
  )


def test_only_what_the_mask_lets_move_is_drawn_and_in_float32():
  params = {k: x.astype(jnp.bfloat16) for k, x in PARAMS.items()}
  drawn = jax.jit(
    lambda params: sharpness.filter_normalized(
      jax.random.key(0), params, mask={k: k == "kernel" for k in params}
    )
  )(params)
  assert np.any(drawn["kernel"])
  np.testing.assert_array_equal(drawn["convolution"], 0)
  assert {x.dtype for x in drawn.values()} == {jnp.float32.dtype}
  w, d = (np.asarray(x["kernel"].astype(jnp.float32)) for x in (params, drawn))
  np.testing.assert_allclose(
    np.linalg.norm(d, axis=0), np.linalg.norm(w, axis=0), rtol=1e-5
  )


def test_line_and_grid_are_the_losses_there():
  hessian = quadratic.symmetric(np.arange(-3.0, 4))
  w, c, one, two = RNG.normal(size=(4, 7))
  steps = np.array([-1.0, 0, 0.5, 2])
  loss, params = quadratic.loss(hessian, c), quadratic.tree(w)
  along = [quadratic.tree(one), quadratic.tree(two)]
  line, grid = jax.jit(
    lambda params: (
      sharpness.landscape(loss, params, along[:1], steps),
      sharpness.landscape(loss, params, along, steps),
    )
  )(params)

  def value(x):
    return 0.5 * x @ hessian @ x + c @ x

  np.testing.assert_allclose(
    line, [value(w + s * one) for s in steps], rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(
    grid,
    [[value(w + s * one + t * two) for t in steps] for s in steps],
    rtol=1e-5,
    atol=1e-5,
  )


def test_other_than_one_or_two_directions_are_refused():
  w = jnp.ones(3)
  for wrong in ([], [w, w, w], {"w": w}):
    with pytest.raises(ValueError, match=r"a list of one or two trees"):
      sharpness.landscape(jnp.sum, w, wrong, [0.0])
  with pytest.raises(ValueError, match=r"one axis; got the shape \(\)"):
    sharpness.landscape(jnp.sum, w, [w], 0.0)
