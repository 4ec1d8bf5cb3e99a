"""Where baselines take the gradient, against the equations of their papers."""

import jax
import jax.numpy as jnp
import low_rank
import numpy as np
import pytest

from bilora_jax import Factors, baselines

RHO = 0.3
RATE = 0.1
STEPS = 12
# Threefry, the default, takes a second to compile.
KEY = jax.random.key(7, impl="unsafe_rbg")
# What is perturbed, for us and for the equations.
MASKS = {
  "pair": ({"bias": False, "layer": True}, {"a": True, "b": True, "c": False}),
  "all": (True, {"a": True, "b": True, "c": True}),
  "a": (
    {"bias": False, "layer": Factors(True, False, low_rank.SCALE)},
    {"a": True, "b": False, "c": False},
  ),
  "b, by a function": (
    lambda tree: jax.tree.map(lambda x: x.shape == (2, 3), tree),
    {"a": False, "b": True, "c": False},
  ),
}


def _take(args, index):
  return tuple(x[index] for x in args)


ESTIMATORS = {
  "gradient": lambda mask: baselines.gradient(),
  "sam": lambda mask: baselines.sam(RHO, mask),
  "asam": lambda mask: baselines.sam(RHO, mask, adaptive=True),
  "looksam": lambda mask: baselines.looksam(RHO, 3, 0.4, mask),
  "esam": lambda mask: baselines.esam(
    RHO,
    low_rank.losses,
    _take,
    weight_fraction=0.7,
    sample_fraction=0.4,
    mask=mask,
  ),
  "s2sam": lambda mask: baselines.s2sam(RHO, mask),
  "eflat_lora": lambda mask: baselines.eflat_lora(RHO, 0.4, mask),
  "wsam": lambda mask: baselines.wsam(RHO, 0.8, mask),
  "weight_noise": lambda mask: baselines.weight_noise(RHO, mask),
  "flat_lora": lambda mask: baselines.flat_lora(
    RHO, 8, lambda tree: tree["layer"], mask
  ),
}


# The equations, in float64: (w, x, y, where, key, t, memory) to the value, the
# gradient that is stepped along, and what is remembered.


def _norm(tree):
  return np.sqrt(sum(np.sum(x**2) for x in tree.values()))


def _only(tree, where):
  return {name: where[name] * x for name, x in tree.items()}


def _added(w, e, scale=1.0):
  return {name: w[name] + scale * e[name] for name in w}


def _sam_ascent(g, where):
  g = _only(g, where)
  return {name: RHO * x / _norm(g) for name, x in g.items()}


def _drawn(draw, key, w, where):
  keys = iter(jax.random.split(key, sum(where.values())))
  return {
    name: np.float64(draw(next(keys), w[name].shape)) if where[name] else 0.0
    for name in w
  }


def _normal(key, shape):
  return jax.random.normal(key, shape, jnp.float32)


def _gradient(w, x, y, where, key, t, memory):
  return low_rank.rows(w, x, y).mean(), low_rank.gradient(w, x, y), memory


def _sam(w, x, y, where, key, t, memory):
  value, g, _ = _gradient(w, x, y, where, key, t, memory)
  worst = _added(w, _sam_ascent(g, where))
  return value, low_rank.gradient(worst, x, y), memory


def _asam(w, x, y, where, key, t, memory):
  value, g, _ = _gradient(w, x, y, where, key, t, memory)
  g = _only(g, where)
  length = _norm({name: np.abs(w[name]) * g[name] for name in g})
  e = {name: RHO * w[name] ** 2 * g[name] / length for name in g}
  return value, low_rank.gradient(_added(w, e), x, y), memory


def _looksam(w, x, y, where, key, t, memory):
  value, g, _ = _gradient(w, x, y, where, key, t, memory)
  own = _only(g, where)
  if t % 3 == 0:
    sharp = low_rank.gradient(_added(w, _sam_ascent(g, where)), x, y)
    part = _only(sharp, where)
    dot = sum(np.sum(part[name] * own[name]) for name in own)
    memory = _added(part, own, -dot / _norm(own) ** 2)
    return value, sharp, memory
  return value, _added(g, memory, 0.4 * _norm(own) / _norm(memory)), memory


def _esam(w, x, y, where, key, t, memory):
  value, g, _ = _gradient(w, x, y, where, key, t, memory)
  draw = lambda k, shape: jax.random.bernoulli(k, 0.7, shape)  # noqa: E731
  kept = _drawn(draw, key, w, where)
  e = _sam_ascent(g, where)
  worst = _added(w, {name: kept[name] * e[name] / 0.7 for name in e})
  rise = low_rank.rows(worst, x, y) - low_rank.rows(w, x, y)
  chosen = np.argsort(rise)[-4:]  # 0.4 of 8 samples are 3.2
  return value, low_rank.gradient(worst, x[chosen], y[chosen]), memory


