"""Measures the cost of the clip and of the second optimizer state.

  python -m benchmarks.clip_cost

AdamW trains the adapters of a stack of dense layers of one width, for several
numbers of layers. The benchmark times the whole step, and the update alone. It
also times the update of two LoRAs of r=8 without a ball. The cost of the clip
is the time of Bi-LoRA's update minus that of the two LoRAs. The cost of the
second state is the time of the two LoRAs' update minus that of one LoRA.

In the rows `apart`, each layer has its own arrays, as in an unrolled model. In
the rows `scanned`, the factors of all layers are stacked along a first axis, as
under `nn.scan`, so the clip computes the Gram matrices in one batch.
"""

import argparse
from collections.abc import Callable
import pathlib
import re
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks import rounds
import bilora_jax
from bilora_jax import Factors

_LAYERS = (10, 50, 100, 200, 500)
_SCALE = 2.0
_BASE, _R16, _TWO, _BILORA = (
  "LoRA r=8",
  "LoRA r=16",
  "two LoRAs r=8",
  "Bi-LoRA 8+8",
)
_RANKS = {
  _BASE: {"primary": 8},
  _R16: {"primary": 16},
  _TWO: {"primary": 8, "auxiliary": 8},
  _BILORA: {"primary": 8, "auxiliary": 8},
}
_STEPS = (_BASE, _R16, _BILORA)


class Variant(NamedTuple):
  """The adapters of a stack, and the transformation that trains them.

  Attributes:
    adapters: `{part: {layer: Factors}}`, or `{part: Factors}` if scanned.
    tx: the transformation.
  """

  adapters: Any
  tx: optax.GradientTransformationExtraArgs


def main() -> None:
  options = _options()
  stacks = [
    measure(options, layers, scanned)
    for layers in options.layers
    for scanned in (False, True)
  ]
  print(_table(stacks))
  device = jax.devices()[0]
  result = rounds.circumstances(
    "benchmarks.clip_cost",
    device=device.device_kind,
    width=options.width,
    tokens=options.tokens,
    rounds=options.rounds,
    updates_a_turn=options.updates,
    stacks=stacks,
  )
  name = f"clip_cost_{device.platform}.json"
  rounds.write(options.out or rounds.RESULTS / name, result)


def measure(
  options: argparse.Namespace, layers: int, scanned: bool
) -> dict[str, Any]:
  """Times updates and steps of a stack.

  Args:
    options: the options of the command line.
    layers: the number of layers in the stack.
    scanned: whether the layers are stacked along a first axis.
  """
  key = jax.random.key(0)
  shape = (layers, options.width, options.width)
  kernels = jax.random.normal(key, shape) * options.width**-0.5
  x = jax.random.normal(key, (options.tokens, options.width))
  if not scanned:
    kernels = list(kernels)
  updates, steps, launched = {}, {}, {}
  for name in _RANKS:
    chosen = variant(name, layers, options.width, scanned)
    updates[name], launched[name] = _update_turn(chosen, options.updates)
    if name in _STEPS:
      steps[name] = _step_turn(chosen, kernels, x, scanned)
  of_updates = {
    name: [seconds / options.updates for seconds in times]
    for name, times in rounds.interleaved(updates, options.rounds, 2).items()
  }
  of_steps = rounds.interleaved(steps, options.rounds, 2)

  def beyond(name, other):
    # The difference is taken within each round, like the ratios.
    return rounds.quartiles(
      [x - y for x, y in zip(of_updates[name], of_updates[other])]
    )

  clip = beyond(_BILORA, _TWO)
  return {
    "layers": layers,
    "factors": "scanned" if scanned else "apart",
    "updates": rounds.compared(of_updates, _BASE),
    "steps": rounds.compared(of_steps, _BASE),
    "clip_seconds_quartiles": clip,
    "second_state_seconds_quartiles": beyond(_TWO, _BASE),
    "rank_16_seconds_quartiles": beyond(_R16, _BASE),
    "clip_over_step": clip[1] / statistics.median(of_steps[_BILORA]),
    "kernels_of_update": launched,
  }


def variant(name: str, layers: int, width: int, scanned: bool) -> Variant:
  """Returns the adapters and the transformation of a method on a stack.

  No factor is zero, so that the clip acts.
  """

  def pair(key, rank, *batch):
    a_key, b_key = jax.random.split(key)
    a = jax.random.normal(a_key, (*batch, width, rank)) * width**-0.5
    return Factors(a, jax.random.normal(b_key, (*batch, rank, width)), _SCALE)

  def part(key, rank):
    if scanned:
      return pair(key, rank, layers)
    keys = jax.random.split(key, layers)
    return {str(i): pair(keys[i], rank) for i in range(layers)}

  keys = jax.random.split(jax.random.key(1))
  adapters = {
    name: part(key, rank)
    for key, (name, rank) in zip(keys, _RANKS[name].items())
  }
  tx = optax.with_extra_args_support(optax.adamw(5e-4, weight_decay=0.0))
  return Variant(adapters, bilora_jax.bilora(tx) if name == _BILORA else tx)


