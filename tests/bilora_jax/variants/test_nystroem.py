"""SAM of the whole weights from sketches, against dense float64 NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from bilora_jax import Factors, baselines, bilora, variants
from bilora_jax.variants import _sketches

RHO = 0.3
RATE = 0.05
STEPS = 50
SCALE = 2.0
RANK, CORE = 6, 3
KEY = jax.random.key(3, impl="unsafe_rbg")

# Of batch, in, out and scale; the sketches of the last are wider than it is.
SHAPES = {
  "x": ((), 24, 17, 2.0),
  "y": ((2,), 12, 20, 0.5),
  "z": ((), 4, 9, 1.0),
}


def _gradients(decay, rank=99):
  """Each weight's G, float64: its singular values, by their ratio."""
  rng = np.random.default_rng(0)

  def one(n, m):
    u, _ = np.linalg.qr(rng.normal(size=(n, n)))
    v, _ = np.linalg.qr(rng.normal(size=(m, m)))
    k = min(n, m, rank)
    return (u[:, :k] * rng.uniform(1, 3) * decay ** np.arange(k)) @ v[:, :k].T

  return {
    name: np.reshape(
      [one(n, m) for _ in range(int(np.prod(batch)))], (*batch, n, m)
    )
    for name, (batch, n, m, _) in SHAPES.items()
  }


def _pairs(rank=2):
  return {
    name: Factors(
      jnp.zeros((*batch, n, rank)), jnp.zeros((*batch, rank, m)), scale
    )
    for name, (batch, n, m, scale) in SHAPES.items()
  }


@jax.jit
def _sketched(key, size, gradients):
  """The sketches, and rho times what they make of linear losses."""
  sketches = _sketches.drawn(key, _pairs(), RANK)

  def loss(pairs):
    weights = {name: pair.weight() for name, pair in pairs.items()}
    return size * sum(jnp.sum(g * weights[k]) for k, g in gradients.items())

  grads = jax.grad(loss)(sketches)
  return sketches, _sketches.ascent(sketches, grads, CORE, RHO)


def _weights(gradients, key=KEY, size=1.0):
  _, ascent = _sketched(key, size, _in_float32(gradients))
  return {k: problems.dense(pair) for k, pair in jax.device_get(ascent).items()}


def _norm(weights):
  return np.sqrt(sum(np.sum(w**2) for w in weights.values()))


def _to_rho(weights):
  return {k: RHO * w / _norm(weights) for k, w in weights.items()}


def _nystroem(g, a, b):
  """G b^T C_k^+ a^T G, dense, by the singular values of C = a^T G b^T."""
  u, sigma, vt = np.linalg.svd(a.mT @ g @ b.mT)
  u, sigma, vt = u[..., :CORE], sigma[..., None, :CORE], vt[..., :CORE, :]
  core = (vt.mT / sigma) @ u.mT
  return g @ b.mT @ core @ a.mT @ g


def test_the_ascent_is_the_dense_generalised_nystroem_approximation():
  gradients = _gradients(0.6)
  sketches, _ = jax.device_get(_sketched(KEY, 1.0, _in_float32(gradients)))
  dense = {
    k: _nystroem(g, np.float64(sketches[k].a), np.float64(sketches[k].b))
    for k, g in gradients.items()
  }
  weights = _weights(gradients)
  # Float32, through the inverse of cores of condition 10.
  assert problems.relative_error(weights, _to_rho(dense)) <= 2e-5
  assert all(
    np.linalg.matrix_rank(w, 1e-6).max() <= CORE for w in weights.values()
  )


