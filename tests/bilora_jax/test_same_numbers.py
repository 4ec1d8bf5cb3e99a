"""One problem, trained in five ways that are to give the same numbers."""

from typing import Any, NamedTuple

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix

from bilora_jax import (
  LoraSpec,
  adapt,
  bilora,
  joined,
  nnx_lora_layout,
  qwix_layout,
)

R1, R2, STEPS, RATE, MOMENTUM, RHO = 2, 3, 20, 0.1, 0.9, 0.2
LAYERS = ("first", "second")
_RNG = np.random.default_rng(0)
X = jnp.asarray(_RNG.normal(size=(16, 5)), jnp.float32)
Y = jnp.asarray(_RNG.normal(size=(16, 3)), jnp.float32)
BASE = {
  name: {
    "kernel": jnp.asarray(_RNG.normal(size=shape) * 0.4, jnp.float32),
    "bias": jnp.asarray(_RNG.normal(size=shape[-1:]) * 0.4, jnp.float32),
  }
  for name, shape in zip(LAYERS, ((5, 6), (6, 3)))
}
# Twenty steps of float32 in other orders of summation, all numbers below 10.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class LinenMlp(nn.Module):
  """The model in Linen."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, name="second")(nn.tanh(nn.Dense(6, name="first")(x)))


class NnxMlp(nnx.Module):
  """The model in NNX, of some kind of linear layer."""

  def __init__(self, layer=nnx.Linear, **kwargs):
    rngs = nnx.Rngs(0)
    self.first = layer(5, 6, rngs=rngs, **kwargs)
    self.second = layer(6, 3, rngs=rngs, **kwargs)
    for name in LAYERS:
      for leaf, value in BASE[name].items():
        getattr(getattr(self, name), leaf)[...] = value

  def __call__(self, x):
    return self.second(jnp.tanh(self.first(x)))


def _loss(output):
  return jnp.mean((output - Y) ** 2)


def _sgd():
  return optax.sgd(RATE, momentum=MOMENTUM)


def _spec(scale, rank=R1, auxiliary_rank=R2):
  return LoraSpec(rank=rank, alpha=scale * rank, auxiliary_rank=auxiliary_rank)


class Run(NamedTuple):
  """Losses `(steps,)`, and factors `{part: {layer: (a, b)}}` at the end."""

  losses: np.ndarray
  factors: dict[str, Any]


def _start(scale):
  adapted = adapt(LinenMlp(), _spec(scale), X)
  adapters = adapted.init(jax.random.key(0), {"params": BASE})
  return {
    part: {name: (x["kernel"].a, x["kernel"].b) for name, x in tree.items()}
    for part, tree in adapters.items()
  }


def _with_adapt(adapted, variables, tx):
  adapters = adapted.init(jax.random.key(0), variables)

  @jax.jit
  def step(carry, _):
    adapters, state = carry
    loss, grads = jax.value_and_grad(
      lambda adapters: _loss(adapted.apply(variables, adapters, X))
    )(adapters)
    updates, state = tx.update(grads, state, adapters)
    return (optax.apply_updates(adapters, updates), state), loss

  (adapters, _), losses = jax.lax.scan(
    step, (adapters, tx.init(adapters)), length=STEPS
  )
  factors = {
    part: {name: (x["kernel"].a, x["kernel"].b) for name, x in tree.items()}
    for part, tree in adapters.items()
  }
  return Run(np.asarray(losses), factors)


def _by_hand(scale, rho):
  """Equations (8) to (10) with momentum, on plain arrays and dense weights."""

  def loss(factors):
    x = X
    for name in LAYERS:
      (a1, b1), (a2, b2) = (factors[k][name] for k in ("primary", "auxiliary"))
      kernel = BASE[name]["kernel"] + scale * (a1 @ b1) + scale * (a2 @ b2)
      x = x @ kernel + BASE[name]["bias"]
      x = jnp.tanh(x) if name == "first" else x
    return _loss(x)

  @jax.jit
  def step(factors, momentum):
    value, grads = jax.value_and_grad(loss)(factors)
    momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g, momentum, grads)
    down = jax.tree.map(
      lambda p, m: p - RATE * m, factors["primary"], momentum["primary"]
    )
    up = jax.tree.map(
      lambda p, m: p + RATE * m, factors["auxiliary"], momentum["auxiliary"]
    )
    norm = jnp.sqrt(
      sum(jnp.sum((scale * (a @ b)) ** 2) for a, b in up.values())
    )
    factor = jnp.where(norm > rho, jnp.sqrt(rho / norm), 1.0)
    up = jax.tree.map(lambda p: factor * p, up)
    return value, {"primary": down, "auxiliary": up}, momentum, norm

  factors = _start(scale)
  momentum = jax.tree.map(jnp.zeros_like, factors)
  losses, norms = [], []
  for _ in range(STEPS):
    value, factors, momentum, norm = step(factors, momentum)
    losses.append(value)
    norms.append(norm)
  # Otherwise the ball is not tested.
  assert norms[0] < rho < norms[-1]
  return Run(np.asarray(losses), factors)


def _owned_by_nnx(model, layout, names, scale):
  """One LoRA of rank r1 + r2 in a host's own loop."""
  start = _start(scale)
  for layer in LAYERS:
    pairs = [start[part][layer] for part in ("primary", "auxiliary")]
    for i, name in enumerate(names):
      axis = -1 if i == 0 else -2
      owner, leaf = getattr(model, layer), name
      if "." in name:
        inner, leaf = name.split(".")
        owner = getattr(owner, inner)
      getattr(owner, leaf)[...] = jnp.concatenate(
        [pair[i] for pair in pairs], axis
      )
  # Only the LoRA's own parameters are differentiated and optimised: `wrt` of
  # the optimizer and of the gradient are the same filter.
  wrt = nnx.LoRAParam
  tx = joined(bilora(_sgd(), RHO), layout, primary_rank=R1)
  optimizer = nnx.Optimizer(model, tx, wrt=wrt)

  @nnx.jit
  def step(model, optimizer):
    loss, grads = nnx.value_and_grad(
      lambda model: _loss(model(X)), argnums=nnx.DiffState(0, wrt)
    )(model)
    optimizer.update(model, grads)
    return loss

  losses = [step(model, optimizer) for _ in range(STEPS)]
  parts = layout.split(nnx.state(model, wrt), R1)
  factors = {
    part: {
      layer: next(
        (pair.a, pair.b)
        for path, pair in parts[part].items()
        if path.startswith(layer)
      )
      for layer in LAYERS
    }
    for part in ("primary", "auxiliary")
  }
  for name in LAYERS:
    kernel = getattr(model, name).kernel
    np.testing.assert_array_equal(kernel[...], BASE[name]["kernel"])
  return Run(np.asarray(losses), factors)


