"""Steps that are not finite are skipped as Optax does it, without a branch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.run import nonfinite, step

_PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}


def _gradients(seed, broken):
  w, b = np.random.default_rng(seed).normal(size=(2, 3)).astype("f4")
  gradients = {"w": np.stack([w, b]), "b": b}
  if broken:
    gradients["w"][1, 2] = broken
  return gradients


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_updates_and_states_are_those_of_apply_if_finite(broken):
  ours = nonfinite.skip_nonfinite(optax.adam(0.1))
  theirs = optax.apply_if_finite(optax.adam(0.1), 100)
  state, wanted_state = ours.init(_PARAMS), theirs.init(_PARAMS)
  update = jax.jit(ours.update)
  skipped = []
  for seed, worst in enumerate([0, broken, broken, 0, broken, 0]):
    gradients = _gradients(seed, worst)
    updates, state = update(gradients, state, _PARAMS, value=jnp.float32(1.0))
    wanted, wanted_state = theirs.update(gradients, wanted_state, _PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(wanted_state)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
      (updates, state),
      (wanted, wanted_state),
    )
    skipped.append(int(state.notfinite_count))
  assert skipped == [0, 1, 2, 0, 1, 0]
  assert int(state.total_notfinite) == 3


def test_a_loss_that_is_not_finite_is_skipped_too():
  tx = nonfinite.skip_nonfinite(optax.sgd(0.1))
  updates, state = tx.update(
    _gradients(0, 0), tx.init(_PARAMS), _PARAMS, value=jnp.float32(np.inf)
  )
  assert not any(np.any(x) for x in jax.tree.leaves(updates))
  assert int(state.notfinite_count) == 1


def test_no_nan_reaches_the_transformation_and_the_loss_does():
  seen = []

  def update(updates, state, params=None, **extra_args):
    seen.append((updates, extra_args["value"]))
    return updates, state

  tx = nonfinite.skip_nonfinite(
    optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
  )
  gradients = _gradients(0, np.nan)
  tx.update(gradients, tx.init(_PARAMS), _PARAMS, value=jnp.float32(2.0))
  ((updates, value),) = seen
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))
  assert value == 2


@pytest.mark.parametrize("method", ["lora", "bilora", "lora_sam"])
def test_no_step_waits_for_a_branch(prepared, train_step, batch, method):
  # A GPU's host takes a branch when the device has said which.
  ready = prepared(method=method)
  state = step.init(ready.method, jax.random.key(0), ready.variables)
  lowered = train_step(method=method).lower(ready.variables, state, batch)
  assert "stablehlo.case" not in lowered.as_text()
  assert "stablehlo.if" not in lowered.as_text()