def output(
  adapters: Any, kernels: Any, x: jax.Array, scanned: bool
) -> jax.Array:
  """Returns the output, (tokens, width); each layer joins its adapters."""

  def layer(x, kernel, pairs):
    joined, *others = pairs.values()
    for other in others:
      joined = joined.join(other)
    return jax.nn.relu(x @ kernel + _SCALE * (x @ joined.a @ joined.b))

  if scanned:

    def body(x, sliced):
      return layer(x, *sliced), None

    return jax.lax.scan(body, x, (kernels, adapters))[0]
  for i, kernel in enumerate(kernels):
    x = layer(x, kernel, {p: tree[str(i)] for p, tree in adapters.items()})
  return x


def _update_turn(chosen: Variant, count: int) -> tuple[Callable[[], None], int]:
  """Returns a function that runs updates, and the kernels of one update."""

  def update(adapters, state, grads):
    updates, state = chosen.tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state

  # Any gradients will do, because Adam's steps do not depend on their size.
  grads = jax.tree.map(jnp.copy, chosen.adapters)
  carry = (
    jax.tree.map(jnp.copy, chosen.adapters),
    chosen.tx.init(chosen.adapters),
  )
  compiled = (
    jax.jit(update, donate_argnums=(0, 1)).lower(*carry, grads).compile()
  )

  def turn():
    nonlocal carry
    for _ in range(count):
      carry = compiled(*carry, grads)
    jax.block_until_ready(carry)

  return turn, _kernels(compiled.as_text() or "")


def _step_turn(
  chosen: Variant, kernels: Any, x: jax.Array, scanned: bool
) -> Callable[[], None]:
  def loss_fn(adapters, kernels, x):
    return jnp.mean(output(adapters, kernels, x, scanned) ** 2)

  def step(adapters, state, kernels, x):
    grads = jax.grad(loss_fn)(adapters, kernels, x)
    updates, state = chosen.tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state

  carry = (
    jax.tree.map(jnp.copy, chosen.adapters),
    chosen.tx.init(chosen.adapters),
  )
  compiled = (
    jax.jit(step, donate_argnums=(0, 1)).lower(*carry, kernels, x).compile()
  )

  def turn():
    nonlocal carry
    carry = jax.block_until_ready(compiled(*carry, kernels, x))

  return turn


def _kernels(text: str) -> int:
  """Returns about how many kernels a compiled program launches."""
  entry = text[text.index("\nENTRY ") :]
  kinds = "fusion|dot|custom-call|reduce|copy|call|while|concatenate"
  return len(re.findall(rf" (?:{kinds})\(", entry))


def _options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--layers", type=int, nargs="+", default=_LAYERS)
  parser.add_argument("--width", type=int, default=384)
  parser.add_argument("--tokens", type=int, default=1024, help="in a step")
  parser.add_argument("--rounds", type=int, default=20)
  parser.add_argument(
    "--updates", type=int, default=5, help="of a method in a round"
  )
  parser.add_argument("--out", type=pathlib.Path)
  return parser.parse_args()


def _table(stacks: list[dict[str, Any]]) -> str:
  head = [
    "layers",
    "factors",
    "Bi-LoRA step (ms)",
    "over LoRA r=8 (quartiles)",
    "update, LoRA r=8 (ms)",
    "r=16 (ms)",
    "second state (ms)",
    "clip (ms)",
    "clip / step",
    "kernels of the update: LoRA r=8, two, Bi-LoRA",
  ]
  lines = []
  for stack in stacks:
    step = next(x for x in stack["steps"] if x["name"] == _BILORA)
    update = next(x for x in stack["updates"] if x["name"] == _BASE)
    lines.append(
      [
        str(stack["layers"]),
        stack["factors"],
        f"{1e3 * step['median_seconds']:.1f}",
        rounds.ratio(step),
        f"{1e3 * update['median_seconds']:.2f}",
        *(
          f"{1e3 * stack[f'{part}_seconds_quartiles'][1]:+.2f}"
          for part in ("rank_16", "second_state", "clip")
        ),
        f"{stack['clip_over_step']:.1%}",
        ", ".join(
          str(stack["kernels_of_update"][name])
          for name in (_BASE, _TWO, _BILORA)
        ),
      ]
    )
  return rounds.table(head, lines)


if __name__ == "__main__":
  main()
