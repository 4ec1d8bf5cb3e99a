"""The ball where radii and norms are extreme, and whatever surrounds it."""

import devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from bilora_jax import Factors, bilora, hold_ball, keep_in_ball

RHO = 0.05


def pair(seed=0, a=1.0, b=1.0, scale=2.0):
  rng = np.random.default_rng(seed)
  return Factors(
    np.float32(a * rng.normal(size=(5, 3))),
    np.float32(b * rng.normal(size=(3, 4))),
    scale,
  )


@jax.jit
def projected(tree):
  """What an update from zero to these nodes ends at, and the state."""
  tx, start = keep_in_ball(RHO), optax.tree.zeros_like(tree)
  updates, state = tx.update(tree, tx.init(start), start)
  return optax.apply_updates(start, updates), state


# Radii.


def norms_by_step(tx, steps=12, **extra):
  adapters, data = problems.make(problems.SMALL)

  @jax.jit
  def run(adapters):
    def body(carry, _):
      adapters, state = carry
      grads = jax.grad(problems.loss)(adapters, data)
      updates, state = tx.update(grads, state, adapters, **extra)
      adapters = optax.apply_updates(adapters, updates)
      return (adapters, state), (adapters["auxiliary"], state)

    return jax.lax.scan(body, (adapters, tx.init(adapters)), length=steps)[1]

  history, states = jax.device_get(run(adapters))
  sizes = [problems.dense_norm(problems.at(history, i)) for i in range(steps)]
  return np.array(sizes), optax.tree.get(states, "radius")


def test_a_schedule_below_zero_or_nan_is_a_radius_of_zero():
  def schedule(count):
    falling = 0.1 - 0.02 * count
    return jnp.where(count == 2, jnp.nan, falling)

  sizes, radii = norms_by_step(bilora(optax.adam(0.05), schedule))
  expected = np.maximum(0.1 - 0.02 * np.arange(12), 0)
  expected[2] = 0
  np.testing.assert_allclose(radii, expected, atol=1e-7)
  assert np.all(sizes <= radii * (1 + 1e-6))
  assert sizes[1] > 0.07 and not sizes[2] and sizes[3] > 0.03
  # 0.1 - 0.02 * 5 is not quite 0 in float32.
  assert sizes[5] < 1e-7 and not np.any(sizes[6:])


@pytest.mark.parametrize("given", [-0.1, float("nan")])
def test_a_radius_that_is_given_to_update_is_clamped_too(given):
  sizes, radii = norms_by_step(
    bilora(optax.adam(0.05), RHO), steps=3, radius=jnp.float32(given)
  )
  assert not np.any(sizes) and not np.any(radii)
  inject = optax.inject_hyperparams(bilora)(optimizer=optax.adam(0.05), rho=RHO)
  adapters, _ = problems.make(problems.SMALL, fresh=False)
  state = optax.tree.set(inject.init(adapters), rho=jnp.float32(given))
  updates, state = inject.update(adapters, state, adapters)
  new = optax.apply_updates(adapters, updates)
  assert problems.dense_norm(new["auxiliary"]) == 0
  assert float(optax.tree.get(state, "radius")) == 0


@pytest.mark.parametrize("name", ["radius", "rho"])
def test_the_state_has_the_radius_of_the_last_step(name):
  schedule = optax.linear_schedule(0.02, 0.2, 10)
  tx = bilora(optax.adam(0.05), schedule)
  _, radii = norms_by_step(tx, steps=4)
  np.testing.assert_allclose(radii, [0.02, 0.038, 0.056, 0.074], rtol=1e-6)
  adapters, _ = problems.make(problems.SMALL)
  start = tx.init(adapters)
  assert float(optax.tree.get(start, "radius")) == pytest.approx(0.02)
  # An argument of update counts, by its name or its old one.
  sizes, radii = norms_by_step(tx, steps=4, **{name: 0.01})
  np.testing.assert_allclose(radii, [0.01] * 4, rtol=1e-6)
  assert np.all(sizes <= 0.01 * (1 + 1e-6)) and sizes[-1] > 0.009


# Norms.


@pytest.mark.parametrize(
  ("a", "b"),
  [
    (1e-30, 1e30),
    (1e30, 1e-30),
    (1e-25, 1e18),
    (1e10, 1e10),
    (1e15, 1e15),
    (1e30, 1.0),
    (1.0, 1e-30),
  ],
)
def test_norms_are_right_from_1e_minus_30_to_1e30(a, b):
  node = pair(a=a, b=b)
  expected = problems.dense_norm(node)
  np.testing.assert_allclose(node.frobenius_norm(), expected, rtol=1e-6)
  new, state = projected({"w": node})
  np.testing.assert_allclose(state.auxiliary_norm, expected, rtol=1e-6)
  after = problems.dense_norm(new["w"])
  assert after == pytest.approx(min(expected, RHO), rel=1e-6)
  # Neither is dead.
  assert np.any(new["w"].a) and np.any(new["w"].b)


