"""Sharpness-aware minimisation: over factors, weights or all parameters."""

import dataclasses
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..options import option
from .options import AdapterOptions, OptimisationOptions
from .spec import Apply, MethodSpec, Setting, baselines
from .trained import WEIGHTS, primary

if TYPE_CHECKING:
  import jax

  import bilora_jax

  from ..data.objectives import Objective


@dataclasses.dataclass(frozen=True)
class SamOptions:
  """The perturbation."""

  rho: float = option(0.05, least=0, below=1e6)
  """Norm of the perturbation. The norm is that of the adapters' perturbation
  (0.01 or 0.05 in the paper), of the weights' perturbation (for lora_full_sam
  and eflat_lora), of the perturbation of all parameters (for full_sam), or of
  the perturbation divided by the factors (for lora_asam)."""


@dataclasses.dataclass(frozen=True)
class LookSamOptions(SamOptions):
  """The perturbation, and how often it is taken."""

  sam_every: int = option(5, least=1)
  """Number of steps from one step of SAM to the next."""
  sam_reuse: float = option(0.7, least=0)
  """Weight of the direction that SAM found, in the steps between two steps of
  SAM."""


@dataclasses.dataclass(frozen=True)
class EsamOptions(SamOptions):
  """The perturbation, of a part of the weights, for a part of the rows."""

  weight_fraction: float = option(0.5)
  """Share of the weights that a step perturbs."""
  sample_fraction: float = option(0.5)
  """Share of the rows that the second gradient is computed from."""


@dataclasses.dataclass(frozen=True)
class WsamOptions(SamOptions):
  """The perturbation, and the weight of sharpness."""

  sharpness_weight: float = option(0.8, least=0, below=0.999)
  """Weight c of the sharpness in the loss (1 - 2c) / (1 - c) L(w) + c / (1 - c)
  L(w + e). 0.5 is the same as SAM."""


@dataclasses.dataclass(frozen=True)
class EFlatLoraOptions(SamOptions):
  """The perturbation, and its average."""

  perturbation_beta: float = option(0.1, above=0, below=1)
  """Weight of the newest perturbation in the average."""


def _check_esam(
  options: EsamOptions,
  adapter: AdapterOptions,
  optimisation: OptimisationOptions,
) -> None:
  del adapter
  for name in ("weight_fraction", "sample_fraction"):
    value = getattr(options, name)
    if not 0 < value <= 1:
      raise UsageError(
        f"--{name.replace('_', '-')} must be in (0, 1]; got {value}."
      )
  if optimisation.accumulate > 1:
    raise UsageError(
      "--method esam chooses rows of the whole batch, so --accumulate must be "
      f"1; got --accumulate {optimisation.accumulate}."
    )


def _esam(setting: Setting) -> "bilora_jax.baselines.GradientEstimator":
  options, objective = setting.options, setting.objective
  return baselines().esam(
    options.rho,
    _losses(setting.apply, objective),
    lambda args, index: _rows(objective, args, index),
    weight_fraction=options.weight_fraction,
    sample_fraction=options.sample_fraction,
    mask=primary,
  )


def _losses(apply: Apply, objective: "Objective"):
  def losses(trained, variables, batch, total, key):
    found = apply(
      variables, trained, *objective.inputs(batch), rngs={"dropout": key}
    )
    items = objective.items(found, batch)
    rows = len(items.losses)
    of_rows = (items.losses * items.weights).reshape(rows, -1).sum(-1)
    return of_rows * (rows / total)  # their mean is the step's loss

  return losses


def _rows(objective: "Objective", args: Any, index: "jax.Array") -> Any:
  """Returns the arguments of the step's loss for some rows of the batch."""
  import jax
  import jax.numpy as jnp

  variables, batch, _, key = args
  batch = jax.tree.map(lambda x: x[index], batch)
  return variables, batch, jnp.maximum(objective.weights(batch).sum(), 1), key


def _two(options: Any) -> float:
  del options
  return 2.0


SPECS = (
  MethodSpec(
    name="lora_sam",
    summary="one adapter; SAM over its factors",
    options=SamOptions,
    estimator=lambda x: baselines().sam(x.options.rho, primary),
    gradients=_two,
  ),
  MethodSpec(
    name="lora_asam",
    summary="one adapter; adaptive SAM over its factors",
    options=SamOptions,
    estimator=lambda x: baselines().sam(x.options.rho, primary, adaptive=True),
    gradients=_two,
  ),
  MethodSpec(
    name="lora_full_sam",
    summary="one adapter; SAM over the whole weights",
    options=SamOptions,
    estimator=lambda x: baselines().sam(x.options.rho, WEIGHTS),
    gradients=_two,
    perturbs_weights=True,
  ),
  MethodSpec(
    name="looksam",
    summary="one adapter; SAM over its factors every few steps",
    options=LookSamOptions,
    estimator=lambda x: baselines().looksam(
      x.options.rho, x.options.sam_every, x.options.sam_reuse, primary
    ),
    gradients=lambda options: 1 + 1 / options.sam_every,
  ),
  MethodSpec(
    name="esam",
    summary="one adapter; SAM over a part of its factors, for a part of the "
    "rows",
    options=EsamOptions,
    estimator=_esam,
    # The second gradient takes a share of the rows. A forward pass over all
    # rows, which chooses them, is not counted.
    gradients=lambda options: 1 + options.sample_fraction,
    check=_check_esam,
  ),
  MethodSpec(
    name="s2sam",
    summary="one adapter; SAM over its factors, along the last step's gradient",
    options=SamOptions,
    estimator=lambda x: baselines().s2sam(x.options.rho, primary),
  ),
  MethodSpec(
    name="eflat_lora",
    summary="one adapter; SAM over the whole weights, its perturbation "
    "averaged in one factor",
    options=EFlatLoraOptions,
    estimator=lambda x: baselines().eflat_lora(
      x.options.rho, x.options.perturbation_beta, primary
    ),
  ),
  MethodSpec(
    name="wsam",
    summary="one adapter; SAM over its factors, with a weight on the sharpness",
    options=WsamOptions,
    estimator=lambda x: baselines().wsam(
      x.options.rho, x.options.sharpness_weight, primary
    ),
    gradients=_two,
  ),
  MethodSpec(
    name="full_sam",
    summary="all parameters; SAM over them",
    options=SamOptions,
    trains="parameters",
    estimator=lambda x: baselines().sam(x.options.rho),
    gradients=_two,
  ),
)
