"""The paper's propositions 2 and 3, as they hold.

G is the gradient of the loss in the weight, and <G, W> the linearised loss.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from bilora_jax import Factors, bilora, keep_in_frobenius_ball

RANK = 3
RHO = 0.1


def gradients(seed):
  """Two layers' G, (in, out), with well separated singular values."""
  rng = np.random.default_rng(seed)

  def one(n, m, largest):
    u, _ = np.linalg.qr(rng.normal(size=(n, n)))
    v, _ = np.linalg.qr(rng.normal(size=(m, m)))
    k = min(n, m)
    sigma = largest * 0.6 ** np.arange(k)
    return (u[:, :k] * sigma) @ v[:, :k].T

  return {"x": one(8, 5, 3.0), "y": one(4, 6, 2.0)}


def inner(gradient, auxiliary):
  """<G, W2>, over layers, in float64."""
  return sum(
    np.sum(gradient[k] * problems.dense(auxiliary[k])) for k in gradient
  )


def top(gradient, r):
  """Singular triples, the largest r of each layer."""
  out = {}
  for name, g in gradient.items():
    u, sigma, vt = np.linalg.svd(g)
    out[name] = u[:, :r], sigma[:r], vt[:r]
  return out


def bound(gradient, r):
  """rho sqrt(sum_layers sum_{i<=r} sigma_{l,i}^2)."""
  sigmas = [sigma for _, sigma, _ in top(gradient, r).values()]
  return RHO * np.sqrt(np.sum(np.concatenate(sigmas) ** 2))


def as_pairs(a, b):
  return {k: Factors(jnp.float32(a[k]), jnp.float32(b[k])) for k in a}


def projected(pairs):
  tx = keep_in_frobenius_ball(RHO)
  zero = jax.tree.map(jnp.zeros_like, pairs)
  updates, state = tx.update(zero, tx.init(pairs), pairs)
  return optax.apply_updates(pairs, updates), state


@pytest.mark.parametrize(
  ("direction", "sign"), [("ascent", 1), ("descent", -1)]
)
def test_ascent_raises_the_linearised_loss(direction, sign):
  # Proposition 2. To first order in the rate eta the auxiliary's step changes
  # <G, W2> by eta ||dL/d(a, b)||^2: up, whatever the values. Plain gradient,
  # and before the clip: neither Adam nor the clip keeps that promise.
  adapters, data = problems.make(problems.SMALL, fresh=False)
  eta = 1e-3
  tx = bilora(optax.sgd(eta), clip=None, direction=direction)

  @jax.jit
  def rise(adapters):
    grads = jax.grad(problems.loss)(adapters, data)
    updates, _ = tx.update(grads, tx.init(adapters), adapters)
    still = jax.tree.map(jnp.zeros_like, updates)
    _, change = jax.jvp(
      lambda x: problems.loss(x, data),
      (adapters,),
      ({**still, "auxiliary": updates["auxiliary"]},),
    )
    return change, optax.tree.norm(grads["auxiliary"], squared=True)

  for seed in range(20):
    adapters, _ = problems.make(problems.SMALL, seed, fresh=False)
    change, square = rise(adapters)
    assert sign * float(change) > 0
    # Float32 sums of some 200 products.
    np.testing.assert_allclose(change, sign * eta * square, rtol=1e-5)


def test_no_auxiliary_in_the_ball_beats_the_bound():
  # Proposition 3, corrected: ||G_r|| takes the place of the nuclear norm.
  rng = np.random.default_rng(0)
  best = 0.0
  for seed in range(30):
    gradient = gradients(seed)
    # From noise to nearly the maximiser itself.
    noise, triples = seed / 30, top(gradient, RANK)
    a = {
      k: u * np.sqrt(s) + noise * rng.normal(size=u.shape)
      for k, (u, s, _) in triples.items()
    }
    b = {
      k: np.sqrt(s)[:, None] * vt + noise * rng.normal(size=vt.shape)
      for k, (_, s, vt) in triples.items()
    }
    auxiliary, _ = projected(as_pairs(a, b))
    ratio = inner(gradient, auxiliary) / bound(gradient, RANK)
    # Float32's rounding of the radius.
    assert ratio <= 1 + 1e-6
    best = max(best, ratio)
  assert best > 0.999  # the bound is no looser than it must be


