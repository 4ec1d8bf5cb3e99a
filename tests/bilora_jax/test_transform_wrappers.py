"""Inside Optax's and JAX's wrappers the update gives the same numbers."""

import functools

import devices
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import problems
import pytest

from bilora_jax import Factors, bilora, keep_in_frobenius_ball

RHO = 0.1
STEPS = 10
# XLA fuses the same arithmetic differently: float32 roundings over ten steps.
ROUNDING = 2e-6


@functools.cache
def problem():
  return problems.make(problems.SMALL)


@functools.cache
def bare():
  """Ten steps of Adam without any wrapper."""
  history, states = problems.train(
    bilora(optax.adam(0.02), RHO), *problem(), STEPS
  )
  # The clip worked, not only the optimizers.
  assert np.all(np.asarray(optax.tree.get(states, "clip_factor")) < 1)
  return history


def final(tx, steps=STEPS):
  history, states = problems.train(tx, *problem(), steps)
  return problems.at(history, -1), problems.at(states, -1)


def test_chain():
  tx = optax.chain(optax.scale(0.5), bilora(optax.sgd(0.04), RHO))
  expected, _ = final(bilora(optax.sgd(0.02), RHO))
  assert problems.relative_error(final(tx)[0], expected) <= ROUNDING


def test_apply_if_finite():
  tx = optax.apply_if_finite(bilora(optax.adam(0.02), RHO), 3)
  expected = problems.at(bare(), -1)
  assert problems.relative_error(final(tx)[0], expected) <= ROUNDING


def test_nan_gradients_under_apply_if_finite_leave_everything():
  adapters, data = problem()
  tx = optax.apply_if_finite(bilora(optax.adam(0.02), RHO), 3)
  adapters, state = jax.jit(problems.step(tx))(
    adapters, tx.init(adapters), data
  )
  grads = jax.tree.map(np.ones_like, adapters)
  grads["primary"]["x"] = jax.tree.map(
    lambda x: np.full_like(x, np.nan), grads["primary"]["x"]
  )
  updates, after = jax.jit(tx.update)(grads, state, adapters)
  assert not any(np.any(np.asarray(u)) for u in jax.tree.leaves(updates))
  before = state.inner_state
  for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after.inner_state)):
    np.testing.assert_array_equal(x, y)
  assert int(after.notfinite_count) == 1


def test_multi_steps_averages_and_projects_at_real_steps_only():
  adapters, one = problem()
  _, two = problems.make(problems.SMALL, seed=1)
  # Far outside of the ball: a projection would show.
  b = jax.tree.map(np.ones_like, adapters["auxiliary"])
  adapters = {**adapters, "auxiliary": b}
  tx = optax.MultiSteps(bilora(optax.adam(0.02), RHO), 2)
  step = jax.jit(problems.step(tx))
  state = tx.init(adapters)
  plain = bilora(optax.adam(0.02), RHO)

  @jax.jit
  def averaged(adapters, state):
    grads = [jax.grad(problems.loss)(adapters, data) for data in (one, two)]
    grads = jax.tree.map(lambda x, y: (x + y) / 2, *grads)
    updates, state = plain.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state

  expected, plain_state = adapters, plain.init(adapters)
  for _ in range(3):
    half, state = step(adapters, state, one)
    for x, y in zip(jax.tree.leaves(half), jax.tree.leaves(adapters)):
      np.testing.assert_array_equal(x, y)
    adapters, state = step(half, state, two)
    expected, plain_state = averaged(expected, plain_state)
    assert problems.relative_error(adapters, expected) <= ROUNDING
    norm = problems.dense_norm(adapters["auxiliary"])
    assert norm == pytest.approx(RHO, rel=1e-6)
  assert int(optax.tree.get(state, "gradient_step")) == 3


def test_inject_hyperparams_of_rho():
  tx = optax.inject_hyperparams(bilora)(optimizer=optax.adam(0.02), rho=RHO)
  expected = problems.at(bare(), -1)
  assert problems.relative_error(final(tx)[0], expected) <= ROUNDING


def test_injected_rho_can_be_set_between_steps():
  adapters, data = problem()
  tx = optax.inject_hyperparams(bilora)(optimizer=optax.adam(0.02), rho=RHO)
  step = jax.jit(problems.step(tx))
  state = tx.init(adapters)
  for rho in (0.1, 0.03, 0.0):
    state = optax.tree.set(state, rho=jnp.float32(rho))
    adapters, state = step(adapters, state, data)
    norm = problems.dense_norm(adapters["auxiliary"])
    assert norm == pytest.approx(rho, rel=1e-6)


