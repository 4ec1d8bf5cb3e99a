"""Tunix's language models, of NNX."""

import checks
from flax import nnx
import jax.numpy as jnp
import pytest
from tunix.models.gemma import model as gemma
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

IDS = checks.tokens(4, 8, below=32)
POSITIONS = jnp.broadcast_to(jnp.arange(8), IDS.shape)
CAUSAL = jnp.broadcast_to(jnp.tril(jnp.ones((8, 8), bool)), (4, 8, 8))
SIZES = {
  "num_layers": 2,
  "embed_dim": 16,
  "hidden_dim": 24,
  "num_heads": 4,
  "head_dim": 4,
  "num_kv_heads": 2,
}
LLAMA_SIZES = {"vocab_size": 32, "norm_eps": 1e-5, "rope_theta": 10_000} | SIZES
DENSE = {
  "q_proj": 2,
  "k_proj": 2,
  "v_proj": 2,
  "o_proj": 2,
  "gate_proj": 2,
  "up_proj": 2,
  "down_proj": 2,
  "lm_head": 1,
}
# The experts' weights are in `mlp` itself.
EXPERTS = {
  "q_proj": 2,
  "k_proj": 2,
  "v_proj": 2,
  "o_proj": 2,
  "router": 2,
  "mlp": 6,
  "lm_head": 1,
}
# The head is the table of the embedding, which is left out.
GEMMA = {
  "q_einsum": 2,
  "kv_einsum": 2,
  "attn_vec_einsum": 2,
  "gate_proj": 2,
  "up_proj": 2,
  "down_proj": 2,
}


def _gemma():
  return gemma.Gemma(
    gemma.ModelConfig(
      num_embed=32,
      final_logit_softcap=None,
      use_post_attn_norm=False,
      use_post_ffw_norm=False,
      attention_types=(gemma.AttentionType.GLOBAL,) * 2,
      **SIZES,
    ),
    rngs=nnx.Rngs(0),
  )


def _gemma3():
  config = gemma3.ModelConfig(
    num_embed=32, sliding_window_size=4, param_dtype=jnp.float32, **SIZES
  )
  return gemma3.Gemma3(config, rngs=nnx.Rngs(0))


def _llama3():
  config = llama3.ModelConfig(**LLAMA_SIZES)
  return llama3.Llama3(config, rngs=nnx.Rngs(0))


def _qwen2():
  return qwen2.Qwen2(qwen2.ModelConfig(**LLAMA_SIZES), rngs=nnx.Rngs(0))


def _qwen3():
  return qwen3.Qwen3(qwen3.ModelConfig(**LLAMA_SIZES), rngs=nnx.Rngs(0))


def _qwen3_of_experts():
  config = qwen3.ModelConfig(
    num_experts=3, num_experts_per_tok=2, **LLAMA_SIZES
  )
  return qwen3.Qwen3(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  ("make", "found"),
  [
    (_llama3, DENSE),
    (_qwen2, DENSE),
    (_qwen3, DENSE),
    (_qwen3_of_experts, EXPERTS),
    (_gemma, GEMMA),
    (_gemma3, GEMMA),
  ],
)
def test_tunix(make, found, tmp_path):
  model = make()
  checks.check(
    checks.Client(
      model,
      nnx.state(model),
      # Called by position: Gemma's tokens have another name.
      args=(IDS, POSITIONS, None, CAUSAL),
      loss=lambda outputs: checks.next_token_loss(outputs[0], IDS),
      found=found,
    ),
    tmp_path,
  )
