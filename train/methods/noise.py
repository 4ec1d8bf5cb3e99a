"""Noise in training: on the factors, on the whole weights, on the logits."""

import dataclasses
from typing import Any

import jax

from bilora_jax import baselines

from ..options import option
from .spec import Apply, MethodSpec
from .trained import INPUT_AXES, WEIGHTS, primary


@dataclasses.dataclass(frozen=True)
class NoiseOptions:
  """The noise."""

  rho: float = option(0.05, least=0, below=1e6)
  """The noise's standard deviation; over the weights' own size (flat_lora)."""


def _merged(params: Any) -> Any:
  """The weights that the adapted layers multiply by, without a perturbation."""
  return jax.tree.map(
    lambda weight, pair: weight + pair.weight().reshape(weight.shape),
    params["weights"],
    params["trained"]["primary"],
  )


def _with_noise(options: NoiseOptions, apply: Apply) -> Apply:
  """The model, with noise on the logits in training."""
  add_noise = baselines.output_noise(lambda logits: logits, options.rho)

  def with_noise(variables, trained, *inputs, rngs=None):
    logits = apply(variables, trained, *inputs, rngs=rngs)
    if rngs is None:
      return logits
    # Not the dropout's own draws.
    key = jax.random.fold_in(rngs["dropout"], 1)
    return add_noise(key, logits)

  return with_noise


SPECS = (
  MethodSpec(
    name="rwp",
    summary="one adapter; noise on its factors",
    options=NoiseOptions,
    estimator=lambda x: baselines.weight_noise(x.options.rho, primary),
  ),
  MethodSpec(
    name="rwp_full",
    summary="one adapter; noise on the whole weights",
    options=NoiseOptions,
    estimator=lambda x: baselines.weight_noise(x.options.rho, WEIGHTS),
    perturbs_weights=True,
  ),
  MethodSpec(
    name="rop",
    summary="one adapter; noise on the logits",
    options=NoiseOptions,
    training_apply=_with_noise,
  ),
  MethodSpec(
    name="flat_lora",
    summary="one adapter; noise on the whole weights, by their rows' norms",
    options=NoiseOptions,
    estimator=lambda x: baselines.flat_lora(
      x.options.rho, x.steps, _merged, WEIGHTS, input_axes=INPUT_AXES
    ),
    perturbs_weights=True,
  ),
)
