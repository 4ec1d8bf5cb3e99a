"""Lowers a training step from shapes alone: no array is read or made."""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..data.objectives import Objective
from ..devices import mesh as mesh_lib
from ..methods.method import Method
from . import state_shardings, step
from .config import Config


def next_token_batch(rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of an unpacked batch for `objectives.NEXT_TOKEN`."""
  dtypes = {
    "tokens": jnp.int32,
    "positions": jnp.int32,
    "targets": jnp.int32,
    "weights": jnp.float32,
  }
  return {
    name: jax.ShapeDtypeStruct((rows, length), dtype)
    for name, dtype in dtypes.items()
  } | {"lengths": jax.ShapeDtypeStruct((rows, 1), jnp.int32)}


def abstract(
  config: Config,
  method: Method,
  layout: mesh_lib.Layout,
  variables: Any,
  axes: Any,
) -> tuple[Any, step.TrainState]:
  """Returns a run's variables and first state, as shapes with shardings.

  Args:
    config: the configuration, which has the dtype of the frozen weights.
    method: what to train and how.
    layout: the layout; its devices need not exist.
    variables: the shapes of the model's variables, before they are quantised.
    axes: a tree like `variables`, with the names of the axes.
  """
  base_axes = axes
  base = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, config.model.param_dtype), variables
  )
  if config.model.quantised:
    assert method.adapted is not None
    base = jax.eval_shape(method.adapted.quantize, base)
    base_axes = method.adapted.quantized_axes(axes)
  state = jax.eval_shape(
    functools.partial(step.init, method), jax.random.key(0), base
  )
  if layout.mesh is None:
    return base, state
  return (
    _laid_out(base, layout.shardings(base_axes, base)),
    _laid_out(
      state, state_shardings.of(layout, method, axes, variables, state)
    ),
  )


def lower(
  layout: mesh_lib.Layout,
  method: Method,
  objective: Objective,
  variables: Any,
  state: step.TrainState,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  accumulate: int = 1,
) -> jax.stages.Lowered:
  """Returns the lowered step of `step.make_train_step`, ready to compile.

  Args:
    layout: the layout; its devices need not exist.
    method: what to train and how.
    objective: the objective of the loss.
    variables: from `abstract`.
    state: from `abstract`.
    batch: the shapes of a batch, of all processes together.
    accumulate: as in `make_train_step`.
  """
  shardings = None
  if layout.mesh is not None:
    shardings = jax.tree.map(lambda x: x.sharding, state), layout.replicated
  train_step: Any = step.make_train_step(
    method, objective, shardings, accumulate
  )
  return layout.within(train_step.lower)(
    variables, state, _split(layout, batch)
  )


def lower_eval(
  layout: mesh_lib.Layout,
  method: Method,
  objective: Objective,
  variables: Any,
  state: step.TrainState,
  batch: Mapping[str, jax.ShapeDtypeStruct],
) -> jax.stages.Lowered:
  """Returns the lowered step of `step.make_eval_step`; arguments as `lower`."""
  eval_step: Any = step.make_eval_step(method, objective, layout.replicated)
  evaluated = method.evaluated(state.trained)
  return layout.within(eval_step.lower)(
    variables, evaluated, _split(layout, batch)
  )


def _split(
  layout: mesh_lib.Layout, batch: Mapping[str, jax.ShapeDtypeStruct]
) -> Mapping[str, jax.ShapeDtypeStruct]:
  if layout.mesh is None:
    return batch
  rows = jax.sharding.PartitionSpec("batch")
  return {
    name: _laid_out(x, layout.sharding(rows, x.shape))
    for name, x in batch.items()
  }


def _laid_out(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    tree,
    shardings,
  )
