"""Hugging Face's Flax models: `model.module` is Linen's."""

import checks
import jax.numpy as jnp
import pytest
import transformers

SIZES = {
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 24,
}
IDS = checks.tokens(4, 8, below=32)
MASK = jnp.ones_like(IDS)
POSITIONS = jnp.broadcast_to(jnp.arange(8), IDS.shape)
LABELS = jnp.arange(4) % 3


def _client(model, found, **about):
  return checks.Client(
    model.module, {"params": model.params}, found=found, **about
  )


def _bert():
  config = transformers.BertConfig(
    vocab_size=32, max_position_embeddings=16, num_labels=3, **SIZES
  )
  return _client(
    transformers.FlaxBertForSequenceClassification(config),
    args=(
      IDS,
      jnp.ones_like(IDS),
      jnp.zeros_like(IDS),
      jnp.arange(8)[None] + 0 * IDS,
      None,
    ),
    loss=lambda outputs: checks.cross_entropy(outputs.logits, LABELS),
    found={
      "query": 2,
      "key": 2,
      "value": 2,
      "dense": 7,
      "classifier": 1,
    },
  )


def _vit():
  config = transformers.ViTConfig(
    image_size=8, patch_size=4, num_labels=3, **SIZES
  )
  images = jnp.linspace(-1, 1, 4 * 8 * 8 * 3).reshape(4, 8, 8, 3)
  return _client(
    transformers.FlaxViTForImageClassification(config),
    args=(images,),
    loss=lambda outputs: checks.cross_entropy(outputs.logits, LABELS),
    found={
      "query": 2,
      "key": 2,
      "value": 2,
      "dense": 6,
      "projection": 1,
      "classifier": 1,
    },
  )


def _gpt2():
  config = transformers.GPT2Config(
    vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2
  )
  return _client(
    transformers.FlaxGPT2LMHeadModel(config),
    args=(IDS, MASK, POSITIONS),
    loss=lambda outputs: checks.next_token_loss(outputs.logits, IDS),
    found={"c_attn": 2, "c_proj": 4, "c_fc": 2},
  )


def _llama():
  config = transformers.LlamaConfig(
    vocab_size=32, max_position_embeddings=16, num_key_value_heads=1, **SIZES
  )
  return _client(
    transformers.FlaxLlamaForCausalLM(config),
    args=(IDS, MASK, POSITIONS),
    loss=lambda outputs: checks.next_token_loss(outputs.logits, IDS),
    found={
      "q_proj": 2,
      "k_proj": 2,
      "v_proj": 2,
      "o_proj": 2,
      "gate_proj": 2,
      "up_proj": 2,
      "down_proj": 2,
      "lm_head": 1,
    },
  )


@pytest.mark.parametrize("client", [_bert, _vit, _gpt2, _llama])
def test_transformers(client, tmp_path):
  checks.check(client(), tmp_path)
