"""Bi-LoRA under `jax.shard_map`: rows and adapters are split over the devices.

Fully sharded by hand: each device holds a part of every adapter and of the
optimizer's state, gathers the adapters for its rows, and gets back its part of
their gradient. `jax.jit` with shardings does all of that by itself; this is for
code that has to say where what is.

    python examples/shard_map.py
"""

import functools

from flax import linen as nn
import jax
from jax.sharding import PartitionSpec as P
from model import adapted, batches, loss_fn, variables
import optax

from bilora_jax import bilora

mesh = jax.make_mesh(
  (jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,)
)

# `in` of a kernel and `out` of the next: what its adapters are split along.
names = {"first": (None, "fsdp"), "second": ("fsdp", "fsdp"), "head": ("fsdp",)}
boxed = {
  "params": {
    layer: {**x, "kernel": nn.Partitioned(x["kernel"], (*names[layer], None))}
    for layer, x in variables["params"].items()
  }
}
adapters = adapted.init(jax.random.key(1), variables)
specs = adapted.partition_specs(boxed, adapters)

# The clip has to know, since it sees only shards of the factors.
tx = bilora(optax.adam(3e-3), rho=0.05, specs=specs)
opt_state = tx.init(adapters)


def state_specs():
  """Moments are split as what they belong to, whose path theirs end with."""
  known = dict(jax.tree_util.tree_leaves_with_path(specs))

  def of(path, _):
    ends = (path[start:] for start in range(len(path)))
    return next((known[end] for end in ends if end in known), P())

  return jax.tree_util.tree_map_with_path(of, opt_state)


def gather(x, spec):
  """The whole of an array, from its shards; its gradient is scattered back."""
  for axis, name in enumerate(spec):
    if name is not None:
      x = jax.lax.all_gather(x, name, axis=axis, tiled=True)

  return x


@jax.jit
@functools.partial(
  jax.shard_map,
  mesh=mesh,
  in_specs=(P(), specs, state_specs(), P("fsdp")),
  out_specs=(specs, state_specs(), P()),
)
def train_step(variables, adapters, opt_state, batch):
  def local_loss(adapters):
    whole = jax.tree.map(gather, adapters, specs)
    return loss_fn(whole, variables, batch) / jax.lax.axis_size("fsdp")

  loss, grads = jax.value_and_grad(local_loss)(adapters)
  updates, opt_state = tx.update(grads, opt_state, adapters)
  adapters = optax.apply_updates(adapters, updates)
  return adapters, opt_state, jax.lax.psum(loss, "fsdp")


def train(steps=20):
  """The losses, and the adapters after the last step."""
  state, losses = (adapters, opt_state), []
  for batch in batches(steps):
    *state, loss = train_step(variables, *state, batch)
    losses.append(float(loss))
  return losses, state[0]


if __name__ == "__main__":
  losses, _ = train(200)
  print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
