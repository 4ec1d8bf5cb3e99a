"""The mean over batches, against the loss of all rows at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilora_jax import sharpness

RNG = np.random.default_rng(0)
PARAMS = {
  "u": RNG.normal(size=(3, 4)).astype(np.float32),
  "v": RNG.normal(size=(4, 2)).astype(np.float32),
}
ROWS = RNG.normal(size=(24, 3)).astype(np.float32)


def _loss(params, rows):
  return jnp.mean((jnp.tanh(rows @ params["u"]) @ params["v"]) ** 2)


def test_value_gradient_and_curvature_are_those_of_all_rows():
  loss = sharpness.over(_loss, ROWS.reshape(6, 4, 3))

  def all_of(loss):
    curved = jax.jvp(jax.grad(loss), (PARAMS,), (PARAMS,))
    return loss(PARAMS), curved

  ours, whole = jax.jit(
    lambda: (all_of(loss), all_of(lambda params: _loss(params, ROWS)))
  )()
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(whole)):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_memory_is_that_of_one_batch():
  def temporaries(count):
    batches = jax.ShapeDtypeStruct((count, 64, 3), jnp.float32)

    def product(params, batches):
      loss = sharpness.over(_loss, batches)
      return jax.jvp(jax.grad(loss), (params,), (params,))[1]

    compiled = jax.jit(product).lower(PARAMS, batches).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # One more batch that is kept is 64 rows of 4 units, 1 KiB.
  assert temporaries(40) - temporaries(4) < 1024


@pytest.mark.parametrize(
  "batches",
  [
    {},
    {"x": np.zeros((2, 3)), "y": np.zeros(3)},
    np.zeros((0, 3)),
    np.ones(()),
  ],
)
def test_batches_of_unequal_number_are_refused(batches):
  with pytest.raises(ValueError, match=r"leading axis of the same size"):
    sharpness.over(_loss, batches)
