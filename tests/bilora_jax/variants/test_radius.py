"""A ball as large as the primary."""

import by_hand
import jax
import numpy as np
import optax
import problems
import pytest
import reference

from bilora_jax import bilora
from bilora_jax.variants import adaptive_radius

STEPS = 12
RATIO = 0.3


def test_a_run_has_the_primarys_radius():
  adapters, data = problems.make(problems.SMALL)
  # The 9 of bilora counts for nothing.
  tx = adaptive_radius(bilora(optax.adam(0.01, b2=0.99), 9.0), RATIO)
  wrapped = optax.apply_if_finite(optax.MultiSteps(tx, 2), 3)
  history, _ = problems.train(wrapped, adapters, data, 2 * STEPS)
  # The primary is zero before the first step.
  assert problems.dense_norm(problems.at(history, 1)["auxiliary"]) == 0

  layers, modules = problems.to_reference(adapters, data)
  radii = []

  def measure(modules, grads, t):
    del grads, t
    weights = [
      layer.s1 * b @ a
      for layer, b, a in zip(layers, modules["B1"], modules["A1"])
    ]
    radii.append(RATIO * np.sqrt(sum(np.sum(w**2) for w in weights)))

  def clip(modules, memories, t):
    del memories
    by_hand.clip(layers, modules, radii[t])

  adam = reference.adamw(0.01, beta2=0.99)
  expected = by_hand.train(
    layers, modules, STEPS, dict.fromkeys(modules, adam), measure, clip
  )
  expected = problems.from_reference(expected, adapters)
  # Float32 against float64.
  assert problems.relative_error(problems.at(history, -1), expected) <= 3e-5


def test_an_extra_argument_overrides_the_radius():
  adapters, _ = problems.make(problems.SMALL, fresh=False)
  grads = jax.tree.map(np.ones_like, adapters)
  tx = adaptive_radius(bilora(optax.sgd(0.01), 9.0), RATIO)

  @jax.jit
  def radii(rho):
    def auxiliary(**extra):
      updates, _ = tx.update(grads, tx.init(adapters), adapters, **extra)
      return optax.apply_updates(adapters, updates)["auxiliary"]

    return auxiliary(), auxiliary(rho=rho)

  own, given = (problems.dense_norm(x) for x in radii(0.02))
  assert own == pytest.approx(
    RATIO * problems.dense_norm(adapters["primary"]), rel=1e-6
  )
  assert given == pytest.approx(0.02, rel=1e-6)


@pytest.mark.parametrize("ratio", [-0.1, float("inf"), float("nan")])
def test_bad_ratios_are_refused(ratio):
  with pytest.raises(ValueError, match=r"ratio.* finite and at least 0; got"):
    adaptive_radius(bilora(optax.sgd(0.1)), ratio)


def test_what_has_no_ball_is_refused():
  adapters, _ = problems.make(problems.SMALL)
  with pytest.raises(ValueError, match="without a ball"):
    adaptive_radius(optax.adam(0.1), RATIO).init(adapters)


def test_missing_params_are_refused():
  adapters, _ = problems.make(problems.SMALL)
  tx = adaptive_radius(bilora(optax.sgd(0.1)), RATIO)
  with pytest.raises(ValueError, match="needs params"):
    tx.update(adapters, tx.init(adapters))
