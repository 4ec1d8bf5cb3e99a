"""Adam's moments of the auxiliary follow its factors through the clip."""

import by_hand
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import reference

from bilora_jax import bilora
from bilora_jax.variants import rescale_moments

STEPS = 12


# In the ball, outside of it, and a ball of no size.
RADII = np.full(STEPS, 0.1, np.float32)
RADII[[2, 7]], RADII[5] = 10.0, 0.0


@pytest.mark.parametrize("clip", ["global", "layer"])
def test_a_run_is_adam_with_rescaled_moments(clip):
  adapters, data = problems.make(problems.SMALL)
  radius = jnp.asarray(RADII).__getitem__
  tx = rescale_moments(bilora(optax.adam(0.01, b2=0.99), radius, clip=clip))
  tx = optax.apply_if_finite(optax.MultiSteps(tx, 2), 3)
  history, _ = problems.train(tx, adapters, data, 2 * STEPS)

  layers, modules = problems.to_reference(adapters, data)
  seen = []

  def clip_all(modules, memories, t):
    factors = by_hand.clip(layers, modules, RADII[t], each=clip == "layer")
    seen.extend(factors)
    for j, (of_b, of_a) in enumerate(factors):
      # The gradient of A2 is B2^T G.
      for name, f in ("A2", of_b), ("B2", of_a):
        m, v = memories[name][j]
        memories[name][j] = f * m, f**2 * v

  adam = reference.adamw(0.01, beta2=0.99)
  optimizers = dict.fromkeys(modules, adam)
  expected = by_hand.train(layers, modules, STEPS, optimizers, after=clip_all)
  assert {0 < b < 1 for b, _ in seen} == {True, False}
  expected = problems.from_reference(expected, adapters)
  # Float32 against float64.
  assert problems.relative_error(problems.at(history, -1), expected) <= 3e-5


def test_other_optimizers_are_refused():
  adapters, _ = problems.make(problems.SMALL)
  only_primary = bilora(optax.adam(0.01), 0.1, optax.sgd(0.1))
  for tx in only_primary, optax.adam(0.01):
    with pytest.raises(ValueError, match=r"with Adam for the auxiliary"):
      rescale_moments(tx).init(adapters)


def test_missing_params_are_refused():
  adapters, _ = problems.make(problems.SMALL)
  tx = rescale_moments(bilora(optax.adam(0.01), 0.1))
  with pytest.raises(ValueError, match="needs params"):
    tx.update(adapters, tx.init(adapters))
