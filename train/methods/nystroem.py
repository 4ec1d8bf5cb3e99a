"""SAM of the whole weights by low-rank approximations of their gradients."""

import dataclasses
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..options import option
from .options import AdapterOptions, OptimisationOptions
from .spec import Init, MethodSpec, Setting

if TYPE_CHECKING:
  import optax

  import bilora_jax


@dataclasses.dataclass(frozen=True)
class NystroemOptions:
  """The perturbation, and the sketches that it is made from."""

  rho: float = option(0.05, least=0, below=1e6)
  """Frobenius norm of the perturbation, over all adapted weights together."""
  auxiliary_rank: int = option(16, least=1, below=2**16)
  """Rank of the sketches. It is also r2, the rank of the auxiliary adapter that
  takes the sketches."""
  core_rank: int = option(0, least=0, below=2**16)
  """Rank of the perturbation. 0 means half the rank of the sketches."""


def _estimator(setting: Setting) -> "bilora_jax.baselines.GradientEstimator":
  from bilora_jax import variants

  options = setting.options
  return variants.nystroem_sam(
    options.rho, options.auxiliary_rank, options.core_rank or None
  )


def _transformation(
  setting: Setting, optimizer: "optax.GradientTransformation"
) -> "optax.GradientTransformation":
  import bilora_jax
  from bilora_jax import variants

  options = setting.options
  ascent = variants.nystroem_ascent(options.core_rank or None)
  return bilora_jax.bilora(optimizer, options.rho, ascent)


def _without_auxiliary(options: Any, init: Init) -> Init:
  import bilora_jax

  del options
  return lambda key, variables: bilora_jax.primary(init(key, variables))


def _check(
  options: NystroemOptions,
  adapter: AdapterOptions,
  optimisation: OptimisationOptions,
) -> None:
  del adapter, optimisation
  if options.core_rank > options.auxiliary_rank:
    raise UsageError(
      "--core-rank must be at most --auxiliary-rank, which is "
      f"{options.auxiliary_rank}; got {options.core_rank}."
    )


SPECS = (
  MethodSpec(
    name="nystroem_sam",
    summary="one adapter; SAM over the whole weights, its perturbation has a "
    "low rank and is made from two sketches of the gradient",
    options=NystroemOptions,
    estimator=_estimator,
    gradients=lambda options: 2.0,
    sketches=True,
    begin=_without_auxiliary,
    check=_check,
  ),
  MethodSpec(
    name="nystroem_bilora",
    summary="two adapters; each batch comes twice in a row, and the second "
    "time the auxiliary is the adversary that this batch made, in a ball",
    options=NystroemOptions,
    transformation=_transformation,
    has_auxiliary=True,
    visits=2,
    check=_check,
  ),
)
