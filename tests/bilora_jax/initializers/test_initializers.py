"""Where the primary starts, against NumPy's decompositions in float64."""

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilora_jax import LoraSpec, adapt, initializers

SPEC = LoraSpec(rank=2, alpha=3.0, auxiliary_rank=1)
SCALE = 1.5  # 3 / 2
# Of weights and outputs of order 1, in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
X = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
OF_WEIGHTS = {"pissa": initializers.pissa, "olora": initializers.olora}


class _Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.tanh(nn.Dense(6, name="dense")(x)), None


class _Model(nn.Module):
  """Two scanned layers, and a kernel of three axes whose sides differ."""

  @nn.compact
  def __call__(self, x):
    scan = nn.scan(
      _Layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=2,
    )
    x = scan(name="layers")(x, None)[0]
    return nn.DenseGeneral((2, 4), name="heads")(x)


@pytest.fixture(scope="module")
def linen():
  model = _Model()
  return model, adapt(model, SPEC, X), model.init(jax.random.key(0), X)


def _adapters(adapted, variables):
  return adapted.init(jax.random.key(1), variables)


def _gradients(model, variables):
  return jax.grad(lambda v: jnp.sum(jnp.sin(model.apply(v, X))))(variables)


def _started(name, model, adapted, variables):
  adapters = _adapters(adapted, variables)
  if name == "lora_ga":
    grads = _gradients(model, variables)["params"]
    return initializers.lora_ga(adapted, variables, adapters, grads)
  if name in OF_WEIGHTS:
    return OF_WEIGHTS[name](adapted, variables, adapters)
  draw = getattr(initializers, name)
  return variables, draw(jax.random.key(2), adapters)


def _matrices(adapters, kernels):
  """Each pair, without batch axes, beside its matrix in float64."""
  (heads, layers) = (
    adapters["primary"]["heads"]["kernel"],
    adapters["primary"]["layers"]["dense"]["kernel"],
  )
  wide = np.float64(kernels["heads"]["kernel"]).reshape(6, 8)
  yield np.float64(heads.a), np.float64(heads.b), wide
  stack = np.float64(kernels["layers"]["dense"]["kernel"])
  for a, b, matrix in zip(layers.a, layers.b, stack):
    yield np.float64(a), np.float64(b), matrix


@pytest.mark.parametrize(
  "name", ["gaussian", "orthogonal", "pissa", "olora", "lora_ga"]
)
def test_the_adapted_model_starts_where_the_model_is(linen, name):
  model, adapted, variables = linen
  base, adapters = _started(name, model, adapted, variables)
  wanted = model.apply(variables, X)
  assert set(adapters) == {"primary", "auxiliary"}
  alone = {"primary": adapters["primary"]}
  for own in (adapters, alone):
    np.testing.assert_allclose(adapted.apply(base, own, X), wanted, **CLOSE)
  merged = adapted.merge(base, adapters)
  for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(variables)):
    np.testing.assert_allclose(x, y, **CLOSE)
  moved = name in (*OF_WEIGHTS, "lora_ga")
  assert moved is not np.array_equal(
    base["params"]["heads"]["kernel"], variables["params"]["heads"]["kernel"]
  )


def test_pissa_takes_the_best_approximation(linen):
  *_, variables = linen
  base, adapters = _started("pissa", *linen)
  for a, b, matrix in _matrices(adapters, variables["params"]):
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    best = (u[:, :2] * sigma[:2]) @ vt[:2]
    np.testing.assert_allclose(SCALE * a @ b, best, **CLOSE)
    # Neither factor is the larger.
    np.testing.assert_allclose(a.T @ a, b @ b.T, **CLOSE)
  for _, _, rest in _matrices(adapters, base["params"]):
    assert np.linalg.matrix_rank(rest, tol=1e-4) == 4  # of 6


def test_olora_takes_the_first_of_a_qr_decomposition(linen):
  *_, variables = linen
  _, adapters = _started("olora", *linen)
  for a, b, matrix in _matrices(adapters, variables["params"]):
    q, r = np.linalg.qr(matrix.T)
    # A QR decomposition is unique but for signs, that the product has not.
    np.testing.assert_allclose((a @ b).T, q[:, :2] @ r[:2], **CLOSE)
    np.testing.assert_allclose(b @ b.T, np.eye(2), **CLOSE)


@pytest.mark.parametrize("gamma", [16.0, 4.0])
def test_lora_ga_s_first_step_is_the_best_approximation_of_the_gradient(
  linen, gamma
):
  model, adapted, variables = linen
  grads = _gradients(model, variables)["params"]
  _, adapters = initializers.lora_ga(
    adapted, variables, _adapters(adapted, variables), grads, gamma
  )
  for a, b, gradient in _matrices(adapters, grads):
    u, sigma, vt = np.linalg.svd(gradient, full_matrices=False)
    best = (u[:, :4] * sigma[:4]) @ vt[:4]
    # Of gradient descent: d(a b) = -(da b + a db), da = g b^T, db = a^T g.
    step = gradient @ b.T @ b + a @ a.T @ gradient
    size = np.sqrt(gradient.shape[1]) / gamma  # (m^(1/4) / sqrt(gamma))^2
    np.testing.assert_allclose(
      step, size * best, rtol=1e-4, atol=1e-5 * sigma[0]
    )


