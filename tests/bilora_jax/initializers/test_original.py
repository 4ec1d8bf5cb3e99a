"""What was trained beside a rest of the base, put beside the base."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilora_jax import LoraSpec, adapt, initializers

X = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
MODEL = nn.Sequential([nn.Dense(6), nn.DenseGeneral((2, 4))])


@pytest.mark.parametrize(
  "spec",
  [
    LoraSpec(rank=2, alpha=3.0, auxiliary_rank=1),
    LoraSpec(rank=2, alpha=3.0, rslora=True),
    LoraSpec(
      rank=3,
      targets={"layers_0": {"rank": 1}, ".*": {"alpha": 5.0}},
      rslora=True,
    ),
  ],
)
def test_the_trained_model_is_the_same_on_the_original_base(spec):
  adapted = adapt(MODEL, spec, X)
  variables = MODEL.init(jax.random.key(0), X)
  base, adapters = initializers.pissa(
    adapted, variables, adapted.init(jax.random.key(1), variables)
  )
  start = adapters["primary"]
  trained = {
    **adapters,
    "primary": jax.tree.map(lambda w: 1.1 * w + 0.2, start),
  }
  own, wider = initializers.on_original(spec, trained, start)
  widened = adapt(MODEL, own, X)
  widened.check(wider)
  y = adapted.apply(base, trained, X)
  # In float32, of outputs of order 10.
  np.testing.assert_allclose(
    widened.apply(variables, wider, X), y, rtol=1e-5, atol=1e-4
  )
  for name, pair in (
    ("layers_0", wider["primary"]["layers_0"]["kernel"]),
    ("layers_1", wider["primary"]["layers_1"]["kernel"]),
  ):
    assert pair.rank == 2 * start[name]["kernel"].rank
  assert not np.allclose(y, MODEL.apply(variables, X), atol=0.1)
  # The auxiliary stays what it was.
  assert ("auxiliary" in wider) is bool(spec.auxiliary_rank)


def test_what_is_no_start_of_it_is_refused():
  adapted = adapt(MODEL, LoraSpec(rank=2), X)
  adapters = adapted.init(jax.random.key(1), MODEL.init(jax.random.key(0), X))
  start = adapters["primary"]
  one = {"layers_0": start["layers_0"]}
  narrow = jax.tree.map(lambda w: jnp.ones((1, 1)), start)
  for wrong, fault in (
    (one, "layers_1/kernel: missing, expected"),
    (narrow, r"layers_0/kernel: \(\(1, 1\), \(1, 1\)\), expected"),
  ):
    message = f"shapes of the trained primary: {fault}"
    with pytest.raises(ValueError, match=message):
      initializers.on_original(adapted.spec, adapters, wrong)
  dora = dataclasses.replace(adapted.spec, dora=True)
  with pytest.raises(ValueError, match="got a spec with dora=True"):
    initializers.on_original(dora, adapters, start)
