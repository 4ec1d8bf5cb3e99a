"""Seven kinds of adapters in one ball, against their equations in float64."""

import dataclasses
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import reference
import transcription

from bilora_jax import LoraSpec, adapt, adapters, bilora

STEPS, RHO, RATE = 50, 0.3, 0.01
SIZE_IN, SIZE_OUT, ROWS, LENGTH = 6, 4, 12, 3
# 1 - 0.999 in float32 is off by 1e-5.
OURS = optax.adam(RATE, b2=0.99)
TEXTBOOK = reference.adamw(RATE, beta2=0.99)
KINDS = {
  "loha/.*": adapters.loha(rank=2, alpha=2.0),
  "lokr/.*": adapters.lokr(rank=2, alpha=3.0, blocks=3),
  "vera/.*": adapters.vera(rank=5),
  "ia3/.*": adapters.ia3(),
}


class Layers(nn.Module):
  """A layer to each kind, side by side."""

  @nn.compact
  def __call__(self, x):
    out = {
      name: nn.Dense(SIZE_OUT, use_bias=False, name=name)(x[name])
      for name in transcription.KERNELS
    }
    out["prompt"] = adapters.linen.SoftPrompt(LENGTH, name="prompt")(
      x["prompt"]
    )
    out["bottleneck"] = adapters.linen.Bottleneck(
      2, activation=jnp.tanh, name="bottleneck"
    )(x["bottleneck"])
    return out


class Run(NamedTuple):
  """What the library trained, and what the equations give."""

  history: Any
  states: Any
  primary: dict[str, transcription.Params]
  auxiliary: dict[str, transcription.Params]
  norms: list[float]
  problem: transcription.Problem
  start: Any


def _fields(node):
  return {
    field.name: np.float64(getattr(node, field.name))
    for field in dataclasses.fields(node)
    if not field.metadata.get("static")
  }


def _by_name(part):
  """Nodes by their layers' names: `kernels` and `modules` in one dict."""
  modules = {k: next(iter(v.values())) for k, v in part["modules"].items()}
  return {k: v["kernel"] for k, v in part["kernels"].items()} | modules


@pytest.fixture(scope="module")
def run():
  rng = np.random.default_rng(0)
  names = list(transcription.DEGREES)

  def normal(*shape):
    return np.float32(rng.normal(size=shape))

  x = {name: normal(ROWS, SIZE_IN) for name in names}
  y = {name: normal(ROWS, SIZE_OUT) for name in transcription.KERNELS}
  y |= {name: normal(ROWS, SIZE_IN) for name in ("prompt", "bottleneck")}
  mix = normal(ROWS, LENGTH + ROWS) / np.float32(4)
  model = Layers()
  variables = jax.jit(model.init)(jax.random.key(0), x)
  spec = LoraSpec(rank=2, alpha=3.0, auxiliary_rank=2)
  adapted = adapt(model, spec, x)
  new = adapters.init(jax.random.key(1), adapted, variables, KINDS)
  modules = variables["adapters"]
  start = {
    "primary": {"kernels": new["primary"], "modules": modules},
    "auxiliary": {
      "kernels": new["auxiliary"],
      "modules": optax.tree.zeros_like(modules),
    },
  }

  def loss(parts):
    both = optax.tree.add(
      parts["primary"]["modules"], parts["auxiliary"]["modules"]
    )
    kernels = {part: tree["kernels"] for part, tree in parts.items()}
    out = adapted.apply({**variables, "adapters": both}, kernels, x)
    out["prompt"] = mix @ out["prompt"]
    return sum(jnp.sum((out[k] - y[k]) ** 2) / (2 * ROWS) for k in names)

  tx = bilora(OURS, RHO)

  @jax.jit
  def train(parts):
    def body(carry, _):
      parts, state = carry
      updates, state = tx.update(jax.grad(loss)(parts), state, parts)
      carry = optax.apply_updates(parts, updates), state
      return carry, carry

    return jax.lax.scan(body, (parts, tx.init(parts)), length=STEPS)[1]

  history, states = jax.device_get(train(start))
  first = {part: _by_name(tree) for part, tree in start.items()}
  problem = transcription.Problem(
    {k: np.float64(v) for k, v in x.items()},
    {k: np.float64(v) for k, v in y.items()},
    {
      k: np.float64(variables["params"][k]["kernel"])
      for k in transcription.KERNELS
    },
    {k: getattr(first["primary"][k], "scale", 1.0) for k in names},
    np.float64(mix),
  )
  primary, auxiliary, norms = transcription.train(
    problem,
    {k: _fields(node) for k, node in first["primary"].items()},
    {k: _fields(node) for k, node in first["auxiliary"].items()},
    STEPS,
    TEXTBOOK,
    RHO,
  )
  return Run(history, states, primary, auxiliary, norms, problem, first)


@pytest.mark.parametrize("name", transcription.DEGREES)
def test_fifty_steps_of_each_kind_are_its_equations(run, name):
  final = problems.at(run.history, -1)
  for part, expected in ("primary", run.primary), ("auxiliary", run.auxiliary):
    node = _by_name(final[part])[name]
    assert type(node).degree == transcription.DEGREES[name]
    for field, value in _fields(node).items():
      # Float32 against float64 after fifty steps of Adam.
      error = problems.relative_error(value, expected[name][field])
      assert error <= 3e-5, (part, field)
      held = field in getattr(node, "held", ())
      before = getattr(run.start[part][name], field)
      assert np.array_equal(value, before) == held


def test_the_norm_over_all_kinds_is_the_dense_one_and_the_ball_is_met(run):
  recorded = optax.tree.get(run.states, "auxiliary_norm")
  np.testing.assert_allclose(recorded, run.norms, rtol=3e-5)
  assert run.norms[0] < RHO < min(run.norms[20:])
  for step in (20, -1):
    nodes = _by_name(problems.at(run.history, step)["auxiliary"])
    sizes = [
      np.linalg.norm(
        transcription.perturbation(name, _fields(node), run.problem)
      )
      for name, node in nodes.items()
    ]
    # None of the seven is alone in it.
    assert min(sizes) > 1e-3
    assert np.linalg.norm(sizes) == pytest.approx(RHO, rel=1e-6)


def test_what_is_held_has_no_state(run):
  adam = optax.tree.get_all_with_path(run.states, "mu")
  assert len(adam) == 2  # of the primary and of the auxiliary
  for part, (_, mu) in zip(("auxiliary", "primary"), adam):
    nodes = _by_name(mu[part])
    assert not jax.tree.leaves((nodes["vera"].a, nodes["vera"].b))
    assert not jax.tree.leaves(nodes["ia3"].norms)
    assert len(jax.tree.leaves(nodes["vera"])) == 2
