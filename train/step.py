"""The training step and the evaluation step, each one jitted function."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train.methods import Method

Batch = Mapping[str, Any]
_NEVER = 2**30  # optax.apply_if_finite: a bad update is never let through


class TrainState(NamedTuple):
  """What a checkpoint holds, and all that a step changes.

  Attributes:
    step: optimizer steps so far, int32 scalar.
    trained: adapters, or all parameters.
    opt_state: of `optimizer(method)`.
  """

  step: jax.Array
  trained: Any
  opt_state: Any


class Metrics(NamedTuple):
  """Scalars of one step, on the device.

  Attributes:
    loss: mean cross-entropy in nats, at the weights that the step met.
    accuracy: share of right labels among them.
    nonfinite: how many steps in a row were skipped.
    tokens: real tokens in the batch.
    c_over_rho: norm of the auxiliary before the clip, over rho; NaN without.
    clip_factor: what the clip multiplied each factor by; 1 without.
  """

  loss: jax.Array
  accuracy: jax.Array
  nonfinite: jax.Array
  tokens: jax.Array
  c_over_rho: jax.Array
  clip_factor: jax.Array


def optimizer(method: Method) -> optax.GradientTransformationExtraArgs:
  """The method's transformation, that skips steps that are not finite."""
  return optax.with_extra_args_support(
    optax.apply_if_finite(method.tx, max_consecutive_errors=_NEVER)
  )


def init(method: Method, key: jax.Array, variables: Any) -> TrainState:
  """The state before the first step."""
  # A copy, since the step donates it: the base must not go with it.
  trained = jax.tree.map(jnp.copy, method.init(key, variables))
  return TrainState(
    jnp.zeros([], jnp.int32), trained, optimizer(method).init(trained)
  )


def make_train_step(
  method: Method, key: jax.Array, shardings: Any = None
) -> Callable[[Any, TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns `(variables, state, batch)` to the next state and the metrics.

  Args:
    method: what to train and how.
    key: of the dropout; every step folds its number into it.
    shardings: of the next state and the metrics, on a mesh.
  """
  tx = optimizer(method)

  def loss_fn(trained, variables, batch, rngs):
    logits = method.apply(variables, trained, *inputs(batch), rngs=rngs)
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["labels"]
    ).mean()
    return loss, jnp.mean(jnp.argmax(logits, -1) == batch["labels"])

  def train_step(variables, state, batch):
    rngs = {"dropout": jax.random.fold_in(key, state.step)}
    (loss, accuracy), grads = method.value_and_grad(loss_fn, has_aux=True)(
      state.trained, variables, batch, rngs
    )
    # A loss that is not finite may still have a finite gradient.
    grads = jax.tree.map(
      lambda g: jnp.where(jnp.isfinite(loss), g, jnp.nan), grads
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    one = jnp.float32(1.0)
    norm = optax.tree.get(opt_state, "auxiliary_norm", jnp.nan)
    metrics = Metrics(
      loss=loss,
      accuracy=accuracy,
      nonfinite=optax.tree.get(opt_state, "notfinite_count"),
      tokens=jnp.sum(batch["mask"]),
      c_over_rho=norm / method.rho if method.rho else one * jnp.nan,
      clip_factor=optax.tree.get(opt_state, "clip_factor", one),
    )
    return TrainState(state.step + 1, trained, opt_state), metrics

  return jax.jit(train_step, donate_argnums=1, out_shardings=shardings)


def make_eval_step(
  method: Method, sharding: Any = None
) -> Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]:
  """Returns `(variables, evaluated, batch)` to labels and losses, both (B,).

  Args:
    method: what was trained.
    sharding: of both, on a mesh.
  """

  def eval_step(variables, evaluated, batch):
    logits = method.apply(variables, evaluated, *inputs(batch))
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["labels"]
    )
    return jnp.argmax(logits, -1), losses

  return jax.jit(eval_step, out_shardings=sharding)


def inputs(batch: Batch) -> tuple[jax.Array, ...]:
  """The arguments of the model that are in a batch."""
  return batch["tokens"], batch["mask"], batch["token_types"]