def test_inject_hyperparams_of_a_schedule_of_rho():
  schedule = optax.linear_schedule(0.02, 0.2, STEPS)
  tx = optax.inject_hyperparams(bilora)(
    optimizer=optax.adam(0.02), rho=schedule
  )
  expected, _ = final(bilora(optax.adam(0.02), schedule))
  assert problems.relative_error(final(tx)[0], expected) <= ROUNDING


def test_inject_hyperparams_of_the_inner_optimizer():
  # All but the rate is static: 1 - 0.999 in float32 is off by 1e-5.
  inject = optax.inject_hyperparams(
    optax.adam, static_args=("b1", "b2", "eps", "eps_root")
  )
  inner = inject(learning_rate=0.02)
  adapters, state = final(bilora(inner, RHO))
  expected = problems.at(bare(), -1)
  assert problems.relative_error(adapters, expected) <= ROUNDING
  # One rate for the primary, one for the auxiliary.
  rates = optax.tree.get_all_with_path(state, "learning_rate")
  assert [float(rate) for _, rate in rates] == [pytest.approx(0.02)] * 2


def test_masking_all_of_extra():
  mask = {"primary": True, "auxiliary": True, "extra": False}
  tx = optax.masked(bilora(optax.adam(0.02), RHO), mask)
  adapters, data = problem()
  grads = jax.jit(jax.grad(problems.loss))(adapters, data)
  updates, _ = jax.jit(tx.update)(grads, tx.init(adapters), adapters)
  plain = bilora(optax.adam(0.02), RHO)
  expected, _ = jax.jit(plain.update)(grads, plain.init(adapters), adapters)
  # `masked` passes on what it hides: the gradient.
  expected = {**expected, "extra": grads["extra"]}
  assert problems.relative_error(updates, expected) <= ROUNDING


def test_masking_a_whole_pair_takes_it_out_of_the_ball():
  adapters, data = problem()
  mask = jax.tree.map(lambda _: True, adapters)
  for part in ("primary", "auxiliary"):
    mask[part]["y"] = jax.tree.map(lambda _: False, adapters[part]["y"])
  tx = optax.masked(bilora(optax.adam(0.02), RHO), mask)
  grads = jax.jit(jax.grad(problems.loss))(adapters, data)
  updates, state = jax.jit(tx.update)(grads, tx.init(adapters), adapters)

  def without(tree):
    return {
      part: {k: v for k, v in tree[part].items() if k != "y" or part == "extra"}
      for part in tree
    }

  plain, seen = bilora(optax.adam(0.02), RHO), without(adapters)
  expected, expected_state = jax.jit(plain.update)(
    without(grads), plain.init(seen), seen
  )
  assert problems.relative_error(without(updates), expected) <= ROUNDING
  for part in ("primary", "auxiliary"):
    np.testing.assert_array_equal(updates[part]["y"].a, grads[part]["y"].a)
    np.testing.assert_array_equal(updates[part]["y"].b, grads[part]["y"].b)
  np.testing.assert_allclose(
    optax.tree.get(state, "auxiliary_norm"),
    optax.tree.get(expected_state, "auxiliary_norm"),
    rtol=ROUNDING,
  )


def test_masking_half_a_pair_is_refused():
  adapters, _ = problem()
  mask = jax.tree.map(lambda _: True, adapters)
  mask["auxiliary"]["y"] = Factors(True, False, 3.0)
  tx = optax.masked(bilora(optax.adam(0.02), RHO), mask)
  with pytest.raises(
    ValueError, match=r"both factors of a pair, or neither; .*\['y'\]"
  ):
    tx.init(adapters)


def test_jit_and_eager():
  adapters, data = problem()
  tx = bilora(optax.adam(0.02), RHO)
  grad, state = jax.jit(jax.grad(problems.loss)), tx.init(adapters)
  for _ in range(3):
    updates, state = tx.update(grad(adapters, data), state, adapters)
    adapters = optax.apply_updates(adapters, updates)
  expected = problems.at(bare(), 2)
  assert problems.relative_error(adapters, expected) <= ROUNDING


