"""Subspace iteration as the auxiliary's optimizer, on linear losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from bilora_jax import Factors, bilora
from bilora_jax.variants import power_ascent

RHO = 0.1
STEPS = 50
# Of batch, in, rank, out and scale; the rank of the last is above its sides.
SHAPES = {
  "x": ((), 8, 3, 5, 2.0),
  "y": ((2,), 4, 3, 6, 0.5),
  "z": ((), 2, 4, 3, 1.0),
}


def gradients(seed):
  """Each layer's G, (*batch, in, out), singular values 0.6 times the last."""
  rng = np.random.default_rng(seed)

  def one(n, m):
    u, _ = np.linalg.qr(rng.normal(size=(n, n)))
    v, _ = np.linalg.qr(rng.normal(size=(m, m)))
    k = min(n, m)
    return (u[:, :k] * rng.uniform(1, 3) * 0.6 ** np.arange(k)) @ v[:, :k].T

  return {
    name: np.float32(
      np.reshape(
        [one(n, m) for _ in range(int(np.prod(batch)))], (*batch, n, m)
      )
    )
    for name, (batch, n, _, m, _) in SHAPES.items()
  }


def constant(gradient):
  return {k: np.repeat(g[None], STEPS, 0) for k, g in gradient.items()}


def start(fresh=True):
  rng = np.random.default_rng(5)
  size = 0.0 if fresh else 1.0
  return {
    k: Factors(
      np.float32(rng.normal(size=(*batch, n, r))),
      np.float32(size * rng.normal(size=(*batch, r, m))),
      scale,
    )
    for k, (batch, n, r, m, scale) in SHAPES.items()
  }


@functools.cache
def compiled(decay):
  tx = bilora(optax.sgd(0.0), RHO, power_ascent(decay))
  # Each step in two halves, or with NaNs watched for: MultiSteps keeps them.
  halves = 2 if decay else 1
  tx = optax.MultiSteps(tx, 2) if decay else optax.apply_if_finite(tx, 9)

  def loss(adapters, gradient):
    auxiliary = adapters["auxiliary"]
    return sum(
      jnp.sum(g * (auxiliary[k].scale * auxiliary[k].a @ auxiliary[k].b))
      for k, g in gradient.items()
    )

  @jax.jit
  def run(auxiliary, gradients, rhos):
    def body(carry, now):
      adapters, state = carry
      grads = jax.grad(loss)(adapters, now[0])
      updates, state = tx.update(grads, state, adapters, rho=now[1])
      adapters = optax.apply_updates(adapters, updates)
      return (adapters, state), adapters["auxiliary"]

    adapters = {"primary": auxiliary, "auxiliary": auxiliary}
    inputs = jax.tree.map(lambda x: jnp.repeat(x, halves, 0), (gradients, rhos))
    _, history = jax.lax.scan(body, (adapters, tx.init(adapters)), inputs)
    return jax.tree.map(lambda x: x[halves - 1 :: halves], history)

  return run


def weights(gradients, decay=0.0, rhos=None, fresh=True):
  """The auxiliary's dense weights after each step, float64."""
  rhos = np.full(STEPS, RHO, np.float32) if rhos is None else rhos
  auxiliary = {k: pair for k, pair in start(fresh).items() if k in gradients}
  history = jax.device_get(compiled(decay)(auxiliary, gradients, rhos))
  return {k: problems.dense(pair) for k, pair in history.items()}


def maximiser(gradient):
  """rho G_r / ||G_r||_F, with one norm over all layers."""
  best = {}
  for name, g in gradient.items():
    u, sigma, vt = np.linalg.svd(np.float64(g), full_matrices=False)
    r = SHAPES[name][2]
    best[name] = (u * sigma[..., None, :])[..., :r] @ vt[..., :r, :]
  norm = np.sqrt(sum(np.sum(w**2) for w in best.values()))
  return {name: RHO * w / norm for name, w in best.items()}


def last(history):
  return {k: w[-1] for k, w in history.items()}


@pytest.mark.parametrize("fresh", [True, False], ids=["b = 0", "random"])
def test_a_constant_gradient_leads_to_the_maximiser(fresh):
  # Corrected proposition 3, where ascent turns to the top pair alone.
  gradient = gradients(0)
  final = last(weights(constant(gradient), fresh=fresh))
  # 0.6^50 is nothing: rounding to float32, over 50 steps.
  assert problems.relative_error(final, maximiser(gradient)) <= 2e-5


def spans(pair):
  """a a^T, of the size that it has where a is orthonormal."""
  a = np.float64(pair.a)
  square = np.sum(a**2, (-2, -1), keepdims=True) / min(a.shape[-2:])
  return a @ a.mT / square


