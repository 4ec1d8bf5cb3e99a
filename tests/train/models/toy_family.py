"""A contributor's family, in one file: the mean of tokens, and an MLP on it."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from train.models import registry
from train.models.family import Family
from train.models.io import stored


@dataclasses.dataclass(frozen=True)
class BagConfig:
  """Sizes."""

  vocab_size: int
  hidden_size: int

  @classmethod
  def from_hf(cls, config):
    return cls(config["vocab_size"], config["hidden_size"])


class Encoder(nn.Module):
  config: BagConfig

  @nn.compact
  def __call__(self, tokens, mask):
    c = self.config
    x_BxLxD = nn.Embed(c.vocab_size, c.hidden_size, name="word")(tokens)
    count_Bx1 = jnp.maximum(mask.sum(1, keepdims=True), 1)
    x_BxD = (x_BxLxD * mask[..., None]).sum(1) / count_Bx1
    return nn.relu(nn.Dense(c.hidden_size, name="inner")(x_BxD))


class Bag(nn.Module):
  config: BagConfig
  num_classes: int

  def setup(self):
    self.encoder = Encoder(self.config)
    self.head = nn.Dense(self.num_classes)

  def __call__(self, tokens, mask, token_types=None):
    return self.head(self.features(tokens, mask))

  def features(self, tokens, mask, token_types=None):
    return self.encoder(tokens, mask)


def _params(model, tensors, dtype, place):
  vocab_size, width = model.config.vocab_size, model.config.hidden_size
  plan = {
    ("encoder", "word", "embedding"): stored.Source(
      ("word.weight",), (vocab_size, width), False, False
    ),
    ("encoder", "inner", "kernel"): stored.Source(
      ("inner.weight",), (width, width), True, False
    ),
    ("encoder", "inner", "bias"): stored.Source(
      ("inner.bias",), (width,), False, False
    ),
  }
  stored.check(plan, tensors, lambda _: False, "bag of tokens")
  return stored.read(plan, tensors, dtype, place)


def _logical_axes(variables):
  def names(path, x):
    is_inner = path[-2].key == "inner" and x.ndim == 2
    axes = ("embed", "mlp") if is_inner else (None,) * x.ndim
    return jax.sharding.PartitionSpec(*axes)

  return jax.tree_util.tree_map_with_path(names, variables)


FAMILY = Family(
  name="bag of tokens",
  reads="texts",
  answers="head",
  config=BagConfig,
  modules=(Bag,),
  model_types=("bag",),
  classifier=lambda config, labels, **_: Bag(config, labels),
  params=_params,
  example_inputs=lambda _: (jax.ShapeDtypeStruct((1, 2), "int32"),) * 2,
  logical_axes=_logical_axes,
)
registry.register(FAMILY)