def test_sketches_are_orthonormal_and_perturb_next_to_nothing():
  pairs, _ = jax.device_get(_sketched(KEY, 1.0, _in_float32(_gradients(0.6))))
  for name, (batch, n, m, _) in SHAPES.items():
    a, b = np.float64(pairs[name].a), np.float64(pairs[name].b)
    assert a.shape == (*batch, n, RANK) and b.shape == (*batch, RANK, m)
    for x in (a, b.mT):
      # A side that is shorter has zeros for the rest.
      missing = max(RANK - x.shape[-2], 0)
      identity = np.diag(np.arange(RANK) >= missing)
      gram = x.mT @ x / 1e-4**2
      np.testing.assert_allclose(
        gram, np.broadcast_to(identity, gram.shape), atol=1e-4
      )
  # In units of the weights: some tens of roundings of float32 at 1.
  assert problems.dense_norm(pairs) < 1e-6


def test_what_is_kept_of_old_pairs_stays_in_the_span():
  rng = np.random.default_rng(0)
  old = jax.tree.map(
    lambda x: jnp.float32(rng.normal(size=x.shape)), _pairs(RANK)
  )
  redraw = jax.jit(lambda pairs: _sketches.redrawn(KEY, pairs, CORE))
  new = jax.device_get(redraw(old))
  for name in ("x", "y"):
    for before, after in (
      (old[name].a, new[name].a),
      (old[name].b.mT, new[name].b.mT),
    ):
      kept = np.float64(before)[..., :CORE]
      q = np.float64(after) / np.linalg.norm(
        after[..., :1], axis=-2, keepdims=True
      )
      np.testing.assert_allclose(q @ (q.mT @ kept), kept, atol=1e-5)


def test_a_gradient_of_low_enough_rank_is_met_whole():
  gradients = _gradients(0.6, rank=CORE)
  weights = _weights(gradients)
  assert problems.relative_error(weights, _to_rho(gradients)) <= 1e-5


def test_of_a_decaying_gradient_most_is_met():
  gradients = _gradients(0.6)
  best = {}
  for name, g in gradients.items():
    u, sigma, vt = np.linalg.svd(g, full_matrices=False)
    best[name] = (u * sigma[..., None, :])[..., :CORE] @ vt[..., :CORE, :]
  cosines = []
  for seed in range(8):
    weights = _weights(gradients, jax.random.fold_in(KEY, seed))
    assert _norm(weights) == pytest.approx(RHO, rel=1e-5)
    product = sum(np.sum(weights[k] * gradients[k]) for k in SHAPES)
    cosines.append(product / RHO / _norm(gradients))
  # No rank-k weight has a greater one; random sketches of twice the rank come
  # near it, and of no more than its rank they do not.
  bound = _norm(best) / _norm(gradients)
  assert max(cosines) <= bound + 1e-6
  assert np.mean(cosines) > 0.85 * bound


def test_gradients_that_are_tiny_zero_or_nan():
  gradients = _gradients(0.6)
  weights = _weights(gradients)
  tiny = _weights(gradients, size=1e-25)
  assert problems.relative_error(tiny, weights) <= 1e-4
  one = gradients | {"y": 0 * gradients["y"]}
  without = _weights(one)
  assert not np.any(without["y"])
  assert _norm(without) == pytest.approx(RHO, rel=1e-5)
  none = _weights(gradients, size=0.0)
  assert not any(np.any(w) for w in none.values())
  nan = _weights(gradients, size=np.nan)
  assert all(np.all(np.isnan(w)) for w in nan.values())


# A two-layer net, the first layer of which is (11, 13), as no other array is.
WIDTHS = {"one": (11, 13), "two": (13, 5)}


def _problem(rows, rank=2):
  """Inputs, outputs, kernels and the primary's pairs, float64."""
  draws = np.random.default_rng(0)
  kernels = {k: draws.normal(size=s) / np.sqrt(s[0]) for k, s in WIDTHS.items()}
  pairs = {
    name: Factors(
      0.3 * draws.normal(size=(n, rank)),
      0.3 * draws.normal(size=(rank, m)),
      SCALE,
    )
    for name, (n, m) in WIDTHS.items()
  }
  x, y = draws.normal(size=(rows, 11)), draws.normal(size=(rows, 5))
  return x, y, kernels, pairs


