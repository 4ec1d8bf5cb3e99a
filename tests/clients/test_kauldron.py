"""Kauldron's trainer, on gemma with the LoRA that gemma itself has."""

import checks
from gemma import gm
import jax
import jax.numpy as jnp
from kauldron import kd
import optax

from bilora_jax import Layout, bilora, joined

R1, R2, STEPS = 2, 3, 8
LAYOUT = Layout("lora/a", "lora/b", 1.0)
TOKENS = checks.tokens(16, 9, below=13)


def _model(rank):
  gemma = gm.testing.DummyGemma(dtype=jnp.float32, tokens="batch.tokens")
  return gm.nn.LoRA(rank=rank, dtype=jnp.float32, model=gemma)


def _trainer(folder):
  # What a user of Kauldron changes: the rank, and the optimizer.
  return kd.train.Trainer(
    workdir=folder,
    train_ds=kd.data.InMemoryPipeline(
      batch_size=8,
      loader=lambda: {"tokens": TOKENS[:, :-1], "next": TOKENS[:, 1:, None]},
    ),
    model=_model(R1 + R2),
    optimizer=kd.optim.partial_updates(
      joined(
        bilora(optax.adamw(1e-2, weight_decay=0.0), rho=checks.RHO), LAYOUT, R1
      ),
      mask=kd.optim.select("lora"),
    ),
    train_losses={
      "next": kd.losses.SoftmaxCrossEntropyWithIntLabels(
        logits="preds.logits", labels="batch.next"
      )
    },
    num_train_steps=STEPS,
    writer=kd.train.metric_writer.NoopWriter(),
    checkpointer=kd.ckpts.Checkpointer(save_interval_steps=STEPS),
  )


@jax.jit
def _loss_of_primary(params):
  """Of gemma's own LoRA of rank r1, which has heard of no auxiliary."""
  primary = LAYOUT.primary(params, R1)
  outputs = _model(R1).apply({"params": primary}, TOKENS)
  return checks.next_token_loss(outputs.logits, TOKENS)


def test_kauldron_trains_gemma(tmp_path):
  trainer = _trainer(tmp_path)
  start = trainer.init_state().params
  state, _ = trainer.train()

  assert _loss_of_primary(state.params) < _loss_of_primary(start)
  before, after = (LAYOUT.split(x, R1) for x in (start, state.params))
  checks.assert_same(after["extra"], before["extra"])
  assert 0 < checks.dense_norm(after["auxiliary"]) <= checks.RHO * (1 + 1e-5)
  assert float(optax.tree.get(state.opt_state, "clip_factor")) < 1

  # All steps are done: the run that goes on only reads its checkpoint.
  resumed, _ = _trainer(tmp_path).train()
  checks.assert_same(resumed.params, state.params)
  checks.assert_same(resumed.opt_state, state.opt_state)