def test_random_starts_are_of_their_sizes():
  adapted = adapt(nn.Dense(4), LoraSpec(rank=64, auxiliary_rank=64), X)
  wide = adapt(
    nn.Dense(4), LoraSpec(rank=64, auxiliary_rank=64), np.ones((1, 256))
  )
  for own, size_in in ((adapted, 6), (wide, 256)):
    variables = nn.Dense(4).init(jax.random.key(0), np.ones((1, size_in)))
    adapters = _adapters(own, variables)
    drawn = {
      name: getattr(initializers, name)(jax.random.key(3), adapters)
      for name in ("gaussian", "orthogonal")
    }
    for new in drawn.values():
      assert not np.any(new["primary"]["kernel"].b)
      assert not np.allclose(
        new["primary"]["kernel"].a, new["auxiliary"]["kernel"].a
      )
    a = np.float64(drawn["orthogonal"]["primary"]["kernel"].a)
    gram = a.T @ a if size_in > 64 else a @ a.T
    np.testing.assert_allclose(gram, np.eye(len(gram)) / 3, **CLOSE)
  a = drawn["gaussian"]["primary"]["kernel"].a
  # 16,384 draws.
  assert np.std(a) == pytest.approx(1 / 64, rel=0.03)


def test_nnx_starts_where_linen_does():
  model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
  variables = nnx.state(model)
  adapted = adapt(model, SPEC, X)
  base, adapters = initializers.pissa(
    adapted, variables, _adapters(adapted, variables)
  )
  np.testing.assert_allclose(
    adapted.apply(base, adapters, X), model(X), **CLOSE
  )
  pair = adapters["primary"]["kernel"]
  u, sigma, vt = np.linalg.svd(np.float64(model.kernel[...]))
  best = (u[:, :2] * sigma[:2]) @ vt[:2]
  np.testing.assert_allclose(pair.weight(), best, **CLOSE)


def test_a_base_that_is_quantised_afterwards_is_that_of_the_rest():
  model = nn.Dense(8, use_bias=False)
  x = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
  spec = LoraSpec(rank=2, base_dtype="int8", tile_size=8)
  adapted = adapt(model, spec, x)
  variables = model.init(jax.random.key(0), x)
  adapters = _adapters(adapted, adapted.quantize(variables))
  base, adapters = initializers.pissa(adapted, variables, adapters)
  quantised = adapted.quantize(base)
  # Of 127 codes a side, on a rest of at most 1: 16 products' rounding.
  np.testing.assert_allclose(
    adapted.apply(quantised, adapters, x), model.apply(variables, x), atol=0.05
  )
  with pytest.raises(ValueError, match="expected floats"):
    initializers.pissa(adapted, quantised, adapters)


def test_a_base_of_half_precision_is_cast_once():
  model = nn.Dense(8, param_dtype=jnp.bfloat16)
  adapted = adapt(model, SPEC, X)
  variables = model.init(jax.random.key(0), X)
  base, adapters = initializers.pissa(
    adapted, variables, _adapters(adapted, variables)
  )
  pair = adapters["primary"]["kernel"]
  assert pair.a.dtype == jnp.float32
  kernel = np.float32(variables["params"]["kernel"])
  rest = jnp.asarray(kernel - np.float32(pair.weight()), jnp.bfloat16)
  np.testing.assert_array_equal(base["params"]["kernel"], rest)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_rank_above_a_weight_s_is_refused(name):
  adapted = adapt(nn.Dense(3), LoraSpec(rank=4), X)
  variables = nn.Dense(3).init(jax.random.key(0), X)
  with pytest.raises(
    ValueError, match=f"{name} takes the rank.*kernel: rank 4, sides 6 and 3"
  ):
    OF_WEIGHTS[name](adapted, variables, _adapters(adapted, variables))


def test_lora_ga_takes_the_gradients_of_boxed_parameters_and_of_nnx(linen):
  model, adapted, variables = linen
  adapters = _adapters(adapted, variables)
  plain = _gradients(model, variables)["params"]
  boxed = jax.tree.map(lambda g: nn.Partitioned(g, (None,) * g.ndim), plain)
  wanted = initializers.lora_ga(adapted, variables, adapters, plain)
  got = initializers.lora_ga(adapted, variables, adapters, boxed)
  jax.tree.map(np.testing.assert_array_equal, got, wanted)

  layer = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
  adapted = adapt(layer, SPEC, X)
  adapters = _adapters(adapted, nnx.state(layer))
  gradients = nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(X))))(layer)
  assert isinstance(gradients, nnx.State)
  _, (got, wanted) = zip(
    *(
      initializers.lora_ga(adapted, nnx.state(layer), adapters, own)
      for own in (gradients, nnx.to_pure_dict(gradients))
    )
  )
  jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_lora_ga_says_what_is_wrong_with_its_gradients(linen):
  model, adapted, variables = linen
  adapters = _adapters(adapted, variables)
  grads = _gradients(model, variables)["params"]
  short = {"heads": {"kernel": grads["heads"]["kernel"][0]}}
  with pytest.raises(
    ValueError,
    match=r"heads/kernel: \(6, 2, 4\), got \(2, 4\); layers/dense/kernel: "
    r"\(2, 6, 6\), got none",
  ):
    initializers.lora_ga(adapted, variables, adapters, short)
  for gamma in (0.0, float("inf")):
    with pytest.raises(ValueError, match=f"above 0; got {gamma}"):
      initializers.lora_ga(adapted, variables, adapters, grads, gamma)
  large = adapt(model, LoraSpec(rank=4), X)
  with pytest.raises(ValueError, match="takes 2 x the rank"):
    initializers.lora_ga(large, variables, _adapters(large, variables), grads)
