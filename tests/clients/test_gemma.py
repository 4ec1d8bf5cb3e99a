"""google-deepmind's gemma, of Linen, jitted as a whole."""

import checks
from gemma import gm
import jax
import jax.numpy as jnp

IDS = jnp.asarray(checks.tokens(4, 8, below=13))


def test_gemma(tmp_path):
  model = gm.testing.DummyGemma(dtype=jnp.float32)
  checks.check(
    checks.Client(
      model,
      model.init(jax.random.key(0), IDS),
      args=(IDS,),
      loss=lambda outputs: checks.next_token_loss(outputs.logits, IDS),
      found={"qkv_einsum": 1, "attn_vec_einsum": 1, "mlp": 2},
    ),
    tmp_path,
  )
