"""Builds a method for a model: trained parameters, gradient and update."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util
import optax

import bilora_jax
from bilora_jax import baselines

from ..data.objectives import Objective
from ..models import registry
from ..models.family import Family
from . import adapter, optimizers
from .options import AdapterOptions, OptimisationOptions
from .spec import Apply, Chosen, Init, Setting
from .trained import kernels


class Method(NamedTuple):
  """A way to fine-tune a model.

  The trained arrays are adapters, or parameters of the model.

  Attributes:
    init: from `(key, variables)` to the trained arrays.
    apply: from `(variables, trained, *inputs, rngs=None)` to the logits.
    tx: the transformation of the gradient.
    evaluated: from the trained arrays to the arrays that are evaluated and
      kept.
    estimator: the estimator of the gradient.
    weights: from the variables to the frozen weights that the estimator
      perturbs, nested as in the parameters; None if it perturbs none of them.
    adapted: the model with adapters, if it has any.
  """

  init: Init
  apply: Apply
  tx: optax.GradientTransformation
  evaluated: Callable[[Any], Any]
  estimator: baselines.GradientEstimator = baselines.gradient()
  weights: Callable[[Any], Any] | None = None
  adapted: bilora_jax.Adapted | None = None

  def differentiated(self, trained: Any, variables: Any) -> Any:
    """Returns the arguments of the gradient: trained arrays and `weights`."""
    if self.weights is None:
      return trained
    return {"trained": trained, "weights": self.weights(variables)}

  def unpacked(self, params: Any, variables: Any) -> tuple[Any, Any]:
    """Returns the trained arrays and variables in `differentiated`'s result."""
    if self.weights is None:
      return params, variables
    flat = traverse_util.flatten_dict(variables["params"])
    flat |= traverse_util.flatten_dict(params["weights"])
    own = traverse_util.unflatten_dict(flat)
    return params["trained"], {**variables, "params": own}

  def merged(self, variables: Any, evaluated: Any) -> Any:
    """Returns the variables of the plain model after training."""
    if self.adapted is None:
      return {**variables, "params": {**variables["params"], **evaluated}}
    merged = self.adapted.merge(variables, bilora_jax.primary(evaluated))
    if "auxiliary" not in evaluated:
      return merged
    # This method keeps the auxiliary, but the library merges only the primary.
    flat: dict[Any, Any] = traverse_util.flatten_dict(merged["params"])
    pairs: dict[Any, Any] = traverse_util.flatten_dict(
      evaluated["auxiliary"],
      is_leaf=lambda _, x: isinstance(x, bilora_jax.Factors),
    )
    for path, pair in pairs.items():
      flat[path] += pair.weight().reshape(flat[path].shape)
    return {**merged, "params": traverse_util.unflatten_dict(flat)}


def build(
  chosen: Chosen,
  adapter_options: AdapterOptions,
  optimisation: OptimisationOptions,
  model: nn.Module,
  inputs: tuple[Any, ...],
  steps: int,
  objective: Objective,
  quantised: str | None = None,
  base: Mapping[str, Any] | None = None,
) -> Method:
  """Builds the chosen method for a model.

  Args:
    chosen: the method and its options.
    adapter_options: the options of the adapters, if the method trains any.
    optimisation: the optimizer's options.
    model: a model of a known family, with a new `head` or with its own head,
      which gets no adapters.
    inputs: example inputs of the model.
    steps: optimizer steps of the whole run.
    objective: the objective of the loss.
    quantised: the dtype that the adapted weights are quantised to; None: they
      are not quantised.
    base: the tensors in the model's files; the folder of `--adapter` is
      compared with them.

  Raises:
    ValueError: if the targets match no module of the model, or the method does
      not support the model.
  """
  spec, options = chosen.spec, chosen.options
  family = registry.family_of(model)
  if spec.trains == "parameters":
    method = _of_parameters(model, lambda params: params)
  elif spec.trains == "head":
    if not family.has_new_head:
      raise ValueError(
        f"--method {spec.name} trains only a new head; a {family.name} has no "
        "new head, and answers with the head that it came with."
      )
    method = _of_parameters(model, lambda params: {"head": params["head"]})
  else:
    method = _of_adapters(
      chosen, adapter_options, family, model, inputs, quantised, base
    )
  weights = None
  if spec.perturbs_weights:
    assert method.adapted is not None
    if quantised:
      raise ValueError(
        f"--method {spec.name} perturbs the frozen weights, which must not be "
        f"quantised; got --base-dtype {quantised}."
      )
    weights = kernels(method.adapted)
  apply = spec.training_apply(options, method.apply)
  setting = Setting(
    options, adapter_options, optimisation, steps, apply, objective
  )
  optimizer = optimizers.adamw(optimisation, steps)
  return method._replace(
    apply=apply,
    tx=spec.transformation(setting, optimizer),
    estimator=spec.estimator(setting),
    weights=weights,
  )


def _of_parameters(
  model: nn.Module, select: Callable[[Any], dict[str, Any]]
) -> Method:
  """Returns a method that trains selected parameters of the model itself."""

  def init(key, variables):
    del key
    return select(variables["params"])

  def apply(variables, trained, *inputs, rngs=None):
    params = {**variables["params"], **trained}
    return model.apply({**variables, "params": params}, *inputs, rngs=rngs)

  return Method(init, apply, optax.identity(), lambda trained: trained)


def _of_adapters(
  chosen: Chosen,
  adapter_options: AdapterOptions,
  family: Family,
  model: nn.Module,
  inputs: tuple[Any, ...],
  quantised: str | None,
  base: Mapping[str, Any] | None,
) -> Method:
  spec, options = chosen.spec, chosen.options
  with_auxiliary = spec.has_auxiliary or spec.sketches
  folder = None
  if adapter_options.path:
    folder = adapter.of(
      adapter_options.path, model, base, adapter_options.new_head
    )
  lora = folder.spec() if folder else _new(adapter_options, family, model)
  extra = [lora.extra, "head/.*" if family.has_new_head else None]
  lora = dataclasses.replace(
    lora,
    auxiliary_rank=options.auxiliary_rank if with_auxiliary else 0,
    extra="|".join(filter(None, extra)) or None,
    dropout=adapter_options.dropout,
    base_dtype=quantised,
  )
  if lora.dora and (spec.perturbs_weights or spec.keeps_auxiliary(options)):
    raise ValueError(
      f"--adapter {adapter_options.path} is a DoRA, whose magnitudes scale "
      "the whole weights; only methods that perturb nothing but the factors "
      f"and keep one adapter can train it further; got --method {spec.name}."
    )
  adapted = bilora_jax.adapt(model, lora, *inputs)
  init = folder.started(adapted) if folder else adapted.init
  return Method(
    spec.begin(options, init),
    adapted.apply,
    optax.identity(),
    dict if spec.keeps_auxiliary(options) else bilora_jax.primary,
    adapted=adapted,
  )


def _new(
  options: AdapterOptions, family: Family, model: nn.Module
) -> bilora_jax.LoraSpec:
  """Returns the spec of new adapters: their modules, ranks and scales."""
  return bilora_jax.LoraSpec(
    rank=options.rank,
    alpha=options.alpha,
    targets=options.targets,
    exclude=family.own_head(model),
    dora=options.dora,
  )
