"""Initialisations of the primary, in place of LoRA's draw: `--start`."""

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
  """A method with an initialised primary, and the base that belongs to it.

  Attributes:
    variables: the variables of the model; the initial primary is subtracted
      from the base, if `start` is not None.
    method: the method, whose `init` returns the initial primary.
    start: the initial adapters, without an auxiliary; None if nothing is
      subtracted from the base.
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
    name: the name of the initialisation, as in `--start`.
    model: the model of the method.
    variables: the variables of the model, as in its files.
    method: the method, with LoRA's own initialisation.
    objective: the objective of the loss.
    batch: returns the first batch; `lora_ga` needs its gradient.

  Raises:
    ValueError: if a rank is too large for a weight.
    RunError: if the initial factors are not finite.
  """
  init, adapted = method.init, method.adapted
  if name == "uniform" or adapted is None:
    return Started(variables, method, None)
  if name in ("gaussian", "orthogonal"):
    draw = getattr(initializers, name)

    def drawn(key, variables):
      # Only the primary is drawn again: another option decides about the
      # auxiliary.
      own = init(key, variables)
      new = draw(jax.random.fold_in(key, 1), {"primary": own["primary"]})
      return {**own, **new}

    return Started(variables, method._replace(init=drawn), None)
  more = ()
  if name == "lora_ga":
    dense = method._replace(weights=kernels(adapted))
    more = (_gradient(model, dense, variables, objective, batch()),)
  # The factors that this key draws are not used.
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
  """Returns the gradient of a batch's loss in `weights`, without adapters."""

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
  """Converts trained adapters to adapters of the published weights.

  Args:
    adapted: the model with adapters.
    model: the model without adapters.
    inputs: example inputs of the model.
    evaluated: the trained adapters, without an auxiliary.
    start: the initial adapters, from `Started`.

  Returns:
    The model with adapters of twice the rank, and these adapters.
  """
  spec, wider = initializers.on_original(
    adapted.spec, evaluated, start["primary"]
  )
  return bilora_jax.adapt(model, spec, *inputs), wider