@pytest.fixture(scope="module", params=[1.0, 2.0])
def scale(request):
  return request.param


@pytest.fixture(scope="module")
def by_hand(scale):
  return _by_hand(scale, RHO)


def _assert_same(got, wanted):
  np.testing.assert_allclose(got.losses, wanted.losses, **CLOSE)
  assert set(got.factors) == set(wanted.factors) == {"primary", "auxiliary"}
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, **CLOSE),
    got.factors,
    wanted.factors,
  )


def test_training_by_hand_gets_somewhere(by_hand, scale):
  assert by_hand.losses[-1] < 0.8 * by_hand.losses[0]
  start = _start(scale)
  for part, tree in by_hand.factors.items():
    for name, pair in tree.items():
      for x, y in zip(pair, start[part][name]):
        # A thousand times the tolerance of the comparisons below.
        assert np.abs(x - y).max() > 1e-2


def test_adapt_of_linen_trains_as_by_hand(by_hand, scale):
  adapted = adapt(LinenMlp(), _spec(scale), X)
  run = _with_adapt(adapted, {"params": BASE}, bilora(_sgd(), RHO))
  _assert_same(run, by_hand)


def test_adapt_of_nnx_trains_as_by_hand(by_hand, scale):
  model = NnxMlp()
  adapted = adapt(model, _spec(scale), X)
  run = _with_adapt(adapted, nnx.state(model), bilora(_sgd(), RHO))
  _assert_same(run, by_hand)


def test_a_qwix_lora_in_an_nnx_optimizer_trains_as_by_hand(by_hand, scale):
  rank = R1 + R2
  model = qwix.apply_lora_to_model(
    NnxMlp(),
    # Of Qwix's alpha / rank at the joined rank.
    qwix.LoraProvider(module_path=".*", rank=rank, alpha=scale * rank),
    X,
    rngs=nnx.Rngs(0),
  )
  names = ("kernel_lora_a", "kernel_lora_b")
  _assert_same(_owned_by_nnx(model, qwix_layout(scale), names, scale), by_hand)


def test_an_nnx_lora_in_an_nnx_optimizer_trains_as_by_hand():
  # `nnx.LoRA` does not scale.
  model = NnxMlp(nnx.LoRALinear, lora_rank=R1 + R2)
  names = ("lora.lora_a", "lora.lora_b")
  run = _owned_by_nnx(model, nnx_lora_layout(), names, 1.0)
  _assert_same(run, _by_hand(1.0, RHO))


@pytest.mark.parametrize("make", [_sgd, lambda: optax.adam(0.05)])
def test_at_rho_0_the_primary_trains_as_plain_lora(make):
  # The same products of float32, next to columns of zeros.
  close = {"rtol": 1e-6, "atol": 1e-6}
  variables = {"params": BASE}
  ours = _with_adapt(
    adapt(LinenMlp(), _spec(2.0), X), variables, bilora(make(), rho=0.0)
  )
  plain = _with_adapt(
    adapt(LinenMlp(), _spec(2.0, auxiliary_rank=0), X), variables, make()
  )
  np.testing.assert_allclose(ours.losses, plain.losses, **close)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, **close),
    ours.factors["primary"],
    plain.factors["primary"],
  )
  assert plain.losses[-1] < 0.8 * plain.losses[0]
  assert set(plain.factors) == {"primary"}
