"""LoRA+: two learning rates."""

import by_hand
import optax
import problems
import pytest
import reference

from bilora_jax import bilora
from bilora_jax.baselines import lora_plus

STEPS = 12


def adamw(rate):
  return reference.adamw(rate, beta2=0.99, weight_decay=0.3)


def test_a_run_has_two_learning_rates():
  # Both parts of Bi-LoRA, and extra parameters at the rate of A; inside of what
  # traces the ratio, halves the steps and watches for NaNs.
  adapters, data = problems.make(problems.SMALL)
  optimizer = optax.adamw(0.002, b2=0.99, weight_decay=0.3)

  def make(ratio):
    return bilora(lora_plus(optimizer, ratio), 0.1)

  tx = optax.apply_if_finite(
    optax.MultiSteps(optax.inject_hyperparams(make)(ratio=16.0), 2), 3
  )
  history, _ = problems.train(tx, adapters, data, 2 * STEPS)

  layers, modules = problems.to_reference(adapters, data)
  modules = by_hand.train(
    layers,
    modules,
    STEPS,
    {name: adamw(0.002) for name in ("A1", "A2", "v")}
    | {name: adamw(16 * 0.002) for name in ("B1", "B2")},
    after=lambda modules, _, t: by_hand.clip(layers, modules, 0.1) and None,
  )
  expected = problems.from_reference(modules, adapters)
  # Float32 against float64.
  assert problems.relative_error(problems.at(history, -1), expected) <= 3e-5


@pytest.mark.parametrize("ratio", [0.0, -2.0, float("inf"), float("nan")])
def test_bad_ratios_are_refused(ratio):
  with pytest.raises(ValueError, match=r"ratio.* finite and above 0; got"):
    lora_plus(optax.sgd(0.1), ratio)
