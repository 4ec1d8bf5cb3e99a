"""The training step and the evaluation step, each as one jitted function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..data.objectives import Batch, Items, Objective
from ..methods.method import Method
from .nonfinite import skip_nonfinite


class TrainState(NamedTuple):
  """The training state: everything that a step changes or a checkpoint holds.

  Attributes:
    step: the number of optimizer steps so far, int32 scalar.
    trained: adapters, or all parameters.
    opt_state: the state of `optimizer(method)`.
    estimator: the state of the gradient's estimator, such as an old gradient in
      variants of SAM.
    key: the key of the run's dropout and noise, uint32. Every step folds its
      number into it. The key is not a constant of the step, so all seeds share
      one compilation.
  """

  step: jax.Array
  trained: Any
  opt_state: Any
  estimator: Any
  key: jax.Array


class Metrics(NamedTuple):
  """Scalars of one step, on the device.

  Attributes:
    loss: the mean loss of the batch (cross-entropy in nats, or squared error),
      at the weights of the step's forward pass.
    accuracy: the share of right predictions.
    nonfinite: the number of skipped steps in a row.
    tokens: the number of real tokens in the batch.
    c_over_rho: the norm of the auxiliary before the clip, divided by the radius
      of the step; NaN without an auxiliary.
    clip_factor: the factor by which the clip multiplied each factor of the
      auxiliary; 1 without an auxiliary.
  """

  loss: jax.Array
  accuracy: jax.Array
  nonfinite: jax.Array
  tokens: jax.Array
  c_over_rho: jax.Array
  clip_factor: jax.Array


def optimizer(method: Method) -> optax.GradientTransformationExtraArgs:
  """Returns the method's transformation, with steps skipped unless finite."""
  return skip_nonfinite(method.tx)


def init(method: Method, key: jax.Array, variables: Any) -> TrainState:
  """Returns the state before the first step; all draws depend on the key."""
  own, later = jax.random.split(key)
  # A copy, because the step donates it, and must not donate the base's arrays.
  trained = jax.tree.map(jnp.copy, method.init(own, variables))
  return TrainState(
    step=jnp.zeros([], jnp.int32),
    trained=trained,
    opt_state=optimizer(method).init(trained),
    estimator=method.estimator.init(method.differentiated(trained, variables)),
    key=jax.random.key_data(later),
  )


def make_train_step(
  method: Method,
  objective: Objective,
  shardings: Any = None,
  accumulate: int = 1,
) -> Callable[[Any, TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns a function from `(variables, state, batch)` to state and metrics.

  Args:
    method: what to train and how.
    objective: the objective of the loss.
    shardings: the shardings of the next state and the metrics, on a mesh.
    accumulate: the number of parts of a batch, which run one after another;
      their gradients add up to the gradient of the batch.
  """
  tx = optimizer(method)

  def loss_fn(params, variables, batch, total, key):
    trained, variables = method.unpacked(params, variables)
    found = method.apply(
      variables, trained, *objective.inputs(batch), rngs={"dropout": key}
    )
    items = objective.items(found, batch)
    return (
      jnp.sum(items.losses * items.weights) / total,
      jnp.sum(items.right * items.weights) / total,
    )

  value_and_grad = _accumulated(
    jax.value_and_grad(loss_fn, has_aux=True), accumulate
  )

  def train_step(variables, state, batch):
    # A batch may have no token to learn from.
    total = jnp.maximum(jnp.sum(objective.weights(batch)), 1.0)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    dropout_key, noise_key = jax.random.split(key)
    ((loss, accuracy), grads), estimator = method.estimator.estimate(
      value_and_grad,
      state.estimator,
      noise_key,
      method.differentiated(state.trained, variables),
      variables,
      batch,
      total,
      dropout_key,
    )
    grads, _ = method.unpacked(grads, variables)
    # `step`, because the transformation's own count leaves out skipped steps.
    # `value`, because a loss that is not finite may have a finite gradient.
    updates, opt_state = tx.update(
      grads, state.opt_state, state.trained, value=loss, step=state.step
    )
    trained = optax.apply_updates(state.trained, updates)
    nonfinite = optax.tree.get(opt_state, "notfinite_count")
    # The estimator's state of a skipped step would spoil all later steps.
    estimator = jax.tree.map(
      lambda new, old: jnp.where(nonfinite == 0, new, old),
      estimator,
      state.estimator,
    )
    one = jnp.float32(1.0)
    norm = optax.tree.get(opt_state, "auxiliary_norm", jnp.nan)
    metrics = Metrics(
      loss=loss,
      accuracy=accuracy,
      nonfinite=nonfinite,
      tokens=objective.tokens(batch),
      c_over_rho=_over(norm, optax.tree.get(opt_state, "radius", jnp.nan)),
      clip_factor=optax.tree.get(opt_state, "clip_factor", one),
    )
    return TrainState(
      state.step + 1, trained, opt_state, estimator, state.key
    ), metrics

  return jax.jit(train_step, donate_argnums=1, out_shardings=shardings)


def _over(norm: jax.Array, radius: jax.Array) -> jax.Array:
  """Returns norm / radius; NaN without a ball, or if its radius is 0."""
  return jnp.where(radius > 0, norm / radius, jnp.float32(jnp.nan))


def _accumulated(
  value_and_grad: Callable[..., Any], parts: int
) -> Callable[..., Any]:
  """Returns a function that runs a batch in parts and adds up their results.

  A part has every `parts`-th row of the batch. So on a mesh, each device keeps
  its own rows.
  """
  if parts == 1:
    return value_and_grad

  def of_parts(trained, variables, batch, total, key):
    split = jax.tree.map(
      lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch
    )

    def of_part(number, part):
      return value_and_grad(
        trained, variables, part, total, jax.random.fold_in(key, number)
      )

    def add(sums, numbered):
      return jax.tree.map(jnp.add, sums, of_part(*numbered)), None

    numbered = jnp.arange(parts), split
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(of_part, *jax.tree.map(lambda x: x[0], numbered)),
    )
    return jax.lax.scan(add, zeros, numbered)[0]

  return of_parts


def make_eval_step(
  method: Method, objective: Objective, sharding: Any = None
) -> Callable[[Any, Any, Batch], Items]:
  """Returns a function from `(variables, evaluated, batch)` to the items.

  Args:
    method: the method that trained the weights.
    objective: the objective of the loss.
    sharding: the sharding of the items, on a mesh.
  """

  def eval_step(variables, evaluated, batch):
    found = method.apply(variables, evaluated, *objective.inputs(batch))
    return objective.items(found, batch)

  return jax.jit(eval_step, out_shardings=sharding)


def make_features(model: Any, sharding: Any = None) -> Callable[..., jax.Array]:
  """Returns a function from `(variables, *inputs)` to features, [rows, width].

  Args:
    model: a classifier with a method `features`.
    sharding: the sharding of the features, on a mesh.
  """

  def features(variables, *inputs):
    return model.apply(variables, *inputs, method="features")

  return jax.jit(features, out_shardings=sharding)
