"""Digits, noise in them, the loss of taking it away, and sampling."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

NEW = 9
TIMES = 1000
SIDE = 8

Predict = Callable[[jax.Array, jax.Array, jax.Array], Any]
"""`(images, times, labels) -> noise`."""


class Data(NamedTuple):
  """Digits `(n, 8, 8)` in [-1, 1]; the last three are of the 9."""

  old: np.ndarray
  old_labels: np.ndarray
  held_out: np.ndarray
  held_out_labels: np.ndarray
  pool: np.ndarray
  validation: np.ndarray
  test: np.ndarray


class Batch(NamedTuple):
  """Images `(n, 8, 8)`, labels and times `(n,)`, and noise like the images."""

  images: jax.Array
  labels: jax.Array
  times: jax.Array
  noise: jax.Array


@functools.cache
def digits() -> Data:
  """scikit-learn's 1,797 digits, split by a fixed permutation."""
  found: Any = datasets.load_digits()
  order = np.random.default_rng(0).permutation(len(found.target))
  images = (found.images[order] / 8 - 1).astype(np.float32)
  labels = found.target[order]
  old, new = images[labels != NEW], images[labels == NEW]
  old_labels = labels[labels != NEW]
  return Data(
    old[256:],
    old_labels[256:],
    old[:256],
    old_labels[:256],
    *np.split(new, [64, 122]),
  )


def signals() -> np.ndarray:
  """The signal's share of the variance at each time, `(TIMES,)`, falling.

  These are the products of `1 - beta`, where a beta is at most 0.999.
  """
  angles = (np.arange(TIMES + 1) / TIMES + 0.008) / 1.008 * np.pi / 2
  squares = np.cos(angles) ** 2
  betas = np.minimum(1 - squares[1:] / squares[:-1], 0.999)
  return np.cumprod(1 - betas).astype(np.float32)


def draw(key: jax.Array, images: Any, labels: Any, count: int) -> Batch:
  """Random rows with random times and noise."""
  row_key, time_key, noise_key = jax.random.split(key, 3)
  rows = jax.random.randint(row_key, (count,), 0, len(images))
  return Batch(
    jnp.asarray(images)[rows],
    jnp.asarray(labels)[rows],
    jax.random.randint(time_key, (count,), 0, TIMES),
    jax.random.normal(noise_key, (count, *images.shape[1:])),
  )


def fixed(images: np.ndarray, labels: np.ndarray, draws: int) -> Batch:
  """Each image `draws` times, with times spread evenly, the same each time."""
  rng = np.random.default_rng(1)
  count = draws * len(images)
  times = rng.permutation((np.arange(count) + 0.5) * TIMES / count)
  noise = rng.standard_normal((count, *images.shape[1:]))
  return Batch(
    jnp.asarray(np.repeat(images, draws, axis=0)),
    jnp.asarray(np.repeat(labels, draws, axis=0)),
    jnp.asarray(times.astype(np.int32)),
    jnp.asarray(noise.astype(np.float32)),
  )


def denoising_loss(predict: Predict, batch: Batch) -> jax.Array:
  """The mean squared error of the predicted noise."""
  signal = jnp.asarray(signals())[batch.times][:, None, None]
  noised = jnp.sqrt(signal) * batch.images + jnp.sqrt(1 - signal) * batch.noise
  error = predict(noised, batch.times, batch.labels) - batch.noise
  return jnp.mean(error**2)


def sampled(
  predict: Predict, noise: jax.Array, labels: jax.Array, steps: int
) -> jax.Array:
  """Images out of noise `(n, 8, 8)` by DDIM, arXiv 2010.02502, eta = 0."""
  times = np.linspace(TIMES - 1, 0, steps).round().astype(np.int32)
  now = signals()[times]
  after = np.append(now[1:], np.float32(1))  # nothing but signal at the end

  def step(images, at):
    step_time, signal, following = at
    predicted = predict(images, jnp.full(len(images), step_time), labels)
    clean = (images - jnp.sqrt(1 - signal) * predicted) / jnp.sqrt(signal)
    clean = jnp.clip(clean, -1, 1)
    implied = (images - jnp.sqrt(signal) * clean) / jnp.sqrt(1 - signal)
    images = jnp.sqrt(following) * clean + jnp.sqrt(1 - following) * implied
    return images, None

  return jax.lax.scan(step, noise, (times, now, after))[0]
