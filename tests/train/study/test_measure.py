"""What is measured of a linear model of digits, against NumPy in float64."""

import functools
import types

import jax
import numpy as np
import optax
import pytest

from bilora_jax import sharpness
from train.data import images, objectives
from train.data import load as data_lib
from train.data import registry as tasks
from train.methods.method import Method
from train.models.vit.config import IMAGENET
from train.study import landscapes, measure
from train.study.spec import Landscape, Sharpness

ROWS, BATCH, SIDE = 16, 8, 8
_OBJECTIVE = objectives.images(SIDE, objectives.CLASSIFICATION, *IMAGENET)
PATH = "head/kernel"


@pytest.fixture(scope="module")
def batches():
  task = tasks.get("digits")
  data = data_lib.Labelled(
    task,
    data_lib.Order(BATCH, BATCH, epochs=1, seed=0),
    {"train": images.load(task, "train", limit=40)},
    data_lib.Reader(
      functools.partial(images.decoded, task),
      images.train_batches,
      images.eval_batches,
      _OBJECTIVE,
    ),
  )
  # 20 rows fill two batches.
  return measure.batches(data, 20, BATCH)


@pytest.fixture(scope="module")
def kernel():
  return np.random.default_rng(0).normal(0, 0.05, (3 * SIDE**2, 10))


def _apply(variables, pixels):
  weights = variables["params"]["head"]["kernel"]
  return pixels.reshape(len(pixels), -1) @ weights


def _made(make, options):
  method = Method(
    init=lambda key, variables: variables["params"],
    apply=lambda variables, trained, *inputs: _apply(
      {"params": trained}, *inputs
    ),
    tx=optax.identity(),
    evaluated=lambda trained: trained,
  )
  model = types.SimpleNamespace(apply=_apply)
  return make(method, model, [PATH], _OBJECTIVE, options)


def _of(made, kernel, batches, key=0):
  params = {"head": {"kernel": kernel.astype(np.float32)}}
  return jax.tree.map(
    np.asarray, made({"params": params}, params, batches, jax.random.key(key))
  )


def _features(batches):
  grey = batches["images"].reshape(ROWS, SIDE, SIDE, 1).astype(float) / 255
  mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  return ((grey - mean) / deviation).reshape(ROWS, -1)


def _loss(kernel, batches):
  """The mean cross-entropy and its gradient."""
  x, labels = _features(batches), batches["labels"].reshape(ROWS)
  logits = x @ kernel
  shares = np.exp(logits - logits.max(1, keepdims=True))
  shares /= shares.sum(1, keepdims=True)
  loss = -np.log(shares[np.arange(ROWS), labels]).mean()
  return loss, x.T @ (shares - np.eye(10)[labels]) / ROWS


def test_batches_of_images_are_stacked(batches):
  assert batches["images"].shape == (2, BATCH, 8, 8)
  assert batches["images"].dtype == np.uint8
  assert batches["labels"].shape == (2, BATCH)


def test_rises_are_those_of_the_steps_by_numpy(batches, kernel):
  options = Sharpness(radii=(0.1, 0.5), spaces=("full",), average=0, low_rank=2)
  found = _of(_made(measure.make, options), kernel, batches)
  loss, gradient = _loss(kernel, batches)
  assert found["loss"] == pytest.approx(loss, rel=1e-5)
  norm = np.linalg.norm(gradient)
  assert found["full"]["norm"] == pytest.approx(norm, rel=1e-4)
  u, sigma, vt = np.linalg.svd(gradient, full_matrices=False)
  low = (u[:, :2] * sigma[:2]) @ vt[:2]
  for name, direction in (("one_step", gradient), ("low_rank", low)):
    unit = direction / np.linalg.norm(direction)
    wanted = [
      _loss(kernel + radius * unit, batches)[0] - loss
      for radius in options.radii
    ]
    rise = found["full"][name]["rise"]
    np.testing.assert_allclose(rise, wanted, rtol=1e-3, atol=1e-5)


def test_a_landscape_is_along_one_draw_scaled_to_each_filter(batches, kernel):
  options = Landscape(points=3, radius=0.5, plane=True)
  draw = _made(landscapes.make, options)
  found = _of(draw, kernel, batches)
  assert found["plane"].shape == (3, 3)
  np.testing.assert_allclose(found["plane"][:, 1], found["line"], rtol=1e-5)
  assert found["line"][1] == pytest.approx(_loss(kernel, batches)[0], rel=1e-5)
  # The direction of other weights is the same, in the norms of their filters.
  keys = jax.random.split(jax.random.key(0))
  for scales in (np.ones(10), np.linspace(0.5, 2, 10)):
    own = kernel * scales
    first, second = (
      np.asarray(sharpness.filter_normalized(key, {PATH: kernel})[PATH])
      * scales
      for key in keys
    )
    plane = [
      [_loss(own + s * first + t * second, batches)[0] for t in (-0.5, 0, 0.5)]
      for s in (-0.5, 0, 0.5)
    ]
    np.testing.assert_allclose(
      _of(draw, own, batches)["plane"], plane, rtol=1e-4
    )
