"""Logits that are read in chunks give the numbers of logits that are not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilora_jax import LoraSpec, adapt, bilora
from train.data import objectives
from train.models.decoder import config as decoder_config
from train.models.decoder import model as decoder
from train.run import lowering

ROWS, LENGTH, VOCABULARY = 2, 7, 29
SIZES = {
  "vocab_size": VOCABULARY,
  "hidden_size": 8,
  "num_layers": 1,
  "num_heads": 2,
  "num_kv_heads": 1,
  "head_dim": 4,
  "intermediate_size": 12,
  "max_positions": 16,
}
# Three chunks, of 3, 3 and 1 tokens of each row.
LIMIT = ROWS * 3 * VOCABULARY * 4


def _model(limit, tied):
  sizes = decoder_config.DecoderConfig(**SIZES, tied=tied)
  return decoder.Decoder(sizes, logits_bytes=limit)


def _batch():
  rng = np.random.default_rng(0)
  shape = (ROWS, LENGTH)
  return {
    "tokens": rng.integers(0, VOCABULARY, shape, np.int32),
    "targets": rng.integers(0, VOCABULARY, shape, np.int32),
    "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
    "lengths": np.full((ROWS, 1), LENGTH, np.int32),
    "weights": rng.integers(0, 2, shape).astype(np.float32),
  }


def _losses(limit, tied, targets):
  """Losses of 20 steps, the last state, and the step's jaxpr."""
  model, batch = _model(limit, tied), _batch()
  inputs = objectives.NEXT_TOKEN.inputs(batch)
  variables = model.init(jax.random.key(0), *inputs)
  spec = LoraSpec(rank=2, alpha=4.0, targets=targets, auxiliary_rank=2)
  adapted = adapt(model, spec, *inputs)
  adapters = adapted.init(jax.random.key(1), variables)
  tx = bilora(optax.adam(1e-2), rho=0.05)

  def loss_fn(adapters):
    told = adapted.apply(variables, adapters, *inputs)
    items = objectives.NEXT_TOKEN.items(told, batch)
    return jnp.sum(items.losses * items.weights) / jnp.sum(items.weights)

  def step(carry, _):
    adapters, state = carry
    loss, grads = jax.value_and_grad(loss_fn)(adapters)
    updates, state = tx.update(grads, state, adapters)
    return (optax.apply_updates(adapters, updates), state), loss

  def run(adapters):
    return jax.lax.scan(step, (adapters, tx.init(adapters)), length=20)

  jaxpr = str(jax.make_jaxpr(jax.value_and_grad(loss_fn))(adapters))
  (adapters, _), losses = jax.jit(run)(adapters)
  return losses, adapters, jaxpr


@pytest.mark.parametrize(
  ("tied", "targets"),
  # The head with adapters of its own is differentiated by, and so runs twice.
  [(True, ".*q_proj"), (False, ".*(q_proj|lm_head)")],
)
def test_chunks_train_as_all_logits_do(tied, targets):
  whole, expected, of_whole = _losses(2**30, tied, targets)
  losses, adapters, of_chunks = _losses(LIMIT, tied, targets)
  np.testing.assert_allclose(losses, whole, rtol=1e-5)
  for x, y in zip(jax.tree.leaves(adapters), jax.tree.leaves(expected)):
    np.testing.assert_allclose(x, y, atol=1e-5)
  all_logits = f"f32[{ROWS},{LENGTH},{VOCABULARY}]"
  assert all_logits in of_whole
  assert all_logits not in of_chunks


def test_what_is_read_in_chunks_is_read_of_all_logits():
  batch = _batch()
  inputs = objectives.NEXT_TOKEN.inputs(batch)
  variables = _model(2**30, True).init(jax.random.key(0), *inputs)
  logits = np.asarray(_model(2**30, True).apply(variables, *inputs[:-1]))
  told = _model(LIMIT, True).apply(variables, *inputs)
  wide = logits.astype(np.float64)
  right = np.take_along_axis(wide, batch["targets"][..., None], -1)[..., 0]
  expected = np.log(np.exp(wide).sum(-1)) - right
  np.testing.assert_allclose(told.losses, expected, rtol=1e-5)
  np.testing.assert_array_equal(told.predictions, logits.argmax(-1))


def test_a_second_derivative_of_chunks_is_refused_in_a_sentence():
  model, batch = _model(LIMIT, True), lowering.next_token_batch(ROWS, LENGTH)
  batch = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), batch)
  inputs = objectives.NEXT_TOKEN.inputs(batch)
  variables = model.init(jax.random.key(0), *inputs)

  def loss(scale):
    embedding = variables["params"]["embed_tokens"]["embedding"]
    params = {
      **variables["params"],
      "embed_tokens": {"embedding": scale * embedding},
    }
    return model.apply({"params": params}, *inputs).losses.sum()

  with pytest.raises(NotImplementedError, match="a greater logits_bytes"):
    jax.grad(jax.grad(loss))(1.0)