def test_a_stacked_pair_and_others_beside_it_are_in_one_norm():
  rng = np.random.default_rng(1)
  sizes = np.float32([1e-20, 1.0, 1e20]).reshape(3, 1, 1)
  stacked = Factors(
    sizes * np.float32(rng.normal(size=(3, 5, 2))),
    np.float32(rng.normal(size=(3, 2, 4))),
    0.5,
  )
  tree = {"v": stacked, "w": pair(), "x": pair(3)}
  expected = problems.dense_norm(tree)
  assert expected > 1e20
  _, state = projected(tree)
  np.testing.assert_allclose(state.auxiliary_norm, expected, rtol=1e-6)
  each = np.linalg.norm(problems.dense(stacked), axis=(-2, -1))
  np.testing.assert_allclose(stacked.frobenius_norm(), each, rtol=1e-6)


def test_a_norm_that_float32_does_not_hold_leaves_a_way_back():
  node = pair(a=1e25, b=1e25)
  new, state = projected({"w": node})
  assert np.isinf(state.auxiliary_norm)
  assert not np.any(new["w"].b)
  np.testing.assert_array_equal(new["w"].a, node.a)


def test_a_nan_is_not_taken_for_a_norm():
  node = pair()
  node.b[0, 0] = np.nan
  _, state = projected({"w": node})
  assert np.isnan(state.auxiliary_norm)
  assert np.isnan(node.frobenius_norm())


def test_norms_of_shards_are_right_where_squares_are_not():
  devices.require(8)
  node = pair(a=1e-28, b=1e30)
  wide = Factors(np.tile(node.a, (8, 1)), np.tile(node.b, (1, 8)), 2.0)
  shards = Factors(
    wide.a.reshape(8, 5, 3), wide.b.reshape(3, 8, 4).transpose(1, 0, 2), 2.0
  )
  spec = jax.sharding.PartitionSpec
  tx = keep_in_ball(RHO, specs=Factors(spec("model"), spec(None, "model"), 2.0))
  _, state = jax.pmap(
    lambda node: tx.update(node, tx.init(node), optax.tree.zeros_like(node)),
    "model",
  )(shards)
  np.testing.assert_allclose(
    state.auxiliary_norm, [problems.dense_norm(wide)] * 8, rtol=1e-6
  )


def test_the_norms_gradient_is_zero_at_the_weight_zero():
  node = pair(b=0.0)
  gradient = jax.jit(jax.grad(lambda node: node.frobenius_norm()))(node)
  assert not np.any(gradient.a) and not np.any(gradient.b)


def test_the_norms_gradient_is_that_of_the_dense_norm():
  node = pair()
  gradient = jax.jit(jax.grad(lambda node: node.frobenius_norm()))(node)
  weight = problems.dense(node)
  direction = node.scale * weight / np.linalg.norm(weight)
  np.testing.assert_allclose(gradient.a, direction @ node.b.T, rtol=1e-5)
  np.testing.assert_allclose(gradient.b, node.a.T @ direction, rtol=1e-5)


@pytest.mark.parametrize("left", [1e-2, 1e-3, 1e-4])
def test_what_nearly_cancels_is_known_to_the_rounding_of_its_terms(left):
  # The documented bound, and that it is no exaggeration.
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(200, 9, 2)), rng.normal(size=(200, 2, 7))
  almost = Factors(
    np.float32(np.concatenate([a, a], -1)),
    np.float32(np.concatenate([b, (left - 1) * b], -2)),
  )
  dense = np.linalg.norm(problems.dense(almost), axis=(-2, -1))
  terms = np.linalg.norm(
    np.abs(np.float64(almost.a)) @ np.abs(np.float64(almost.b)), axis=(-2, -1)
  )
  error = np.abs(np.float64(almost.frobenius_norm()) ** 2 - dense**2)
  assert np.all(error <= 2e-7 * terms**2)
  worst = np.max(np.abs(almost.frobenius_norm() - dense) / dense)
  if left == 1e-2:
    assert worst < 1e-2
  if left == 1e-4:
    assert worst > 1
  assert "cancel" in (Factors.frobenius_norm.__doc__ or "")


# What surrounds it.