def test_donation():
  adapters, data = problem()
  tx = bilora(optax.adam(0.02), RHO)
  step = jax.jit(problems.step(tx), donate_argnums=(0, 1))
  adapters = jax.tree.map(jnp.asarray, adapters)
  first, state = adapters, tx.init(adapters)
  for _ in range(STEPS):
    adapters, state = step(adapters, state, data)
  assert all(x.is_deleted() for x in jax.tree.leaves(first))
  expected = problems.at(bare(), -1)
  assert problems.relative_error(adapters, expected) <= ROUNDING


def rows_in_eight(data):
  """Splits the rows of x and y over eight devices; w0 goes to each."""

  def split(key, x):
    if key == "w0":
      return np.stack([x] * 8)
    x = x.reshape(*x.shape[:-2], 8, -1, x.shape[-1])
    return np.moveaxis(x, -3, 0)

  return {n: {k: split(k, x) for k, x in d.items()} for n, d in data.items()}


def data_parallel(tx):
  """The training step of one device: gradients are averaged over 'batch'."""

  def one(adapters, state, data):
    grads = jax.grad(problems.loss)(adapters, data)
    grads = jax.lax.pmean(grads, "batch")
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state

  return one


def test_pmap():
  devices.require(8)
  adapters, data = problem()
  tx = bilora(optax.adam(0.02), RHO)
  step = jax.pmap(data_parallel(tx), "batch")
  carry = jax.tree.map(
    lambda x: np.stack([x] * 8), (adapters, tx.init(adapters))
  )
  data = rows_in_eight(data)
  for _ in range(STEPS):
    carry = step(*carry, data)
  expected = problems.at(bare(), -1)
  adapters = jax.device_get(carry[0])
  for device in (0, 7):
    actual = problems.at(adapters, device)
    assert problems.relative_error(actual, expected) <= ROUNDING


def test_shard_map():
  adapters, data = problem()
  tx = bilora(optax.adam(0.02), RHO)

  def local(adapters, state, data):
    # Each device gets a slice of length 1 of the leading axis. Without pcast
    # JAX would sum the gradient of replicated adapters over the devices.
    varying = jax.lax.pcast(adapters, "batch", to="varying")
    grads = jax.grad(problems.loss)(varying, problems.at(data, 0))
    grads = jax.lax.pmean(grads, "batch")
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state

  step = jax.jit(
    jax.shard_map(
      local,
      mesh=devices.mesh(batch=8),
      in_specs=(P(), P(), P("batch")),
      out_specs=P(),
    )
  )
  state, data = tx.init(adapters), rows_in_eight(data)
  for _ in range(STEPS):
    adapters, state = step(adapters, state, data)
  expected = problems.at(bare(), -1)
  assert problems.relative_error(adapters, expected) <= ROUNDING


@pytest.mark.parametrize("clip", ["global", "layer"])
def test_sharded_weights_train_as_whole_ones(clip):
  shapes = {
    "w": problems.Shape((), 16, 8, 2, 3, 2.0, 0.5),
    "v": problems.Shape((8,), 4, 6, 3, 1, 1.0, 3.0),
  }
  adapters, data = problems.make(shapes)
  tx = bilora(optax.adam(0.02), RHO, clip=clip)
  expected, _ = problems.train(tx, adapters, data, STEPS)
  eight = devices.mesh(model=8)
  # `in` of a and `out` of b are split for one pair, the layers for the other.
  specs = {"w": (P("model"), P(None, "model")), "v": (P("model"), P("model"))}
  sharded = dict(adapters)
  for part in ("primary", "auxiliary"):
    sharded[part] = {
      name: Factors(
        jax.device_put(pair.a, NamedSharding(eight, specs[name][0])),
        jax.device_put(pair.b, NamedSharding(eight, specs[name][1])),
        pair.scale,
      )
      for name, pair in adapters[part].items()
    }
  sharded["extra"] = jax.device_put(sharded["extra"], NamedSharding(eight, P()))
  data = jax.device_put(data, NamedSharding(eight, P()))
  step = jax.jit(problems.step(tx))
  state = jax.jit(tx.init)(sharded)
  for _ in range(STEPS):
    sharded, state = step(sharded, state, data)
  # It was sharded, to the end.
  assert sharded["auxiliary"]["w"].a.sharding.spec == P("model")
  actual = jax.device_get(sharded)
  assert problems.relative_error(actual, problems.at(expected, -1)) <= ROUNDING


