"""Bi-LoRA in Tunix's `PeftTrainer`: our own loop's losses and factors."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from tunix.models.llama3 import model as llama
from tunix.sft import hooks, peft_trainer, utils

from bilora_jax import LoraSpec, adapt, bilora, joined, qwix_layout

R1, R2, STEPS = 2, 3, 20
ALPHA = 4.0
TARGETS = ".*(_proj|lm_head)"


def _model():
  config = llama.ModelConfig(
    num_layers=2,
    vocab_size=32,
    embed_dim=16,
    hidden_dim=24,
    num_heads=4,
    head_dim=4,
    num_kv_heads=2,
    norm_eps=1e-5,
    rope_theta=10_000,
  )
  return llama.Llama3(config, rngs=nnx.Rngs(0))


def _inputs(batch):
  """What the model and Tunix's own loss take of a batch."""
  return {
    "input_tokens": batch.input_tokens,
    "input_mask": batch.input_mask,
    "positions": utils.build_positions_from_mask(batch.input_mask),
    "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
  }


def _batches():
  draw = np.random.default_rng(0)
  for _ in range(STEPS):
    # Each token is the one before plus a step that the first of them tells.
    first = draw.integers(0, 32, (4, 1))
    tokens = (first + np.arange(9) * (1 + first % 3)) % 32
    yield peft_trainer.TrainingInput(
      input_tokens=tokens.astype(np.int32),
      input_mask=np.ones((4, 9), bool),
    )


def _example():
  inputs = _inputs(next(_batches()))
  return {
    "input_tokens": inputs["input_tokens"],
    "positions": inputs["positions"],
    "cache": None,
    "attention_mask": inputs["attention_mask"],
  }


class _Losses(hooks.TrainingHooks):
  """Keeps the loss of each step."""

  def __init__(self):
    self.found = []

  def on_train_step_end(self, train_ctx, train_step, train_loss):
    self.found.append(float(train_loss))

  def on_train_start(self, train_ctx): ...
  def on_train_end(self, train_ctx): ...
  def on_train_step_start(self, train_ctx): ...
  def on_eval_step_start(self, train_ctx): ...
  def on_eval_step_end(self, train_ctx, eval_loss): ...


def _tx():
  return bilora(optax.adamw(0.02, weight_decay=0.0), rho=0.5)


def test_tunix_trains_as_our_own_loop_does():
  # What a user of Tunix changes: rank and alpha, and the optimizer.
  with_lora = qwix.apply_lora_to_model(
    _model(),
    qwix.LoraProvider(
      module_path=TARGETS, rank=R1 + R2, alpha=ALPHA * (R1 + R2) / R1
    ),
    **_example(),
  )
  layout = qwix_layout(ALPHA / R1)
  start = jax.tree.map(
    jnp.copy, layout.split(nnx.state(with_lora, nnx.LoRAParam), R1)
  )
  losses = _Losses()
  trainer = peft_trainer.PeftTrainer(
    with_lora,
    joined(_tx(), layout, primary_rank=R1),
    peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=STEPS),
  ).with_gen_model_input_fn(_inputs)
  trainer.with_training_hooks(losses)
  trainer.train(list(_batches()))

  model = _model()
  spec = LoraSpec(
    rank=R1, alpha=ALPHA, auxiliary_rank=R2, targets=TARGETS, exclude=None
  )
  adapted, variables = adapt(model, spec, **_example()), nnx.state(model)
  fresh = adapted.init(jax.random.key(0), variables)
  adapters = {
    part: jax.tree_util.tree_map_with_path(
      lambda path, pair, part=part: start[part][
        "/".join(str(key.key) for key in path)
      ],
      fresh[part],
      is_leaf=lambda x: hasattr(x, "frobenius_norm"),
    )
    for part in ("primary", "auxiliary")
  }
  tx, own = _tx(), []
  state = tx.init(adapters)

  @jax.jit
  def step(adapters, state, inputs):
    def loss_fn(adapters):
      def call(tokens, positions, cache, attention_mask):
        return adapted.apply(
          variables,
          adapters,
          input_tokens=tokens,
          positions=positions,
          cache=cache,
          attention_mask=attention_mask,
        )

      return peft_trainer._default_loss_fn(call, **inputs)

    loss, grads = jax.value_and_grad(loss_fn)(adapters)
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, loss

  for batch in _batches():
    adapters, state, loss = step(adapters, state, _inputs(batch))
    own.append(float(loss))

  np.testing.assert_allclose(losses.found, own, rtol=0, atol=1e-5)
  # They are the same losses, and not the same loss.
  assert own[-1] < own[0] - 0.03
  assert float(optax.tree.get(state, "clip_factor")) < 1
  kept = layout.primary(nnx.state(with_lora, nnx.LoRAParam), R1)
  ranks = {min(x.shape) for x in jax.tree.leaves(kept)}
  assert ranks == {R1}
