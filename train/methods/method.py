"""What is trained, and how: the methods of `--method`, each a pair of seams.

Where the gradient is taken is a `GradientEstimator`, what is done with it an
Optax transformation.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util
import jax
import optax

import bilora_jax
from bilora_jax import baselines

from ..data.objectives import Objective
from ..models import registry
from ..models.family import Family
from ..run.config import Config
from . import adapter, estimators, optimizers

_BALL = ("bilora", "dual_lora")
_ALL_PARAMETERS = ("full", "full_sam")


class Method(NamedTuple):
  """A way to fine-tune a model.

  Attributes:
    init: `(key, variables)` to what is trained.
    apply: `(variables, trained, *inputs, rngs=None)` to the logits.
    tx: what is done with the gradient.
    evaluated: from what is trained to what is evaluated and kept.
    estimator: where the gradient is taken.
    weights: from the variables to the frozen weights that the estimator
      perturbs, nested as they are; None if it perturbs none of them.
    adapted: the model with adapters, if it has any.
    rho: radius of the auxiliary's ball, if there is one.
  """

  init: Callable[[jax.Array, Any], Any]
  apply: Callable[..., Any]
  tx: optax.GradientTransformation
  evaluated: Callable[[Any], Any]
  estimator: baselines.GradientEstimator = baselines.gradient()
  weights: Callable[[Any], Any] | None = None
  adapted: bilora_jax.Adapted | None = None
  rho: float | None = None

  def differentiated(self, trained: Any, variables: Any) -> Any:
    """What the loss is differentiated by: what is trained, and `weights`."""
    if self.weights is None:
      return trained
    return {"trained": trained, "weights": self.weights(variables)}

  def unpacked(self, params: Any, variables: Any) -> tuple[Any, Any]:
    """What is trained, and the variables, of `differentiated`'s result."""
    if self.weights is None:
      return params, variables
    flat = traverse_util.flatten_dict(variables["params"])
    flat |= traverse_util.flatten_dict(params["weights"])
    own = traverse_util.unflatten_dict(flat)
    return params["trained"], {**variables, "params": own}


def build(
  config: Config,
  model: nn.Module,
  inputs: tuple[Any, ...],
  steps: int,
  objective: Objective,
) -> Method:
  """The method that a configuration names.

  Args:
    config: of the run.
    model: of a family; a new `head` is trained, its own one is frozen.
    inputs: example inputs of the model.
    steps: optimizer steps of the whole run.
    objective: what is learned from a batch.

  Raises:
    ValueError: if the targets match no module of the model, or the method is
      not for such a model.
  """
  family = registry.of(model)
  if config.method in _ALL_PARAMETERS:
    method = _of_parameters(model, lambda params: params)
  elif config.method == "head":
    if not family.has_new_head:
      raise ValueError(
        "--method head trains a new head alone, which encoders have; a "
        f"{family.name} answers by the head that it came with."
      )
    method = _of_parameters(model, lambda params: {"head": params["head"]})
  else:
    method = _of_adapters(config, family, model, inputs)
  apply = estimators.noisy(config, method.apply)
  return method._replace(
    apply=apply,
    tx=optimizers.build(config, steps),
    estimator=estimators.build(config, steps, apply, objective),
    weights=estimators.weights(config, method.adapted),
  )


def _of_parameters(
  model: nn.Module, select: Callable[[Any], dict[str, Any]]
) -> Method:
  """Trains parameters of the model itself, those of some of its modules."""

  def init(key, variables):
    del key
    return select(variables["params"])

  def apply(variables, trained, *inputs, rngs=None):
    params = {**variables["params"], **trained}
    return model.apply({**variables, "params": params}, *inputs, rngs=rngs)

  return Method(init, apply, optax.identity(), lambda trained: trained)


def _of_adapters(
  config: Config, family: Family, model: nn.Module, inputs: tuple[Any, ...]
) -> Method:
  has_ball = config.method in _BALL
  own = dataclasses.replace(
    _targets(config, family, model),
    auxiliary_rank=config.auxiliary_rank if has_ball else 0,
    extra="head/.*" if family.has_new_head else None,
    dora=config.dora,
    dropout=config.dropout,
    base_dtype=config.quantised,
  )
  adapted = bilora_jax.adapt(model, own, *inputs)
  init = adapted.init
  if config.adapter:
    init = adapter.started(config.adapter, adapted, model)
  return Method(
    optimizers.started(config, init) if has_ball else init,
    adapted.apply,
    optax.identity(),
    dict if config.keep_auxiliary else bilora_jax.primary,
    adapted=adapted,
    rho=config.rho if has_ball else None,
  )


def _targets(
  config: Config, family: Family, model: nn.Module
) -> bilora_jax.LoraSpec:
  """Which modules have adapters, of what rank and scale."""
  if config.adapter:
    return adapter.spec(config.adapter, model)
  return bilora_jax.LoraSpec(
    rank=config.rank,
    alpha=config.alpha,
    targets=config.targets,
    exclude=family.own_head,
  )