MIXED = {
  "w": problems.Shape((), 16, 8, 2, 3, 2.0, 0.5),
  "v": problems.Shape((8,), 4, 6, 3, 1, 1.0, 3.0),
  "u": problems.Shape((2,), 8, 16, 3, 2, 1.0, 2.0),
  "t": problems.Shape((), 5, 7, 2, 2, 1.0, 1.0),
}
# `in` of a and `out` of b are split; the layers; `in` alone; nothing.
MIXED_SPECS = {
  "w": Factors(P("model"), P(None, "model")),
  "v": Factors(P("model", None, None), P("model")),
  "u": Factors(P(None, ("model",)), P()),
  "t": Factors(P(), P()),
}


def _specs(adapters):
  """A spec for each array of adapters; the scales are those of the pairs."""

  def of(part):
    return {
      name: Factors(MIXED_SPECS[name].a, MIXED_SPECS[name].b, pair.scale)
      for name, pair in adapters[part].items()
    }

  return {
    "primary": of("primary"),
    "auxiliary": of("auxiliary"),
    "extra": {name: P() for name in adapters["extra"]},
  }


def _following(state, specs):
  """Specs of a state, whose moments are at the paths of what they belong to."""
  known = dict(jax.tree_util.tree_leaves_with_path(specs))

  def of(path, _):
    ends = (path[start:] for start in range(len(path)))
    return next((known[end] for end in ends if end in known), P())

  return jax.tree_util.tree_map_with_path(of, state)


@pytest.mark.parametrize("clip", ["global", "layer", None])
def test_shard_map_over_sharded_factors(clip):
  adapters, data = problems.make(MIXED)
  plain = bilora(optax.adam(0.02), RHO, clip=clip)
  expected, expected_state = problems.train(plain, adapters, data, STEPS)
  specs = _specs(adapters)
  tx = bilora(optax.adam(0.02), RHO, clip=clip, specs=specs)
  state = tx.init(adapters)
  state_specs = _following(state, specs)
  update = jax.shard_map(
    tx.update,
    mesh=devices.mesh(model=8),
    in_specs=(specs, state_specs, specs),
    out_specs=(specs, state_specs),
  )

  @jax.jit
  def step(adapters, state):
    updates, state = update(
      jax.grad(problems.loss)(adapters, data), state, adapters
    )
    return optax.apply_updates(adapters, updates), state

  for _ in range(STEPS):
    adapters, state = step(adapters, state)
  assert problems.relative_error(adapters, problems.at(expected, -1)) <= (
    ROUNDING
  )
  for name in ("auxiliary_norm", "clip_factor"):
    np.testing.assert_allclose(
      optax.tree.get(state, name),
      optax.tree.get(expected_state, name)[-1],
      rtol=ROUNDING,
    )


def test_pmap_over_sharded_factors():
  devices.require(8)
  rng = np.random.default_rng(0)
  pair = Factors(
    np.float32(rng.normal(size=(16, 2))), np.float32(rng.normal(size=(2, 24)))
  )
  shards = Factors(
    pair.a.reshape(8, 2, 2), pair.b.reshape(2, 8, 3).transpose(1, 0, 2)
  )
  tx = keep_in_frobenius_ball(RHO, specs=Factors(P("model"), P(None, "model")))
  updates, state = jax.pmap(
    lambda pair: tx.update(
      jax.tree.map(jnp.zeros_like, pair), tx.init(pair), pair
    ),
    "model",
  )(shards)
  np.testing.assert_allclose(
    state.auxiliary_norm, [problems.dense_norm(pair)] * 8, rtol=ROUNDING
  )
  new = jax.tree.map(np.add, shards, updates)
  whole = Factors(new.a.reshape(16, 2), new.b.transpose(1, 0, 2).reshape(2, 24))
  assert problems.dense_norm(whole) == pytest.approx(RHO, rel=1e-6)


def test_specs_that_do_not_fit_are_refused():
  adapters, _ = problems.make(MIXED)
  auxiliary = adapters["auxiliary"]

  def update(specs):
    tx = keep_in_frobenius_ball(RHO, specs=specs)
    tx.update(auxiliary, tx.init(auxiliary), auxiliary)

  with pytest.raises(ValueError, match=r"it has none at \['t'\], \['u'\]"):
    update({name: Factors(P(), P()) for name in ("v", "w")})
  specs = {name: Factors(P(), P()) for name in auxiliary}
  specs["t"] = Factors(P(None, "model"), P())
  with pytest.raises(ValueError, match=r"rank of a pair is never sharded"):
    update(specs)