def _layer(h, kernel, *pairs):
  """As adapters are run: no product of two factors."""
  return h @ kernel + sum(p.scale * (h @ p.a) @ p.b for p in pairs)


def _loss(adapters, kernels, x, y):
  def layer(name, h):
    return _layer(h, kernels[name], *(tree[name] for tree in adapters.values()))

  return jnp.mean((layer("two", jnp.tanh(layer("one", x))) - y) ** 2)


def _dense_gradient(w, x, y):
  """The gradient of the loss in the merged weights."""
  hidden = np.tanh(x @ w["one"])
  error = 2 * (hidden @ w["two"] - y) / y.size
  inner = error @ w["two"].T * (1 - hidden**2)
  return {"one": x.T @ inner, "two": hidden.T @ error}


def _sum(*trees):
  return {k: sum(tree[k] for tree in trees) for k in trees[0]}


def _descended(pairs, g):
  return {
    k: Factors(
      p.a - RATE * SCALE * g[k] @ p.b.T,
      p.b - RATE * SCALE * p.a.T @ g[k],
      SCALE,
    )
    for k, p in pairs.items()
  }


def _in_float32(tree):
  return jax.tree.map(jnp.float32, tree)


def _by_estimator(estimator, problem, keys, steps):
  """The primary after each step of SGD, with the kernels frozen."""
  x, y, kernels, pairs = _in_float32(problem)

  def step(primary, key):
    params = {"primary": primary}
    (_, grads), _ = estimator.estimate(
      jax.value_and_grad(_loss), (), key, params, kernels, x, y
    )
    primary = jax.tree.map(lambda p, g: p - RATE * g, primary, grads["primary"])
    return primary, primary

  return jax.jit(lambda keys: jax.lax.scan(step, pairs, keys)[1])(keys[:steps])


def _by_hand(g, sketch):
  """The ascent from sketches, dense: its weights, and its factors."""
  found, factors = {}, {}
  for k, pair in sketch.items():
    a, b = np.float64(pair.a), np.float64(pair.b)
    u, sigma, vt = np.linalg.svd(a.T @ g[k] @ b.T)
    root = np.diag(sigma[:CORE] ** -0.5)
    left, right = (
      g[k] @ b.T @ vt[:CORE].T @ root,
      root @ u[:, :CORE].T @ a.T @ g[k],
    )
    found[k] = left @ right
    # As wide as the sketches are.
    empty = RANK - CORE
    factors[k] = Factors(
      np.float32(np.pad(left, [(0, 0), (0, empty)])),
      np.float32(np.pad(right, [(0, empty), (0, 0)])),
      SCALE,
    )
  return _to_rho(found), factors


def _assert_same(history, t, pairs):
  for k, pair in pairs.items():
    for ours, theirs in ((history[k].a[t], pair.a), (history[k].b[t], pair.b)):
      np.testing.assert_allclose(ours, theirs, atol=3e-5)


def test_two_gradients_a_step_follow_the_dense_transcription():
  x, y, kernels, pairs = problem = _problem(rows=12)
  keys = jax.random.split(KEY, STEPS)
  estimator = variants.nystroem_sam(RHO, RANK, CORE)
  history = jax.device_get(_by_estimator(estimator, problem, keys, STEPS))
  draw = jax.jit(lambda key: _sketches.drawn(key, _in_float32(pairs), RANK))
  for t in range(STEPS):
    w = _sum(kernels, {k: problems.dense(p) for k, p in pairs.items()})
    shift, _ = _by_hand(_dense_gradient(w, x, y), draw(keys[t]))
    pairs = _descended(pairs, _dense_gradient(_sum(w, shift), x, y))
    _assert_same(history, t, pairs)


