"""Auxiliaries of which `b` alone is trained: orthonormal `a`, and a shared."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import reference

from bilora_jax import Factors, bilora
from bilora_jax.variants import (
  OrthonormalA,
  orthonormal_a,
  redraw_a,
  share_a,
  shared_a,
  with_shared_a,
)

STEPS, RHO, EVERY = 50, 0.2, 20
OURS = optax.adam(0.01, b2=0.99)
TEXTBOOK = reference.adamw(0.01, beta2=0.99)
# Ranks up to the inputs, and one for both parts.
SHAPES = {
  "x": problems.Shape((), 8, 5, 3, 3, 2.0, 0.5),
  "y": problems.Shape((2,), 4, 6, 2, 2, 1.0, 3.0),
}
# Float32 against float64 after fifty steps.
FLOAT32_RUN = 3e-5


def by_hand(layers, modules, after):
  """Equations (9), without B2's or A2's own, and what follows by `after`."""
  modules = {name: list(values) for name, values in modules.items()}
  memories = {n: [TEXTBOOK.init(x) for x in modules[n]] for n in modules}
  norms = []
  for t in range(1, STEPS + 1):
    grads = reference.gradients(layers, modules)
    for name in modules:
      if name == "A2":
        continue
      sign = -1 if name == "B2" else 1
      for j, value in enumerate(modules[name]):
        step, memories[name][j] = TEXTBOOK.update(
          sign * grads[name][j], value, memories[name][j], t
        )
        modules[name][j] = value + step
    norms.append(after(modules, t))
  return modules, norms


def clip(layers, modules):
  """B2 alone, to the nearest point of the ball."""
  c = np.linalg.norm(reference.norms(layers, modules))
  if c > RHO:
    modules["B2"] = [RHO / c * b for b in modules["B2"]]
  return c


def test_fifty_steps_in_an_orthonormal_span_are_their_equations():
  adapters, data = problems.make(SHAPES)
  adapters = jax.jit(orthonormal_a)(jax.random.key(0), adapters)
  for node in adapters["auxiliary"].values():
    # Columns are orthonormal, to float32.
    gram = np.float64(node.a).mT @ np.float64(node.a)
    np.testing.assert_allclose(
      gram, np.broadcast_to(np.eye(node.rank), gram.shape), atol=1e-6
    )
    assert not np.any(node.b)
  tx = redraw_a(bilora(OURS, RHO), every=EVERY)
  history, states = problems.train(tx, adapters, data, STEPS)
  spans = [problems.at(history, i)["auxiliary"] for i in range(STEPS)]

  layers, modules = problems.to_reference(adapters, data)

  def after(modules, t):
    c = clip(layers, modules)
    if t % EVERY == 0:
      like = {**adapters, "auxiliary": spans[t - 1]}
      new = problems.to_reference(like, data)[1]["A2"]
      modules["B2"] = [
        b @ old @ a.T for b, old, a in zip(modules["B2"], modules["A2"], new)
      ]
      modules["A2"] = new
    return c

  modules, norms = by_hand(layers, modules, after)
  expected = problems.from_reference(modules, adapters)
  actual = problems.at(history, -1)
  assert problems.relative_error(actual, expected) <= FLOAT32_RUN
  np.testing.assert_allclose(
    optax.tree.get(states, "auxiliary_norm"), norms, rtol=FLOAT32_RUN
  )
  assert max(norms) > RHO


def test_an_orthonormal_a_is_redrawn_and_else_stays():
  adapters, data = problems.make(SHAPES)
  adapters = orthonormal_a(jax.random.key(0), adapters)
  tx = redraw_a(bilora(optax.adamw(0.05, weight_decay=0.5), RHO), every=5)
  history, states = problems.train(tx, adapters, data, 12)
  before = adapters["auxiliary"]
  for step in range(12):
    now = problems.at(history, step)["auxiliary"]
    for name, node in now.items():
      stays = np.array_equal(node.a, before[name].a)
      assert stays == (step not in (4, 9)), (name, step)
      dense = problems.dense_norm(node)
      assert float(jnp.linalg.norm(node.frobenius_norm())) == pytest.approx(
        dense, rel=1e-6
      )
      assert float(jnp.sum(node.squared_norm())) == pytest.approx(
        dense**2, rel=2e-6
      )
    assert problems.dense_norm(now) <= RHO * (1 + 1e-6)
    if step in (4, 9):
      kept = problems.dense_norm(now)
      assert 0 < kept < problems.dense_norm(before)
    before = now
  # Of the auxiliary, Adam remembers `b` alone.
  moments = optax.tree.get_all_with_path(states, "mu")
  sizes = sorted(
    sum(x[0].size for x in jax.tree.leaves(mu)) for _, mu in moments
  )
  of_b = sum(node.b.size for node in adapters["auxiliary"].values())
  of_all = sum(x.size for x in jax.tree.leaves(adapters["auxiliary"]))
  assert sizes[0] == of_b < of_all


def test_the_projection_is_the_nearest_point():
  # Of the ball, in the weights that the span of `a` has; by many others.
  adapters, _ = problems.make(SHAPES, fresh=False)
  adapters = orthonormal_a(jax.random.key(0), adapters)
  rng = np.random.default_rng(0)
  tx = bilora(optax.sgd(1.0), RHO)
  grads = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), adapters)
  updates, _ = tx.update(grads, tx.init(adapters), adapters)
  new = optax.apply_updates(adapters, updates)["auxiliary"]

  def distance(tree):
    # To where plain ascent ends.
    return np.sqrt(
      sum(
        np.sum(
          (
            problems.dense(pair)
            - problems.dense(
              Factors(pair.a, grads["auxiliary"][k].b, pair.scale)
            )
          )
          ** 2
        )
        for k, pair in tree.items()
      )
    )

  least = distance(new)
  for _ in range(100):
    other = {
      k: Factors(
        p.a, p.b + np.float32(0.02 * rng.normal(size=p.b.shape)), p.scale
      )
      for k, p in new.items()
    }
    size = problems.dense_norm(other)
    share = np.float32(min(1, RHO / size))
    other = {k: Factors(p.a, share * p.b, p.scale) for k, p in other.items()}
    assert distance(other) >= least * (1 - 1e-6)


def test_fifty_steps_with_the_primarys_a_are_their_equations():
  adapters, data = problems.make(SHAPES, fresh=False)
  adapters = share_a(adapters)
  assert not any(np.any(b) for b in adapters["auxiliary"].values())
  assert {k: b.shape for k, b in adapters["auxiliary"].items()} == {
    k: pair.b.shape for k, pair in adapters["primary"].items()
  }
  tx = shared_a(OURS, RHO)

  @jax.jit
  def run(adapters):
    def body(carry, _):
      adapters, state = carry
      grads = jax.grad(lambda x: problems.loss(with_shared_a(x), data))(
        adapters
      )
      updates, state = tx.update(grads, state, adapters)
      carry = optax.apply_updates(adapters, updates), state
      return carry, carry

    return jax.lax.scan(body, (adapters, tx.init(adapters)), length=STEPS)[1]

  history, states = jax.device_get(run(adapters))
  pairs = with_shared_a(adapters)
  layers, modules = problems.to_reference(pairs, data)

  def after(modules, t):
    del t
    modules["A2"] = list(modules["A1"])
    return clip(layers, modules)

  modules, norms = by_hand(layers, modules, after)
  expected = problems.from_reference(modules, pairs)
  actual = problems.at(history, -1)
  assert (
    problems.relative_error(actual["primary"], expected["primary"])
    <= FLOAT32_RUN
  )
  for name, b in actual["auxiliary"].items():
    error = problems.relative_error(b, expected["auxiliary"][name].b)
    assert error <= FLOAT32_RUN
  np.testing.assert_allclose(
    optax.tree.get(states, "auxiliary_norm"), norms, rtol=FLOAT32_RUN
  )
  assert norms[-1] > RHO
  norm = problems.dense_norm(with_shared_a(actual)["auxiliary"])
  assert norm == pytest.approx(RHO, rel=1e-6)


def test_the_radius_of_a_shared_a_can_be_given_and_is_in_the_state():
  adapters = share_a(problems.make(SHAPES, fresh=False)[0])
  tx = shared_a(optax.sgd(0.1), RHO, direction="descent", clip="layer")
  updates, state = tx.update(
    adapters, tx.init(adapters), adapters, radius=jnp.float32(0.01)
  )
  new = with_shared_a(optax.apply_updates(adapters, updates))["auxiliary"]
  assert float(optax.tree.get(state, "radius")) == pytest.approx(0.01)
  for node in new.values():
    sizes = np.linalg.norm(problems.dense(node), axis=(-2, -1))
    assert np.all(sizes <= 0.01 * (1 + 1e-6))


def test_bad_arguments_are_refused():
  adapters, _ = problems.make(SHAPES)
  key = jax.random.key(0)
  wide = {"w": Factors(jnp.ones((2, 3)), jnp.ones((3, 4)))}
  for call, message in (
    (lambda: redraw_a(bilora(OURS), every=0), r"every .* at least 1; got 0"),
    (
      lambda: redraw_a(bilora(OURS), every=1).init(adapters),
      r"made by orthonormal_a; got Factors",
    ),
    (
      lambda: orthonormal_a(key, {"primary": {}}),
      r"needs an auxiliary; .*\['primary'\]",
    ),
    (
      lambda: orthonormal_a(key, {"primary": wide, "auxiliary": wide}),
      r"a rank of 3 and an input of 2",
    ),
    (lambda: share_a({"primary": {"w": key}}), r"share_a needs a tree of"),
    (
      lambda: shared_a(OURS).init(adapters),
      r"adapters that share_a makes.*got",
    ),
    (lambda: shared_a(OURS, direction="up"), r"got 'up'"),  # pyright: ignore
  ):
    with pytest.raises(ValueError, match=message):
      call()
  ready = orthonormal_a(key, adapters)
  for tx, params in (
    (redraw_a(bilora(OURS), every=1), ready),
    (shared_a(OURS), share_a(adapters)),
  ):
    with pytest.raises(ValueError, match=r"needs params, .*; got None"):
      tx.update(params, tx.init(params))
  node = ready["auxiliary"]["x"]
  assert isinstance(node, OrthonormalA) and isinstance(node, Factors)