def _s2sam(w, x, y, where, key, t, memory):
  near = w if memory is None else _added(w, _sam_ascent(memory, where))
  value, g, _ = _gradient(near, x, y, where, key, t, memory)
  return value, g, g


def _eflat_lora(w, x, y, where, key, t, memory):
  # In the paper's letters, whose weights are (out, in), with dense matrices.
  s = low_rank.SCALE
  near = w if memory is None else {**w, "b": w["b"] + memory.T}
  value, g, _ = _gradient(near, x, y, where, key, t, memory)
  a, b = near["a"].T, near["b"].T
  of_w = 0.5 / s * (g["b"].T @ np.linalg.pinv(a.T))
  of_w += 0.5 / s * (np.linalg.pinv(b.T) @ g["a"].T)
  e = RHO / s * of_w / np.linalg.norm(of_w) @ np.linalg.pinv(a)
  return value, g, e if memory is None else 0.6 * memory + 0.4 * e


def _wsam(w, x, y, where, key, t, memory):
  value, sharp, _ = _sam(w, x, y, where, key, t, memory)
  g = low_rank.gradient(w, x, y)
  c = 0.8
  both = {
    name: (1 - 2 * c) / (1 - c) * g[name] + c / (1 - c) * sharp[name]
    for name in g
  }
  return value, both, memory


def _weight_noise(w, x, y, where, key, t, memory):
  near = _added(w, _drawn(_normal, key, w, where), RHO)
  return _gradient(near, x, y, where, key, t, memory)


def _flat_lora(w, x, y, where, key, t, memory):
  f = (1 - np.cos(np.pi * min(t / 8, 1))) / 2
  e = _drawn(_normal, key, w, where)
  for name, kernel in w.items():
    for j in range(kernel.shape[-1]):
      if where[name]:
        size = np.linalg.norm(kernel[:, j]) / np.sqrt(kernel.shape[0])
        e[name][:, j] *= f * RHO * size
  return _gradient(_added(w, e), x, y, where, key, t, memory)


EQUATIONS = {name: globals()[f"_{name}"] for name in ESTIMATORS}


@pytest.mark.parametrize(
  ("name", "mask"),
  [
    *[(name, "pair") for name in ESTIMATORS],
    *[("sam", mask) for mask in MASKS if mask != "pair"],
    ("s2sam", "b, by a function"),
  ],
)
def test_training_is_as_the_equations_say(name, mask):
  mask, where = MASKS[mask]
  estimator = ESTIMATORS[name](mask)
  x, y = low_rank.data()
  w, memory = low_rank.weights(), None
  params = low_rank.params(w)
  keys = jax.random.split(KEY, STEPS)

  def step(carry, key):
    params, state = carry
    (value, grads), state = estimator.estimate(
      jax.value_and_grad(low_rank.loss),
      state,
      key,
      params,
      jnp.float32(x),
      jnp.float32(y),
    )
    params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
    return (params, state), (value, params)

  carry = (params, estimator.init(params))
  _, (values, trained) = jax.jit(lambda c, k: jax.lax.scan(step, c, k))(
    carry, keys
  )

  # Errors of float32 grow from step to step; all are of size 1.
  for t in range(STEPS):
    value, g, memory = EQUATIONS[name](w, x, y, where, keys[t], t, memory)
    w = _added(w, g, -RATE)
    assert float(values[t]) == pytest.approx(value, rel=1e-4)
    for part, got in low_rank.named(trained).items():
      np.testing.assert_allclose(got[t], w[part], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_half_precision_auxiliary_output_and_zero_gradients(name):
  mask, where = MASKS["pair"]
  estimator = ESTIMATORS[name](mask)
  keys = jax.random.split(KEY)

  def loss(params, x, y):
    rows = low_rank.losses(params, x, y)
    return jnp.mean(rows), {"count": rows.size}

  # Not compiled as a whole: the methods share their operations.
  def two_steps(params, x, y):
    out, state = None, estimator.init(params)
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    for key in keys:
      out, state = estimator.estimate(value_and_grad, state, key, params, x, y)
    return out

  # Halves of integers are what they are in either precision.
  w = {part: np.round(2 * v) / 2 for part, v in low_rank.weights().items()}
  params = low_rank.params(w, jnp.bfloat16)
  x, y = low_rank.data()
  (value, aux), grads = two_steps(params, jnp.float32(x), jnp.float32(y))
  memory = None
  for t, key in enumerate(keys):
    expected, g, memory = EQUATIONS[name](w, x, y, where, key, t, memory)
  assert float(value) == pytest.approx(expected, rel=0.02)
  assert int(aux["count"]) == (4 if name == "esam" else low_rank.ROWS)
  size = max(abs(part).max() for part in g.values())
  for part, got in low_rank.named(grads).items():
    assert got.dtype == jnp.bfloat16
    # The perturbed parameters have eight bits.
    np.testing.assert_allclose(np.float64(got), g[part], atol=0.03 * size)

  _, grads = two_steps(jax.tree.map(jnp.zeros_like, params), x, 0 * y)
  for got in jax.tree.leaves(grads):
    assert jnp.isfinite(got).all()


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n != "gradient"])
def test_what_no_mask_selects_leaves_the_plain_gradient(name):
  params = jnp.arange(1.0, 4.0)
  estimator = (
    baselines.esam(RHO, lambda w: w**2, lambda args, _: args, mask=False)
    if name == "esam"
    else baselines.flat_lora(RHO, 8, lambda w: [], False)
    if name == "flat_lora"
    else ESTIMATORS[name](False)
  )
  value_and_grad = jax.value_and_grad(lambda w: jnp.mean(w**2))
  state = estimator.init(params)
  for _ in range(2):
    (value, grad), state = estimator.estimate(
      value_and_grad, state, KEY, params
    )
    assert float(value) == pytest.approx(14 / 3)
    np.testing.assert_allclose(grad, 2 * params / 3, rtol=1e-6)


