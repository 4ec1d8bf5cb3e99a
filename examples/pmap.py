"""Bi-LoRA under `jax.pmap`: each device has some rows, and all of the adapters.

python examples/pmap.py
"""

import functools

import jax
import jax.numpy as jnp
from model import adapted, batches, loss_fn, variables
import optax

from bilora_jax import bilora

tx = bilora(optax.adam(3e-3), rho=0.05)


@functools.partial(jax.pmap, axis_name="data", in_axes=(None, 0, 0, 0))
def train_step(variables, adapters, opt_state, batch):
  loss, grads = jax.value_and_grad(loss_fn)(adapters, variables, batch)
  loss, grads = jax.lax.pmean((loss, grads), "data")
  # Of equal gradients every device makes the same step, and the same clip.
  updates, opt_state = tx.update(grads, opt_state, adapters)
  return optax.apply_updates(adapters, updates), opt_state, loss


def train(steps=20):
  """The losses, and the adapters after the last step."""
  count = jax.local_device_count()
  adapters = adapted.init(jax.random.key(1), variables)
  state = jax.tree.map(
    lambda x: jnp.stack([x] * count), (adapters, tx.init(adapters))
  )
  losses = []
  for batch in batches(steps):
    batch = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
    *state, loss = train_step(variables, *state, batch)
    losses.append(float(loss[0]))
  return losses, jax.tree.map(lambda x: x[0], state[0])


if __name__ == "__main__":
  losses, _ = train(200)
  print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