def test_where_the_rank_is_enough_it_is_sam_of_the_whole_weights():
  # Of so many rows, no gradient has a higher rank.
  problem = _problem(rows=CORE)
  keys = jax.random.split(KEY, STEPS)
  x, y, kernels, pairs = _in_float32(problem)
  mask = {"primary": False, "weights": True}

  def loss(params, x, y):
    return _loss({"primary": params["primary"]}, params["weights"], x, y)

  sam = baselines.sam(RHO, mask)

  def step(primary, _):
    params = {"primary": primary, "weights": kernels}
    (_, grads), _ = sam.estimate(
      jax.value_and_grad(loss), (), KEY, params, x, y
    )
    primary = jax.tree.map(lambda p, g: p - RATE * g, primary, grads["primary"])
    return primary, primary

  dense = jax.jit(lambda: jax.lax.scan(step, pairs, length=STEPS)[1])()
  estimator = variants.nystroem_sam(RHO, RANK, CORE)
  ours = _by_estimator(estimator, problem, keys, STEPS)
  assert problems.relative_error(ours, dense) <= 1e-5


def test_one_gradient_a_step_follows_the_dense_transcription():
  # Each batch comes twice; each has outputs of its own.
  x, y, kernels, pairs = problem = _problem(rows=12)
  outputs = np.random.default_rng(1).normal(size=(STEPS // 2, *y.shape))
  tx = bilora(optax.sgd(RATE), RHO, variants.nystroem_ascent(CORE))
  start = _sketches.drawn(KEY, _in_float32(pairs), RANK)

  def step(carry, y):
    adapters, state = carry
    x, kernels = _in_float32((problem[0], problem[2]))
    grads = jax.grad(_loss)(adapters, kernels, x, y)
    updates, state = tx.update(grads, state, adapters)
    adapters = optax.apply_updates(adapters, updates)
    return (adapters, state), adapters

  @jax.jit
  def run(adapters, outputs):
    return jax.lax.scan(step, (adapters, tx.init(adapters)), outputs)[1]

  history = jax.device_get(
    run(
      {"primary": _in_float32(pairs), "auxiliary": start},
      jnp.float32(np.repeat(outputs, 2, 0)),
    )
  )
  redraw = jax.jit(
    lambda t, pairs: _sketches.redrawn(
      jax.random.fold_in(jax.random.key(0), t), pairs, CORE
    )
  )
  sketch = start
  for t in range(0, STEPS, 2):
    y = outputs[t // 2]
    w = _sum(kernels, {k: problems.dense(p) for k, p in pairs.items()})
    g = _dense_gradient(w, x, y)
    shift, factors = _by_hand(g, sketch)
    pairs = _descended(pairs, g)
    _assert_same(history["primary"], t, pairs)
    w = _sum(kernels, {k: problems.dense(p) for k, p in pairs.items()}, shift)
    pairs = _descended(pairs, _dense_gradient(w, x, y))
    _assert_same(history["primary"], t + 1, pairs)
    sketch = redraw(t + 1, factors)


def _arrays(estimator, params, mask=True):
  """Shapes of all that a compiled step computes of the first layer's size."""
  x, y, kernels, pairs = _in_float32(_problem(rows=12))

  def step(pairs, kernels):
    (_, grads), _ = estimator.estimate(*params(pairs, kernels), x, y)
    return grads["primary"]

  text = jax.jit(step).lower(pairs, kernels).compile().as_text()
  found = re.findall(r"= f32\[(?:11,13|13,11)\]\S* (\w+)", text)
  # The kernel itself, handed about.
  return {
    op
    for op in found
    if op not in ("parameter", "copy", "bitcast", "transpose")
  }


def test_no_array_is_as_large_as_a_weight():
  def ours(pairs, kernels):
    return jax.value_and_grad(_loss), (), KEY, {"primary": pairs}, kernels

  def dense(pairs, kernels):
    def loss(params, x, y):
      return _loss({"primary": params["primary"]}, params["weights"], x, y)

    params = {"primary": pairs, "weights": kernels}
    return jax.value_and_grad(loss), (), KEY, params

  mask = {"primary": False, "weights": True}
  assert _arrays(baselines.sam(RHO, mask), dense)
  assert not _arrays(variants.nystroem_sam(RHO, RANK, CORE), ours)


def test_visits_are_counted_by_the_step_that_is_given():
  tx = variants.nystroem_ascent(CORE)

  @jax.jit
  def updated(step):
    pairs = _sketches.drawn(KEY, _pairs(), RANK)
    grads = jax.tree.map(jnp.ones_like, pairs)
    extra = {} if step is None else {"step": step}
    updates, state = tx.update(grads, tx.init(pairs), pairs, **extra)
    return optax.apply_updates(pairs, updates), state.count

  def norm(step):
    pairs, count = jax.device_get(updated(step))
    assert int(count) == 1
    return problems.dense_norm(pairs)

  assert norm(None) == pytest.approx(1e4, rel=1e-4)
  assert norm(2) == pytest.approx(1e4, rel=1e-4)
  assert norm(3) < 1e-6


def test_from_loras_start_and_without_a_ball_all_stays_finite():
  rng = np.random.default_rng(0)
  start = {
    k: Factors(jnp.float32(rng.normal(size=p.a.shape)), p.b, p.scale)
    for k, p in _pairs(RANK).items()
  }
  adapters = {"primary": start, "auxiliary": start}
  gradients = _in_float32(_gradients(0.6))
  tx = bilora(optax.sgd(0.0), 0.0, variants.nystroem_ascent())

  def loss(adapters):
    return sum(
      jnp.sum(g * adapters["auxiliary"][k].weight())
      for k, g in gradients.items()
    )

  @jax.jit
  def step(adapters, state, rho):
    grads = jax.grad(loss)(adapters)
    updates, state = tx.update(grads, state, adapters, rho=rho)
    return optax.apply_updates(adapters, updates), state

  state, found = tx.init(adapters), []
  # From b = 0 there is one sketch and no adversary, nor is there one in a ball
  # of no size: neither at once, nor from what that leaves of the sketches.
  for rho in (RHO, RHO, RHO, RHO, 0.0, RHO, RHO, 0.0, RHO, RHO, RHO):
    adapters, state = step(adapters, state, rho)
    found.append(problems.dense_norm(jax.device_get(adapters["auxiliary"])))
  expected = [0, 0, RHO, 0, 0, 0, RHO, 0, 0, 0, RHO]
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("core_rank", [0, RANK + 1])
def test_cores_that_are_none_are_refused(core_rank):
  with pytest.raises(ValueError, match=f"from 1 to .* {RANK}; got {core_rank}"):
    variants.nystroem_sam(RHO, RANK, core_rank)
  with pytest.raises(ValueError, match=f"from 1 to .* {RANK}; got {core_rank}"):
    variants.nystroem_ascent(core_rank).init(_pairs(RANK))


def test_bad_arguments_are_refused():
  with pytest.raises(ValueError, match=r"rho, the radius .*; got -1"):
    variants.nystroem_sam(-1)
  with pytest.raises(ValueError, match=r"rank, of the sketches, .*; got 0"):
    variants.nystroem_sam(RHO, 0)
  estimator = variants.nystroem_sam(RHO)
  both = {"primary": _pairs(), "auxiliary": _pairs()}
  with pytest.raises(ValueError, match="adds an auxiliary to the"):
    estimator.estimate(None, (), KEY, both)
  with pytest.raises(ValueError, match="nystroem_sam needs a tree of Factors"):
    estimator.estimate(None, (), KEY, {"primary": {"w": np.ones(3)}})
  tx = variants.nystroem_ascent()
  with pytest.raises(
    ValueError, match="nystroem_ascent needs a tree of Factors"
  ):
    tx.init({"w": np.ones(3)})
  with pytest.raises(ValueError, match="nystroem_ascent needs params"):
    tx.update({}, tx.init({}))
