"""Where the primary starts, other than at LoRA's own draw: `--start`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

import bilora_jax
from bilora_jax import initializers

from ..data.objectives import Batch, Objective
from ..errors import RunError
from .method import Method
from .trained import kernels


class Started(NamedTuple):
  """A method whose primary starts where part of the base was.

  Attributes:
    variables: of the model, without what the primary starts at.
    method: its `init` gives that primary.
    start: the adapters at the start, without an auxiliary; None if the primary
      takes nothing out of the base.
  """

  variables: Any
  method: Method
  start: Any


def started(
  name: str,
  model: nn.Module,
  variables: Any,
  method: Method,
  objective: Objective,
  batch: Callable[[], Batch],
) -> Started:
  """Initialises the primary of a method.

  Args:
    name: of the initialisation, as `--start` takes it.
    model: the method's.
    variables: of the model, as they were read.
    method: with LoRA's own start.
    objective: what is learned from a batch.
    batch: the first one, for the gradient that `lora_ga` starts along.

  Raises:
    ValueError: if a rank is above what a weight has.
    RunError: if what is found is not finite.
  """
  init, adapted = method.init, method.adapted
  if name == "uniform" or adapted is None:
    return Started(variables, method, None)
  if name in ("gaussian", "orthogonal"):
    draw = getattr(initializers, name)

    def drawn(key, variables):
      # The auxiliary's start is an option of its own.
      own = init(key, variables)
      new = draw(jax.random.fold_in(key, 1), {"primary": own["primary"]})
      return {**own, **new}

    return Started(variables, method._replace(init=drawn), None)
  more = ()
  if name == "lora_ga":
    dense = method._replace(weights=kernels(adapted))
    more = (_gradient(model, dense, variables, objective, batch()),)
  # The key draws the auxiliary, which is not used here.
  new = bilora_jax.primary(adapted.init(jax.random.key(0), variables))
  base, start = getattr(initializers, name)(adapted, variables, new, *more)
  if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(start)):
    raise RunError(
      f"--start {name} has found factors that are not finite; try another "
      "--start, such as uniform."
    )

  def with_start(key, variables):
    return {**init(key, variables), "primary": start["primary"]}

  return Started(base, method._replace(init=with_start), start)


def _gradient(
  model: nn.Module,
  dense: Method,
  variables: Any,
  objective: Objective,
  batch: Batch,
) -> Any:
  """Of the loss of a batch, by the method's `weights`, without adapters."""

  def loss(params: Any, variables: Any) -> jax.Array:
    _, own = dense.unpacked(params, variables)
    found = model.apply(own, *objective.inputs(batch))
    items = objective.items(found, batch)
    return items.mean(items.losses)

  params = dense.differentiated({}, variables)
  return jax.jit(jax.grad(loss))(params, variables)["weights"]


def on_original(
  adapted: bilora_jax.Adapted,
  model: nn.Module,
  inputs: tuple[Any, ...],
  evaluated: Any,
  start: Any,
) -> tuple[bilora_jax.Adapted, Any]:
  """What was trained, as adapters of the published weights.

  Args:
    adapted: the model with adapters.
    model: the one without.
    inputs: example inputs of the model.
    evaluated: what was trained, without an auxiliary.
    start: of `Started`.
  """
  spec, wider = initializers.on_original(
    adapted.spec, evaluated, start["primary"]
  )
  return bilora_jax.adapt(model, spec, *inputs), wider
