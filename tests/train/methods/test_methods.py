"""The methods: each learns, and only what it says is trained or evaluated."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

from bilora_jax import Factors, primary
from train.data.objectives import CLASSIFICATION
from train.methods import optimizers
from train.methods import spec as specs
from train.run import assemble, step
from train.run import config as config_lib

SOME = ("lora", "bilora", "lora_full_sam", "full")


@pytest.fixture
def train(prepared, train_step, batch):
  """Steps on one batch to the state after, and the loss that each met."""

  def run(steps, **fields):
    ready, next_state = prepared(**fields), train_step(**fields)
    state = step.init(ready.method, jax.random.key(0), ready.variables)
    losses = []
    for _ in range(steps):
      state, metrics = next_state(ready.variables, state, batch)
      losses.append(float(metrics.loss))
    return state, losses

  return run


def _same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("method", SOME)
def test_the_loss_on_a_batch_falls_and_the_base_stays(prepared, train, method):
  ready = prepared(method=method)
  base = jax.tree.map(np.array, ready.variables)
  _, losses = train(20, method=method)
  # From about ln 2; a step of the schedule is too small for less than a tenth.
  assert losses[-1] < 0.9 * losses[0]
  _same(ready.variables, base)


@pytest.mark.parametrize("method", specs.every())
def test_a_step_takes_as_many_gradients_as_it_is_said_to(
  prepared, batch, method
):
  ready = prepared()
  config = config_lib.replace(ready.config, method=method)
  objective = CLASSIFICATION._replace(
    items=lambda logits, rows: CLASSIFICATION.items(jaxprs.mark(logits), rows)
  )
  inputs = objective.inputs(batch)
  built = assemble.method_of(config, ready.model, inputs, 24, objective)
  state = jax.eval_shape(
    lambda variables: step.init(built, jax.random.key(0), variables),
    ready.variables,
  )
  ways = jaxprs.costs(
    step.make_train_step(built, objective), ready.variables, state, batch
  )
  # Ways that differ in no gradient are one: an update is skipped or made.
  taken = sorted(
    {
      sum(n * size for (kind, size), n in way.items() if kind == "gradient")
      / len(batch["labels"])
      for way in ways
    }
  )
  # LookSAM's two ways: the one between, and that of every fifth step.
  weights = [0.8, 0.2] if len(taken) == 2 else [1]
  assert np.dot(taken, weights) == pytest.approx(config.method.gradients)


def test_with_a_ball_of_no_size_bilora_is_lora(train):
  lora, bilora = (
    state.trained for state, _ in (train(20, method="lora"), train(20, rho=0.0))
  )
  for part in ("primary", "extra"):
    for x, y in zip(jax.tree.leaves(lora[part]), jax.tree.leaves(bilora[part])):
      # The products of a wider pair may be summed in another order.
      np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


def test_with_a_ball_of_some_size_bilora_is_not_lora(train):
  lora, _ = train(20, method="lora")
  bilora, _ = train(20, method="bilora")
  apart = jax.tree.map(
    lambda x, y: jnp.max(jnp.abs(x - y)),
    lora.trained["primary"],
    bilora.trained["primary"],
  )
  assert max(jax.tree.leaves(apart)) > 1e-4


def test_evaluation_is_blind_to_the_auxiliary(prepared, train, batch):
  ready = prepared(method="bilora")
  state, _ = train(3, method="bilora")
  far = {
    **state.trained,
    "auxiliary": jax.tree.map(lambda x: x + 100.0, state.trained["auxiliary"]),
  }
  evaluate = step.make_eval_step(ready.method, CLASSIFICATION)
  near = ready.method.evaluated(state.trained)
  assert set(near) == {"primary", "extra"}
  _same(
    evaluate(ready.variables, near, batch),
    evaluate(ready.variables, ready.method.evaluated(far), batch),
  )
  # It would be seen, were it not left out.
  inputs = CLASSIFICATION.inputs(batch)
  assert not np.allclose(
    ready.method.apply(ready.variables, far, *inputs),
    ready.method.apply(ready.variables, near, *inputs),
  )


def test_a_second_adapter_that_is_kept_is_evaluated_and_merged(
  prepared, train, batch
):
  fields = {"method": "dual_lora", "keep_auxiliary": True}
  ready = prepared(**fields)
  state, _ = train(3, **fields)
  kept = ready.method.evaluated(state.trained)
  assert set(kept) == {"primary", "auxiliary", "extra"}
  inputs = CLASSIFICATION.inputs(batch)
  whole = ready.method.apply(ready.variables, state.trained, *inputs)
  merged = ready.method.merged(ready.variables, kept)
  for logits in (
    ready.method.apply(ready.variables, kept, *inputs),
    ready.model.apply(merged, *inputs),
  ):
    np.testing.assert_allclose(logits, whole, rtol=1e-5, atol=1e-6)
  # The second one is seen: without it the logits are others.
  alone = ready.method.merged(ready.variables, primary(kept))
  assert not np.allclose(ready.model.apply(alone, *inputs), whole, atol=1e-5)


def test_a_sketch_is_not_trained(prepared):
  ready = prepared(method="nystroem_sam", auxiliary_rank=6, core_rank=2)
  state = step.init(ready.method, jax.random.key(0), ready.variables)
  assert set(state.trained) == {"primary", "extra"}
  assert ready.method.adapted.spec.auxiliary_rank == 6


def test_full_trains_and_evaluates_all_parameters(prepared):
  ready = prepared(method="full")
  state = step.init(ready.method, jax.random.key(0), ready.variables)
  _same(state.trained, ready.variables["params"])
  _same(ready.method.evaluated(state.trained), ready.variables["params"])


@pytest.mark.parametrize("method", SOME)
def test_training_starts_at_the_pretrained_model(prepared, batch, method):
  ready = prepared(method=method)
  state = step.init(ready.method, jax.random.key(0), ready.variables)
  inputs = CLASSIFICATION.inputs(batch)
  np.testing.assert_allclose(
    ready.method.apply(ready.variables, state.trained, *inputs),
    ready.model.apply(ready.variables, *inputs),
    rtol=1e-5,
    atol=1e-6,  # float32, through two layers
  )


@pytest.mark.parametrize(
  "fields",
  [
    {
      "clip": "layer",
      "weight_decay": 0.1,
      "dropout": 0.5,
      "auxiliary_start": "scattered",
      "auxiliary_schedule": "constant",
      "rescale_moments": True,
    },
    {"auxiliary_optimizer": "power", "rho_ratio": 0.1, "auxiliary_rank": 2},
    {"method": "lora", "dtype": "bfloat16"},
    {"dora": True},
    {"method": "nystroem_sam", "auxiliary_rank": 6, "core_rank": 2},
  ],
  ids=str,
)
def test_every_variant_learns(train, fields):
  _, losses = train(20, **fields)
  # Dropout makes single losses noisy.
  assert np.mean(losses[-3:]) < losses[0]


def test_the_auxiliary_may_have_a_rate_of_its_own(tiny_config):
  # None of the primary's: what moves is the auxiliary alone.
  config = config_lib.replace(
    tiny_config,
    learning_rate=0.0,
    auxiliary_learning_rate=0.5,
    auxiliary_optimizer="sgd",
    auxiliary_schedule="constant",
    clip="none",
  )
  pair = Factors(jnp.ones((3, 2)), jnp.ones((2, 4)))
  trained = {"primary": {"w": pair}, "auxiliary": {"w": pair}}
  setting = specs.Setting(
    options=config.method.options,
    adapter=config.adapter,
    optimisation=config.optimisation,
    steps=10,
    apply=lambda *_: None,
    objective=CLASSIFICATION,
  )
  tx = config.method.spec.transformation(
    setting, optimizers.adamw(config.optimisation, 10)
  )
  updates, _ = tx.update(
    jax.tree.map(jnp.ones_like, trained), tx.init(trained), trained
  )
  np.testing.assert_allclose(updates["auxiliary"]["w"].b, 0.5)
  np.testing.assert_array_equal(updates["primary"]["w"].b, 0)


def test_the_gradient_is_clipped_to_the_norm_asked_for(train):
  free, _ = train(5, method="lora")
  clipped, _ = train(5, method="lora", max_grad_norm=0.1)
  moments = (s.opt_state.inner_state[1][0].nu for s in (free, clipped))
  largest = [max(float(x.max()) for x in jax.tree.leaves(m)) for m in moments]
  assert largest[1] < largest[0]
  # nu is a mean of squares, of which none can exceed the squared norm.
  assert largest[1] <= 0.1**2


def test_the_rate_rises_to_its_peak_and_ends_at_zero(tiny_config):
  rate = optimizers.schedule(tiny_config.optimisation, 1000)
  rates = np.array([rate(i) for i in (0, 15, 30, 515, 1000)])
  peak = tiny_config.optimisation.learning_rate
  # Half way up after 15 of 30 steps; the cosine is half way down at 515.
  np.testing.assert_allclose(
    rates, peak * np.array([0, 0.5, 1, 0.5, 0]), atol=1e-6 * peak
  )


def test_targets_choose_what_gets_adapters(prepared):
  ready = prepared(targets=".*/query")
  assert list(ready.method.adapted.targets) == ["encoder/layer_0/query/kernel"]


def test_the_head_is_trained_as_it_is(prepared):
  ready = prepared()
  state = step.init(ready.method, jax.random.key(0), ready.variables)
  assert list(state.trained["extra"]) == ["head"]
  assert not any("head" in name for name in ready.method.adapted.targets)
