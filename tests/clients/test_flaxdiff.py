"""flaxdiff's U-Net and its diffusion transformer, of Linen."""

import checks
from flaxdiff.models.simple_dit import SimpleDiT
from flaxdiff.models.simple_unet import Unet
import jax
import jax.numpy as jnp
import pytest

IMAGES = jnp.linspace(-1, 1, 4 * 8 * 8 * 3).reshape(4, 8, 8, 3)
TIMES = jnp.linspace(0.1, 0.9, 4)
TEXT = jnp.sin(jnp.arange(4 * 5 * 8.0)).reshape(4, 5, 8)


def _unet():
  return Unet(
    emb_features=16,
    feature_depths=(8, 16),
    attention_configs=({"heads": 2}, {"heads": 2}),
    num_res_blocks=1,
    norm_groups=4,
  )


def _dit():
  return SimpleDiT(patch_size=4, emb_features=16, num_layers=2, num_heads=2)


UNET = {
  "conv": 23,
  "temb_projection": 7,
  "to_q": 5,
  "to_k": 5,
  "to_v": 5,
  "to_out_0": 5,
  "DenseGeneral_0": 1,
  "DenseGeneral_1": 1,
}
DIT = {
  "layers_0": 2,
  "layers_2": 3,
  "ada_proj": 2,
  "to_q": 2,
  "to_k": 2,
  "to_v": 2,
  "to_out_0": 2,
  "Conv_0": 1,
  "DenseGeneral_0": 1,
  "DenseGeneral_1": 1,
  "text_context_proj": 1,
  "final_proj": 1,
}


@pytest.mark.parametrize(("make", "found"), [(_unet, UNET), (_dit, DIT)])
def test_flaxdiff(make, found, tmp_path):
  model, args = make(), (IMAGES, TIMES, TEXT)
  checks.check(
    checks.Client(
      model,
      jax.jit(model.init)(jax.random.key(0), *args),
      args=args,
      # The noise to be taken away is of one sign in each image.
      loss=lambda noise: jnp.square(
        noise - jnp.array([1, -1, 1, -1])[:, None, None, None]
      ).mean(),
      found=found,
    ),
    tmp_path,
  )
