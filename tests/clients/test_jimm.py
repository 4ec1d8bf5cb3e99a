"""jimm's vision transformer (`jax-image-models`), whose layers are scanned."""

import checks
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jimm.models import VisionTransformer
import pytest


@pytest.fixture
def mesh():
  """Without one, Flax refuses the names that jimm gives to axes."""
  mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    yield mesh


def test_vision_transformer(mesh, tmp_path):
  model = VisionTransformer(
    num_classes=3,
    img_size=8,
    patch_size=4,
    num_layers=2,
    num_heads=2,
    mlp_dim=24,
    hidden_size=16,
    rngs=nnx.Rngs(0),
  )
  images = jnp.linspace(-1, 1, 4 * 8 * 8 * 3).reshape(4, 8, 8, 3)
  checks.check(
    checks.Client(
      model,
      nnx.state(model),
      args=(images,),
      loss=lambda logits: checks.cross_entropy(logits, jnp.arange(4) % 3),
      found={  # once for all layers
        "query": 1,
        "key": 1,
        "value": 1,
        "out": 1,
        "0": 1,
        "3": 1,
        "patch_embeddings": 1,
      },
      # jimm asks for the type of its head's kernel, as it has to be an array.
      exclude="classifier",
    ),
    tmp_path,
  )
