"""The training step: its loss, its metrics, and steps that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train import step
from train.methods import Method


def _copy(tree):
  return jax.tree.map(np.array, tree)


def _same(left, right):
  for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
    np.testing.assert_array_equal(x, y)


def _linear(**changes) -> Method:
  """Logits are `tokens * weight`, so that a test can choose them."""
  fields = {
    "init": lambda key, variables: variables,
    "apply": lambda variables, trained, tokens, mask, types, rngs=None: (
      tokens * trained["weight"]
    ),
    "tx": optax.with_extra_args_support(optax.adam(0.1)),
    "evaluated": lambda trained: trained,
  }
  return Method(**(fields | changes))


def _batch(logits):
  logits = np.asarray(logits, np.float32)
  return {
    "tokens": logits,
    "mask": np.ones(logits.shape, np.int32),
    "token_types": np.zeros(logits.shape, np.int32),
    "labels": np.array([0, 1], np.int32),
  }


WEIGHT = {"weight": jnp.ones(2)}
FINE = _batch([[1.0, -1.0], [0.5, 2.0]])
BROKEN = _batch([[np.nan, -1.0], [0.5, 2.0]])


def test_metrics_are_those_of_the_logits(prepared, train_step, batch):
  ready = prepared(method="bilora")
  state = step.init(ready.method, jax.random.key(0), ready.variables)
  logits = np.asarray(
    ready.method.apply(ready.variables, state.trained, *step.inputs(batch)),
    np.float64,
  )
  _, metrics = train_step(method="bilora")(ready.variables, state, batch)
  of_label = logits[np.arange(8), batch["labels"]]
  expected = np.mean(np.log(np.exp(logits).sum(-1)) - of_label)
  np.testing.assert_allclose(metrics.loss, expected, rtol=1e-5)
  right = np.mean(logits.argmax(-1) == batch["labels"])
  assert float(metrics.accuracy) == pytest.approx(right)
  assert int(metrics.tokens) == batch["mask"].sum()
  assert int(metrics.nonfinite) == 0


def test_only_bilora_has_a_ball(prepared, train_step, batch):
  for method in ("bilora", "lora", "full"):
    ready = prepared(method=method)
    state = step.init(ready.method, jax.random.key(0), ready.variables)
    for _ in range(3):
      state, metrics = train_step(method=method)(ready.variables, state, batch)
    if method == "bilora":
      assert float(metrics.c_over_rho) > 1
      assert 0 < float(metrics.clip_factor) < 1
      # c before the clip; factor^2 * c, the product's norm after it, is rho.
      np.testing.assert_allclose(
        metrics.clip_factor**2 * metrics.c_over_rho, 1.0, rtol=1e-4
      )
    else:
      assert np.isnan(metrics.c_over_rho)
      assert float(metrics.clip_factor) == 1


def test_the_state_counts_steps_and_the_base_outlives_it(
  prepared, train_step, batch
):
  ready = prepared(method="full")
  base = _copy(ready.variables)
  state = step.init(ready.method, jax.random.key(0), ready.variables)
  for number in range(1, 4):
    state, _ = train_step(method="full")(ready.variables, state, batch)
    assert int(state.step) == number
  # Each step gives its state's buffers away; the base must not be in them.
  _same(ready.variables, base)


def test_dropout_differs_by_step_and_not_by_run(prepared, train_step, batch):
  ready = prepared(method="lora", dropout=0.5)

  def losses():
    state = step.init(ready.method, jax.random.key(0), ready.variables)
    # Of new adapters the product is zero, whatever is dropped.
    moved = jax.tree.map(lambda x: x + 0.1, state.trained)
    found = []
    for number in range(3):
      now = state._replace(step=jnp.int32(number), trained=moved)
      _, metrics = train_step(method="lora", dropout=0.5)(
        ready.variables, jax.tree.map(jnp.copy, now), batch
      )
      found.append(float(metrics.loss))
    return found

  first = losses()
  assert len(set(first)) == 3
  assert losses() == first


def test_evaluation_labels_and_losses_are_those_of_rows(prepared, batch):
  ready = prepared()
  state = step.init(ready.method, jax.random.key(0), ready.variables)
  evaluated = ready.method.evaluated(state.trained)
  labels, losses = step.make_eval_step(ready.method)(
    ready.variables, evaluated, batch
  )
  logits = np.asarray(
    ready.method.apply(ready.variables, evaluated, *step.inputs(batch))
  )
  np.testing.assert_array_equal(labels, logits.argmax(-1))
  of_label = logits[np.arange(8), batch["labels"]]
  expected = np.log(np.exp(logits).sum(-1)) - of_label
  np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts():
  method = _linear()
  train_step = step.make_train_step(method, jax.random.key(0))
  state = step.init(method, jax.random.key(0), WEIGHT)
  state, _ = train_step({}, state, FINE)
  before = _copy(state)
  in_a_row = []
  for batch in (BROKEN, BROKEN):
    state, metrics = train_step({}, state, batch)
    assert np.isnan(metrics.loss)
    in_a_row.append(int(metrics.nonfinite))
  assert in_a_row == [1, 2]
  assert int(state.step) == 3
  _same(state.trained, before.trained)
  _same(state.opt_state.inner_state, before.opt_state.inner_state)
  state, metrics = train_step({}, state, FINE)
  assert int(metrics.nonfinite) == 0
  assert not np.array_equal(state.trained["weight"], before.trained["weight"])


def test_a_gradient_that_is_not_finite_is_skipped():
  def value_and_grad(loss_fn, has_aux):
    def of(trained, *rest):
      bad = jax.tree.map(lambda x: x * jnp.inf, trained)
      return loss_fn(trained, *rest), bad

    return of

  method = _linear(value_and_grad=value_and_grad)
  state = step.init(method, jax.random.key(0), WEIGHT)
  state, metrics = step.make_train_step(method, jax.random.key(0))(
    {}, state, FINE
  )
  assert np.isfinite(metrics.loss)
  assert int(metrics.nonfinite) == 1
  _same(state.trained, WEIGHT)


def test_a_loss_that_is_not_finite_is_skipped_whatever_its_gradient():
  def value_and_grad(loss_fn, has_aux):
    def of(trained, *rest):
      _, right = loss_fn(trained, *rest)
      return (jnp.inf, right), jax.tree.map(jnp.ones_like, trained)

    return of

  method = _linear(value_and_grad=value_and_grad)
  state = step.init(method, jax.random.key(0), WEIGHT)
  state, metrics = step.make_train_step(method, jax.random.key(0))(
    {}, state, FINE
  )
  assert int(metrics.nonfinite) == 1
  _same(state.trained, WEIGHT)


def test_a_finite_step_moves_against_the_gradient():
  method = _linear()
  state = step.init(method, jax.random.key(0), WEIGHT)
  train_step = step.make_train_step(method, jax.random.key(0))
  losses = []
  for _ in range(5):
    state, metrics = train_step({}, state, FINE)
    losses.append(float(metrics.loss))
  assert losses == sorted(losses, reverse=True)
