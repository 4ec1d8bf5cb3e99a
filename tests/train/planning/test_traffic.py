"""Bytes that programs read and write, beside XLA's own count and each other."""

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from train.planning import traffic

LAYERS, WIDTH, ROWS = 6, 64, 128


def _layers(weights, x, unroll):
  def layer(x, w):
    return jnp.tanh(x @ w), None

  x, _ = lax.scan(jax.checkpoint(layer), x, weights, unroll=unroll)
  return jnp.sum(x**2)


def _compiled(unroll):
  gradient = jax.jit(jax.grad(_layers, (0, 1)), static_argnums=2)
  return gradient.lower(
    jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32),
    jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),
    unroll,
  ).compile()


@pytest.fixture(scope="module")
def unrolled():
  return _compiled(True)


@pytest.fixture(scope="module")
def scanned():
  return _compiled(1)


def test_without_loops_it_is_xlas_own_count(unrolled):
  text = unrolled.as_text()
  assert " while(" not in text
  # XLA looks deeper into some fusions.
  assert traffic.accessed(text) == pytest.approx(
    unrolled.cost_analysis()["bytes accessed"], rel=0.1
  )


def test_layers_in_a_loop_count_as_those_written_out(scanned, unrolled):
  whole = traffic.accessed(unrolled.as_text())
  # The loop stores what each turn leaves for the way back.
  assert whole <= traffic.accessed(scanned.as_text()) <= 2 * whole
  assert scanned.cost_analysis()["bytes accessed"] < whole / 2