def test_gradients_of_half_precision_do_not_underflow():
  w = jnp.full(4, 1e-4, jnp.float16)
  value_and_grad = jax.value_and_grad(
    lambda w: jnp.sum(w.astype(jnp.float32) ** 2)
  )
  (_, grad), _ = baselines.sam(2.0).estimate(value_and_grad, (), KEY, w)
  # 2e-4 squared is less than the least float16; each moves by rho / 2.
  np.testing.assert_allclose(grad.astype(jnp.float32), 2.0, rtol=1e-2)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    *[
      (make, r"finite and at least 0; got -1")
      for make in (
        lambda: baselines.sam(-1),
        lambda: baselines.looksam(-1),
        lambda: baselines.looksam(0.1, alpha=-1),
        lambda: baselines.esam(-1, low_rank.losses, _take),
        lambda: baselines.s2sam(-1),
        lambda: baselines.eflat_lora(-1),
        lambda: baselines.wsam(-1, 0.5),
        lambda: baselines.weight_noise(-1),
        lambda: baselines.output_noise(jnp.sum, -1),
        lambda: baselines.flat_lora(-1, 1, jnp.abs, True),
      )
    ],
    (lambda: baselines.sam(float("nan")), r"finite and at least 0; got nan"),
    (lambda: baselines.sam(float("inf")), r"finite and at least 0; got inf"),
    (lambda: baselines.looksam(0.1, 0), r"every, .* at least 1; got 0"),
    (lambda: baselines.flat_lora(0.1, 0, jnp.abs, True), r"steps, .*; got 0"),
    (lambda: baselines.eflat_lora(0.1, 1.5), r"beta is above 0.* got 1.5"),
    (lambda: baselines.eflat_lora(0.1, 0), r"beta is above 0.* got 0"),
    (
      lambda: baselines.eflat_lora(0.1).init(jnp.ones(3)),
      "the mask must select both factors; it selects none",
    ),
    (lambda: baselines.wsam(0.1, 1.0), r"at least 0 and below 1; got 1.0"),
    (
      lambda: baselines.esam(0.1, low_rank.losses, _take, weight_fraction=0.0),
      r"weight_fraction is above 0 and at most 1; got 0.0",
    ),
    (
      lambda: baselines.esam(0.1, low_rank.losses, _take, sample_fraction=1.5),
      r"sample_fraction is above 0 and at most 1; got 1.5",
    ),
  ],
)
def test_arguments_that_cannot_be_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize("name", ["sam", "s2sam", "eflat_lora", "weight_noise"])
def test_a_schedule_is_refused_and_its_value_taken_in_the_step(name):
  make = getattr(baselines, name)
  with pytest.raises(ValueError, match=r", .* is a number; got the function"):
    make(lambda step: 0.1)
  data = tuple(jnp.float32(part) for part in low_rank.data())
  params = low_rank.params(low_rank.weights())
  value_and_grad = jax.value_and_grad(low_rank.loss)

  @jax.jit
  def two_steps(rho):
    estimator = make(rho)
    state = estimator.init(params)
    for _ in range(2):
      out, state = estimator.estimate(value_and_grad, state, KEY, params, *data)
    return out

  # The perturbation of the second step is what rho is there.
  near, far = two_steps(0.0), two_steps(0.5)
  estimator = make(0.5)
  state = estimator.init(params)
  for _ in range(2):
    wanted, state = estimator.estimate(
      value_and_grad, state, KEY, params, *data
    )
  for x, y in zip(jax.tree.leaves(far), jax.tree.leaves(wanted)):
    np.testing.assert_allclose(x, y, rtol=1e-5)
  assert not np.allclose(near[1]["bias"], far[1]["bias"], rtol=1e-3)


def test_losses_that_are_not_one_for_each_sample_are_refused():
  estimator = baselines.esam(0.1, low_rank.loss, _take)
  params = low_rank.params(low_rank.weights())
  with pytest.raises(ValueError, match=r"\(B,\); got the shape \(\)"):
    estimator.estimate(
      jax.value_and_grad(low_rank.loss), (), KEY, params, *low_rank.data()
    )
