"""Bi-LoRA, and Dual-LoRA, its ablation with a second adapter that descends."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from ..errors import UsageError
from ..options import option
from .options import AdapterOptions, OptimisationOptions
from .spec import Init, MethodSpec, Setting

if TYPE_CHECKING:
  import optax


@dataclasses.dataclass(frozen=True)
class BallOptions:
  """The auxiliary adapter and its ball."""

  rho: float = option(0.05, least=0, below=1e6)
  """Radius of the auxiliary's ball. It limits the Frobenius norm, over all
  layers together, of the change that the auxiliary adds to the weights."""
  auxiliary_rank: int = option(8, least=1, below=2**16)
  """r2, the rank of the auxiliary adapter."""
  clip: Literal["global", "layer", "none"] = option("global")
  """Which ball limits the auxiliary: one ball over all layers (global), one
  ball for each layer (layer), or no ball (none)."""
  rho_schedule: Literal["constant", "growing", "falling"] = option("constant")
  """How the radius of the ball changes during the run. constant: it stays rho.
  growing: it rises from 0 to rho along half a cosine. falling: it falls from
  rho to 0 along half a cosine."""
  rho_ratio: float = option(0.0, least=0, below=1e6)
  """Set the radius of the ball to this number times the norm of the change that
  the primary adds to the weights. 0 means that rho sets the radius."""
  auxiliary_learning_rate: float = option(0.0, least=0, below=1e6)
  """Learning rate of the auxiliary at its peak. 0 means the learning rate of
  the primary."""
  auxiliary_schedule: Literal["same", "constant"] = option("same")
  """Schedule of the auxiliary's learning rate: the same as the primary's, or
  constant."""
  auxiliary_start: Literal["zero", "scattered"] = option("zero")
  """Initialisation of the auxiliary. zero: its factor b is 0. scattered: both
  of its factors are random, and it lies on the surface of the ball."""
  rescale_moments: bool = option(False)
  """When the clip rescales a factor, rescale Adam's moments of this factor,
  too."""


@dataclasses.dataclass(frozen=True)
class BiloraOptions(BallOptions):
  """The auxiliary adapter, which climbs the loss inside a ball."""

  auxiliary_optimizer: Literal["adamw", "sgd", "sign", "power"] = option(
    "adamw"
  )
  """Optimizer by which the auxiliary climbs the loss. power moves the auxiliary
  to the top singular directions of the gradient at once, at any learning
  rate."""


@dataclasses.dataclass(frozen=True)
class DualOptions(BallOptions):
  """The second adapter, which descends the loss inside a ball."""

  keep_auxiliary: bool = option(False)
  """Evaluate and keep the second adapter as well."""


def radius(options: BallOptions, steps: int) -> "optax.ScalarOrSchedule":
  """Returns the radius of the auxiliary's ball, as a number or a schedule."""
  import optax

  match options.rho_schedule:
    case "constant":
      return options.rho
    case "growing":
      # The noise of Flat-LoRA grows in the same way.
      falling = optax.cosine_decay_schedule(options.rho, max(steps, 1))
      return lambda count: options.rho - falling(count)
    case "falling":
      return optax.cosine_decay_schedule(options.rho, max(steps, 1))


def transformation(
  setting: Setting, optimizer: "optax.GradientTransformation"
) -> "optax.GradientTransformation":
  """Returns the update of Bi-LoRA or of Dual-LoRA."""
  import bilora_jax
  from bilora_jax import variants

  options = setting.options
  descends = isinstance(options, DualOptions)
  tx = bilora_jax.bilora(
    optimizer,
    radius(options, setting.steps),
    _auxiliary_optimizer(setting),
    clip=None if options.clip == "none" else options.clip,
    direction="descent" if descends else "ascent",
  )
  if options.rho_ratio:
    tx = variants.adaptive_radius(tx, options.rho_ratio)
  if options.rescale_moments:
    tx = variants.rescale_moments(tx)
  return tx


def _auxiliary_optimizer(
  setting: Setting,
) -> "optax.GradientTransformation | None":
  """Returns the optimizer of the auxiliary; None: that of the primary."""
  import optax

  from bilora_jax import variants

  from . import optimizers

  options, optimisation = setting.options, setting.optimisation
  same = not options.auxiliary_learning_rate
  constant = options.auxiliary_schedule == "constant"
  kind = getattr(options, "auxiliary_optimizer", "adamw")
  if kind == "adamw" and same and not constant:
    return None
  peak = optimisation.learning_rate if same else options.auxiliary_learning_rate
  own = dataclasses.replace(optimisation, learning_rate=peak)
  schedule = peak if constant else optimizers.schedule(own, setting.steps)
  match kind:
    case "adamw":
      return optax.adamw(schedule, weight_decay=optimisation.weight_decay)
    case "sgd":
      return optax.sgd(schedule)
    case "sign":
      return optax.sign_sgd(schedule)
    case "power":
      return variants.power_ascent()


def _begin(options: BallOptions, init: Init) -> Init:
  """Returns an `init` that follows `--auxiliary-start`."""
  if options.auxiliary_start == "zero":
    return init
  import jax

  from bilora_jax import variants

  def scattered(key, variables):
    own, of_auxiliary = jax.random.split(key)
    return variants.scattered(of_auxiliary, init(own, variables), options.rho)

  return scattered


def _check(
  options: BallOptions,
  adapter: AdapterOptions,
  optimisation: OptimisationOptions,
) -> None:
  del optimisation
  if getattr(options, "auxiliary_optimizer", "") == "power" and (
    options.clip == "none"
  ):
    raise UsageError(
      "--auxiliary-optimizer power scales the auxiliary into a ball and needs "
      "one; got --clip none."
    )
  if options.auxiliary_start == "scattered" and not options.rho:
    raise UsageError(
      "--auxiliary-start scattered puts the auxiliary on the surface of a "
      "ball and needs a --rho above 0; got --rho 0."
    )
  if getattr(options, "keep_auxiliary", False) and adapter.dora:
    raise UsageError(
      "--keep-auxiliary is only for adapters without trained norms; got it "
      "with --dora."
    )


SPECS = (
  MethodSpec(
    name="bilora",
    summary="two adapters; the auxiliary climbs the loss inside a ball",
    options=BiloraOptions,
    transformation=transformation,
    has_auxiliary=True,
    begin=_begin,
    check=_check,
  ),
  MethodSpec(
    name="dual_lora",
    summary="two adapters; both descend, the auxiliary inside a ball",
    options=DualOptions,
    transformation=transformation,
    has_auxiliary=True,
    keeps_auxiliary=lambda options: options.keep_auxiliary,
    begin=_begin,
    check=_check,
  ),
)