def test_the_maximiser_is_the_truncated_gradient_over_its_norm():
  # rho G_r / ||G_r||_F, with one normaliser over all layers.
  gradient = gradients(0)
  triples = top(gradient, RANK)
  whole = np.sqrt(sum(np.sum(s**2) for _, s, _ in triples.values()))
  maximiser = as_pairs(
    {k: RHO * u * s / whole for k, (u, s, _) in triples.items()},
    {k: vt for k, (_, _, vt) in triples.items()},
  )
  # Rounding to float32.
  assert problems.dense_norm(maximiser) == pytest.approx(RHO, rel=1e-6)
  np.testing.assert_allclose(
    inner(gradient, maximiser), bound(gradient, RANK), rtol=1e-6
  )
  # With a normaliser for each layer it leaves the global ball.
  separate = as_pairs(
    {k: RHO * u * s / np.linalg.norm(s) for k, (u, s, _) in triples.items()},
    {k: vt for k, (_, _, vt) in triples.items()},
  )
  _, state = projected(separate)
  np.testing.assert_allclose(state.auxiliary_norm, RHO * np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_the_papers_maximiser_leaves_the_ball_above_rank_one(r):
  # As printed, rho U_r V_r^T, which has norm rho sqrt(r). One layer.
  gradient = {"x": gradients(0)["x"]}
  u, _, vt = top(gradient, r)["x"]
  printed = as_pairs({"x": RHO * u}, {"x": vt})
  _, state = projected(printed)
  np.testing.assert_allclose(state.auxiliary_norm, RHO * np.sqrt(r), rtol=1e-6)
  assert (float(state.clip_factor) < 1 - 1e-3) == (r > 1)
  value = inner(gradient, printed) / bound(gradient, r)
  assert (value > 1 + 1e-3) == (r > 1)
  # Brought back into the ball, it is worse than G_r / ||G_r||.
  back, _ = projected(printed)
  value = inner(gradient, back) / bound(gradient, r)
  assert (value < 1 - 1e-3) == (r > 1)


def test_ascent_on_a_linear_loss_turns_to_the_top_singular_pair():
  # What equations (9) and (10) do with a gradient that stays: power iteration.
  # (10) shrinks all directions alike, so the largest sigma of all layers
  # outgrows the others: rho sigma_1, below proposition 3's value.
  gradient = gradients(0)
  fixed = {k: jnp.float32(g) for k, g in gradient.items()}
  shapes = {
    "x": problems.Shape((), 8, 5, RANK, RANK),
    "y": problems.Shape((), 4, 6, RANK, RANK),
  }
  adapters, _ = problems.make(shapes)
  tx = bilora(optax.sgd(0.05), RHO)

  @jax.jit
  def run(adapters):
    def body(carry, _):
      adapters, state = carry
      grads = jax.grad(
        lambda x: sum(
          jnp.sum(fixed[k] * (x["auxiliary"][k].a @ x["auxiliary"][k].b))
          for k in fixed
        )
      )(adapters)
      updates, state = tx.update(grads, state, adapters)
      adapters = optax.apply_updates(adapters, updates)
      return (adapters, state), adapters["auxiliary"]

    return jax.lax.scan(body, (adapters, tx.init(adapters)), length=500)[1]

  history = run(adapters)
  values = [inner(gradient, problems.at(history, i)) for i in range(500)]
  largest = max(s[0] for _, s, _ in top(gradient, 1).values())
  # Float32's rounding of the radius.
  assert max(values) <= bound(gradient, RANK) * (1 + 1e-6)
  assert values[-1] == pytest.approx(RHO * largest, rel=1e-3)
  assert RHO * largest < 0.9 * bound(gradient, RANK)