SURROUNDINGS = {
  "an average": lambda tx: optax.chain(tx, optax.ema(0.9, debias=False)),
  "a scheduled scale": lambda tx: optax.chain(
    tx, optax.scale_by_schedule(lambda count: 1.0 + count)
  ),
  "decay": lambda tx: optax.chain(tx, optax.add_decayed_weights(0.5)),
  # Of the auxiliary's "y", whose gradient is then its update.
  "a mask": lambda tx: optax.masked(
    tx,
    lambda params: {
      **jax.tree.map(lambda _: True, params),
      "auxiliary": {
        name: jax.tree.map(lambda _, name=name: name == "x", node)
        for name, node in params["auxiliary"].items()
      },
    },
  ),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_leaves_the_ball_is_held_in_it(name):
  tx = SURROUNDINGS[name](bilora(optax.adam(0.05), RHO))
  loose, _ = norms_by_step(tx)
  assert loose[:4].max() > 1.2 * RHO
  held, radii = norms_by_step(hold_ball(tx))
  np.testing.assert_allclose(radii, RHO, rtol=1e-6)
  # Twice the slack that rounding has elsewhere.
  assert np.all(held <= RHO * (1 + 2e-6))
  assert held.max() > 0.99 * RHO


def test_it_holds_a_ball_for_each_layer():
  tx = bilora(optax.adam(0.05), RHO, clip="layer")
  tx = hold_ball(optax.chain(tx, optax.scale(3.0)), clip="layer")
  adapters, data = problems.make(problems.SMALL)
  history, _ = problems.train(tx, adapters, data, 5)
  for node in problems.at(history, -1)["auxiliary"].values():
    sizes = np.linalg.norm(problems.dense(node), axis=(-2, -1))
    np.testing.assert_allclose(sizes, RHO, rtol=2e-6)


def test_what_stays_in_the_ball_is_left_to_the_bit():
  adapters, data = problems.make(problems.SMALL)
  schedule = optax.linear_schedule(0.0, 0.2, 10)
  plain = optax.MultiSteps(bilora(optax.adam(0.05), schedule), 2)
  ours, theirs = (
    problems.train(tx, adapters, data, 10) for tx in (hold_ball(plain), plain)
  )
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_a_lopsided_pair_beside_another_counts_in_full(size):
  tree = {"x": pair(0, a=size, b=1 / size), "y": pair(1)}
  _, state = projected(tree)
  wanted = np.sqrt(
    sum(
      np.sum((x.scale * np.float64(x.a) @ np.float64(x.b)) ** 2)
      for x in tree.values()
    )
  )
  assert state.auxiliary_norm == pytest.approx(wanted, rel=1e-6)


def test_no_step_waits_for_a_branch():
  # On a GPU the host takes a branch, and waits for the device to know which.
  adapters, _ = problems.make(problems.SMALL)
  tx = bilora(optax.adam(0.05), RHO)
  lowered = jax.jit(tx.update).lower(adapters, tx.init(adapters), adapters)
  assert "stablehlo.case" not in lowered.as_text()
  assert "stablehlo.if" not in lowered.as_text()


def test_what_has_no_ball_and_bad_arguments_are_refused():
  adapters, _ = problems.make(problems.SMALL)
  with pytest.raises(ValueError, match=r"contains one bilora; .* contains 0"):
    hold_ball(optax.adam(0.1)).init(adapters)
  tx = hold_ball(bilora(optax.sgd(0.1)))
  with pytest.raises(ValueError, match=r"hold_ball needs params, .*; got None"):
    tx.update(adapters, tx.init(adapters))
  with pytest.raises(ValueError, match=r"'global' or 'layer'; got None"):
    hold_ball(bilora(optax.sgd(0.1)), clip=None)


def test_frozen_parameters_are_optaxs_selective_transform():
  # `masked` passes hidden gradients on: what is hidden would be moved by them.
  adapters, data = problems.make(problems.SMALL)
  frozen = jax.tree.map(lambda _: False, adapters)
  for part in ("primary", "auxiliary"):
    frozen[part]["y"] = jax.tree.map(lambda _: True, adapters[part]["y"])
  tx = optax.selective_transform(
    bilora(optax.adam(0.05), RHO), freeze_mask=frozen
  )
  history, _ = problems.train(tx, adapters, data, 4)
  new = problems.at(history, -1)
  for part in ("primary", "auxiliary"):
    np.testing.assert_array_equal(new[part]["y"].a, adapters[part]["y"].a)
    np.testing.assert_array_equal(new[part]["y"].b, adapters[part]["y"].b)
    assert np.any(new[part]["x"].b != adapters[part]["x"].b)
  norm = problems.dense_norm({"x": new["auxiliary"]["x"]})
  assert norm == pytest.approx(RHO, rel=1e-6)
