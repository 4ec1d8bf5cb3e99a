"""What the examples train: a small network on points of two spirals."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from bilora_jax import LoraSpec, adapt


class Network(nn.Module):
  """Two hidden layers; two classes."""

  @nn.compact
  def __call__(self, x):
    for name in ("first", "second"):
      x = nn.relu(nn.Dense(32, name=name)(x))
    return nn.Dense(2, name="head")(x)


model = Network()
variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
adapted = adapt(model, LoraSpec(rank=4, auxiliary_rank=4), jnp.ones((1, 2)))


def loss_fn(adapters, variables, batch):
  """Mean cross-entropy of a batch, in nats."""
  logits = adapted.apply(variables, adapters, batch["x"])
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, batch["y"]
  ).mean()


def batches(steps, rows=64):
  """Points of two spirals, and the spiral of each."""
  for step in range(steps):
    keys = jax.random.split(jax.random.key(step))
    y = jax.random.bernoulli(keys[0], shape=(rows,)).astype(jnp.int32)
    turn = jax.random.uniform(keys[1], (rows,), maxval=6.0)
    angle = turn + jnp.pi * y
    x = jnp.stack([turn * jnp.cos(angle), turn * jnp.sin(angle)], -1)
    yield {"x": x, "y": y}