def test_each_step_is_a_projection_of_the_gradient():
  # Of one that never stays, onto the columns and the rows of the last weight in
  # turn. LoRA's start is not orthonormal, but weighs the layers as if it were.
  moving = [gradients(seed) for seed in range(STEPS)]
  stacked = {k: np.stack([g[k] for g in moving]) for k in SHAPES}
  history = weights(stacked)
  for t in range(STEPS):
    now = {k: np.float64(g[t]) for k, g in stacked.items()}
    gain = sum(np.sum(now[k] * history[k][t]) for k in SHAPES)
    assert gain > 0
    if t == 0:
      expected = {k: spans(pair) @ now[k] for k, pair in start().items()}
    else:
      before = {k: w[t - 1] for k, w in history.items()}
      inverse = {k: np.linalg.pinv(w, rcond=1e-4) for k, w in before.items()}
      expected = {
        k: before[k] @ inverse[k] @ g
        if t % 2 == 0
        else g @ inverse[k] @ before[k]
        for k, g in now.items()
      }
      expected["z"] = now["z"]  # its factors span all there is
    norm = np.sqrt(sum(np.sum(w**2) for w in expected.values()))
    expected = {k: RHO * w / norm for k, w in expected.items()}
    actual = {k: w[t] for k, w in history.items()}
    # Float32, through the inverse of what has a condition of some hundred.
    assert problems.relative_error(actual, expected) <= 1e-3
    if t > 0:
      np.testing.assert_allclose(gain, RHO * norm, rtol=1e-5)


def test_interruptions_are_overcome():
  gradient = gradients(1)
  sequence = constant(gradient)
  rhos = np.full(STEPS, RHO, np.float32)
  for g in sequence.values():
    g[4] = 0.0
    g[9] = np.nan
    g[11] *= 1e-15
  sequence["x"][6] = 0.0
  rhos[:2] = rhos[13:16] = 0.0
  history = weights(sequence, rhos=rhos)
  for w in history.values():
    assert np.all(np.isfinite(w))
    # Without any gradient, or with NaNs, nothing moves; but a weight on the
    # sphere may be found a rounding outside of it, and brought back.
    np.testing.assert_allclose(w[4], w[3], atol=1e-7 * RHO)
    np.testing.assert_array_equal(w[9], w[8])
    assert not np.any(w[rhos == 0])
  assert not np.any(history["x"][6])
  # While rho is 0, a is kept; it then shrinks by a thousand, and is rounded so.
  q, _ = np.linalg.qr(np.float64(start()["x"].a))
  woken = history["x"][2]
  np.testing.assert_allclose(q @ q.T @ woken, woken, atol=1e-4 * RHO)
  assert problems.relative_error(last(history), maximiser(gradient)) <= 2e-5


def only_x(tree):
  """One layer: less to compile."""
  return {"x": tree["x"]}


def test_decay_averages_noise_away():
  gradient, rng = only_x(gradients(2)), np.random.default_rng(0)
  steady = constant(gradient)
  best = maximiser(gradient)["x"]

  def alignment(decay, noise):
    sequence = {"x": np.float32(steady["x"] + noise)}
    if not decay:  # compiled for all
      silent = constant(gradients(2))
      sequence = {k: 0 * g for k, g in silent.items()} | sequence
    history = weights(sequence, decay)["x"]
    return np.einsum("tij,ij->t", history, best) / RHO**2

  noise = rng.normal(size=steady["x"].shape)
  averaged, plain = (np.mean(alignment(d, noise)[20:]) for d in (0.9, 0.0))
  assert averaged > plain + 0.1
  # Without noise it comes to the same, later.
  assert alignment(0.9, 0.0)[-1] > 0.99


def test_nans_are_not_taken_for_zero():
  sequence = only_x(constant(gradients(0)))
  sequence["x"][7, 0, 0] = np.nan
  finite = np.isfinite(weights(sequence, 0.9)["x"])
  assert np.all(finite[:7]) and not np.any(finite[7])


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_bad_decays_are_refused(decay):
  with pytest.raises(ValueError, match=r"decay.* at least 0 and below 1; got"):
    power_ascent(decay)


def test_bad_trees_and_missing_params_are_refused():
  tx = power_ascent()
  with pytest.raises(ValueError, match="power_ascent needs a tree of Factors"):
    tx.init({"w": np.ones(3)})
  with pytest.raises(ValueError, match="power_ascent needs params"):
    tx.update({}, tx.init({}))
