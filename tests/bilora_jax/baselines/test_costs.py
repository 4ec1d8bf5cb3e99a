"""What a step of each method evaluates, counted on its jaxpr."""

import collections

import jax
import jax.numpy as jnp
import jaxprs
import low_rank
import pytest

from bilora_jax import baselines

ALL = low_rank.ROWS
GRADIENT = {("forward", ALL): 1, ("gradient", ALL): 1}
TWO = {("forward", ALL): 2, ("gradient", ALL): 2}


def _losses(params, x, y):
  return jaxprs.mark(low_rank.losses(params, x, y))


def _loss(params, x, y):
  return jnp.mean(_losses(params, x, y))


def _take(args, index):
  return tuple(x[index] for x in args)


@pytest.mark.parametrize(
  ("estimator", "expected"),
  [
    (baselines.gradient(), [GRADIENT]),
    (baselines.sam(0.1), [TWO]),
    (baselines.sam(0.1, adaptive=True), [TWO]),
    # Between the steps of SAM, and in them.
    (baselines.looksam(0.1), [GRADIENT, TWO]),
    (
      baselines.esam(0.1, _losses, _take),
      [
        {
          ("forward", ALL): 2,
          ("gradient", ALL): 1,
          ("forward", ALL // 2): 1,
          ("gradient", ALL // 2): 1,
        }
      ],
    ),
    (baselines.s2sam(0.1), [GRADIENT]),
    (baselines.eflat_lora(0.1), [GRADIENT]),
    (baselines.wsam(0.1, 0.9), [TWO]),
    (baselines.weight_noise(0.1), [GRADIENT]),
    (
      baselines.flat_lora(0.1, 8, lambda params: params, True),
      [GRADIENT],
    ),
  ],
)
def test_a_step_evaluates_what_is_said_of_it(estimator, expected):
  params = low_rank.params(low_rank.weights())
  state = estimator.init(params)
  data = tuple(jnp.float32(part) for part in low_rank.data())

  def step(state, key, params, *data):
    value_and_grad = jax.value_and_grad(_loss)
    return estimator.estimate(value_and_grad, state, key, params, *data)

  key = jax.random.key(0)
  # Under jit too, as a train step is.
  found = jaxprs.costs(jax.jit(step), state, key, params, *data)
  assert found == [collections.Counter(cost) for cost in expected]


def test_loops_and_branches_are_counted_apart():
  def loss(w):
    return jnp.sum(jaxprs.mark(w))

  def body(w, _):
    return w - jax.grad(loss)(w), None

  def loop(w):
    return jax.lax.scan(body, w, length=3)[0]

  def branches(w):
    w = jax.lax.cond(w[0] > 0, loop, lambda w: w, w)
    return jax.lax.cond(w[0] > 1, jax.checkpoint(loss), jnp.sum, w)

  assert jaxprs.costs(loop, jnp.ones(2)) == [
    {("forward", 2): 3, ("gradient", 2): 3}
  ]
  assert jaxprs.costs(branches, jnp.ones(2)) == [
    {},
    {("forward", 2): 1},
    {("forward", 2): 3, ("gradient", 2): 3},
    {("forward", 2): 4, ("gradient", 2): 3},
  ]
