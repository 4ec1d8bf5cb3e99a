"""The training step: its loss, its metrics, and steps that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilora_jax import baselines
from train.data.objectives import CLASSIFICATION, NEXT_TOKEN
from train.methods.method import Method
from train.run import step


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
    ready.method.apply(
      ready.variables, state.trained, *CLASSIFICATION.inputs(batch)
    ),
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
  found = step.make_eval_step(ready.method, CLASSIFICATION)(
    ready.variables, evaluated, batch
  )
  logits = np.asarray(
    ready.method.apply(
      ready.variables, evaluated, *CLASSIFICATION.inputs(batch)
    )
  )
  np.testing.assert_array_equal(found.predictions, logits.argmax(-1))
  np.testing.assert_array_equal(
    found.right, logits.argmax(-1) == batch["labels"]
  )
  of_label = logits[np.arange(8), batch["labels"]]
  expected = np.log(np.exp(logits).sum(-1)) - of_label
  np.testing.assert_allclose(found.losses, expected, rtol=1e-4)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts():
  method = _linear()
  train_step = step.make_train_step(method, CLASSIFICATION)
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
  def estimate(value_and_grad, state, key, trained, *rest):
    value, _ = value_and_grad(trained, *rest)
    infinite = jax.tree.map(lambda x: x * jnp.inf, trained)
    return (value, infinite), infinite

  def zeros(trained):
    return jax.tree.map(jnp.zeros_like, trained)

  method = _linear(estimator=baselines.GradientEstimator(zeros, estimate))
  state = step.init(method, jax.random.key(0), WEIGHT)
  state, metrics = step.make_train_step(method, CLASSIFICATION)({}, state, FINE)
  assert np.isfinite(metrics.loss)
  assert int(metrics.nonfinite) == 1
  _same(state.trained, WEIGHT)
  _same(state.estimator, zeros(WEIGHT))


def test_a_loss_that_is_not_finite_is_skipped_whatever_its_gradient():
  def estimate(value_and_grad, state, key, trained, *rest):
    (_, right), _ = value_and_grad(trained, *rest)
    return ((jnp.inf, right), jax.tree.map(jnp.ones_like, trained)), state

  method = _linear(
    estimator=baselines.GradientEstimator(lambda trained: (), estimate)
  )
  state = step.init(method, jax.random.key(0), WEIGHT)
  state, metrics = step.make_train_step(method, CLASSIFICATION)({}, state, FINE)
  assert int(metrics.nonfinite) == 1
  _same(state.trained, WEIGHT)


def test_a_finite_step_moves_against_the_gradient():
  method = _linear()
  state = step.init(method, jax.random.key(0), WEIGHT)
  train_step = step.make_train_step(method, CLASSIFICATION)
  losses = []
  for _ in range(5):
    state, metrics = train_step({}, state, FINE)
    losses.append(float(metrics.loss))
  assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(("method", "parts"), [("lora_sam", 2), ("bilora", 4)])
def test_a_batch_in_parts_makes_the_same_step(
  prepared, train_step, batch, method, parts
):
  ready = prepared(method=method)
  in_parts = step.make_train_step(
    ready.method, CLASSIFICATION, accumulate=parts
  )
  ends = []
  for next_state in (train_step(method=method), in_parts):
    state = step.init(ready.method, jax.random.key(0), ready.variables)
    for _ in range(5):
      state, metrics = next_state(ready.variables, state, batch)
    ends.append((state.trained, metrics))
  # Sums of another order, in float32.
  for x, y in zip(*map(jax.tree.leaves, ends)):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_parts_of_a_batch_count_by_their_weights():
  """As a loss on tokens has them: a part may have few, or none."""
  batch = {
    "tokens": np.array([[1, 2], [3, 0], [2, 1], [0, 3]], np.float32),
    "targets": np.array([[1, 2], [3, 0], [2, 1], [0, 3]], np.int32),
    "positions": np.zeros((4, 2), np.int32),
    "lengths": np.full((4, 1), 2, np.int32),
    "weights": np.array([[1, 1], [1, 0], [0, 0], [0, 0]], np.float32),
  }
  method = _linear(
    apply=lambda variables, trained, tokens, *rest, rngs: rest[-1](
      tokens[..., None] * trained["weight"]
    )
  )
  ends = []
  for parts in (1, 2, 4):
    state = step.init(method, jax.random.key(0), {"weight": jnp.arange(4.0)})
    state, metrics = step.make_train_step(method, NEXT_TOKEN, accumulate=parts)(
      {}, state, batch
    )
    ends.append((np.asarray(state.trained["weight"]), float(metrics.loss)))
  logits = np.multiply.outer([1.0, 2.0, 3.0], np.arange(4.0))
  chosen = logits[np.arange(3), [1, 2, 3]]
  loss = np.mean(np.log(np.exp(logits).sum(-1)) - chosen)
  for weight, found in ends:
    assert found == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(weight, ends[0][0], rtol=1e-5)


def test_smoothed_labels_are_for_training_alone(prepared, batch):
  ready = prepared(method="lora", label_smoothing=0.5)
  logits = np.arange(16, dtype=np.float32).reshape(8, 2) ** 2
  trained, tested = (
    objective.items(logits, batch).losses
    for objective in (ready.training_objective, ready.data.objective)
  )
  assert np.all(trained != tested)
  np.testing.assert_array_equal(
    tested, CLASSIFICATION.items(logits, batch).losses
  )


def test_values_have_no_classes_to_smooth(run, tmp_path, capsys):
  rows = tmp_path / "rows.csv"
  lines = [f"words {i},{i / 7}" for i in range(30)]
  rows.write_text("\n".join(["text,label", *lines]))
  task = ("--task", "regression", "--data", str(rows))
  assert run(tmp_path / "run", *task, "--label-smoothing", "0.1") == 2
  assert (
    "--label-smoothing is only for models that return a logit for each class; "
    "got --task regression" in capsys.readouterr().err
  )
