"""Measures the cost of `adapt` for models with different numbers of layers.

  python -m benchmarks.adapt_cost

Traces the `init` of a stack of dense layers by `jax.eval_shape`, then adapts
the stack. Prints the CPU time of both, in seconds.
"""

import time

from flax import linen as nn
import jax
import jax.numpy as jnp

from bilora_jax import LoraSpec, adapt

_LAYERS = (50, 100, 200, 400)


class Stack(nn.Module):
  """Layers that are not scanned.

  Attributes:
    layers: the number of layers.
  """

  layers: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.layers):
      x = jnp.tanh(nn.Dense(8, name=f"layer_{i}")(x))
    return x


def measure(layers: int) -> tuple[float, float]:
  """Returns the CPU seconds of `eval_shape(init)` and of `adapt`."""
  model, x = Stack(layers), jax.ShapeDtypeStruct((2, 8), jnp.float32)
  start = time.process_time()
  jax.eval_shape(model.init, jax.random.key(0), x)
  traced = time.process_time()
  adapt(model, LoraSpec(rank=2, auxiliary_rank=2), x)
  return traced - start, time.process_time() - traced


def main() -> None:
  measure(2)  # the first calls of JAX and Qwix take longer
  for layers in _LAYERS:
    init, adapted = measure(layers)
    print(
      f"{layers} layers: init {init:.2f} s, adapt {adapted:.2f} s, "
      f"{adapted / init:.2f} times"
    )


if __name__ == "__main__":
  main()
