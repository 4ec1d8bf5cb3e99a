"""LoRA, and methods that update its adapter in another way."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from ..options import option
from .spec import MethodSpec, Setting, baselines

if TYPE_CHECKING:
  import optax


@dataclasses.dataclass(frozen=True)
class LoraPlusOptions:
  """LoRA+ (arXiv 2402.12354)."""

  lora_plus_ratio: float = option(16.0, least=0)
  """Learning rate of factor b divided by the learning rate of factor a."""


@dataclasses.dataclass(frozen=True)
class BalanceOptions:
  """Balancedness of the factors (arXiv 2410.14802)."""

  balance: float = option(0.25, least=0)
  """Strength with which the factors are balanced at the first step, as a
  multiple of the learning rate. It falls to 0 during the run."""


def _lora_plus(
  setting: Setting, optimizer: "optax.GradientTransformation"
) -> "optax.GradientTransformation":
  return baselines().lora_plus(optimizer, setting.options.lora_plus_ratio)


def _balanced(by: Literal["factors", "gradients"]):
  def transformation(
    setting: Setting, optimizer: "optax.GradientTransformation"
  ) -> "optax.GradientTransformation":
    import optax

    from . import optimizers

    strength = optax.cosine_decay_schedule(
      setting.options.balance, max(setting.steps, 1)
    )
    rate = optimizers.schedule(setting.optimisation, setting.steps)
    return baselines().balanced(
      optimizer, lambda count: strength(count) * rate(count), by=by
    )

  return transformation


SPECS = (
  MethodSpec(name="lora", summary="one adapter"),
  MethodSpec(
    name="lora_plus",
    summary="one adapter; its factor b has a greater learning rate",
    options=LoraPlusOptions,
    transformation=_lora_plus,
  ),
  MethodSpec(
    name="obar",
    summary="one adapter, its factors balanced by their norms",
    options=BalanceOptions,
    transformation=_balanced("factors"),
  ),
  MethodSpec(
    name="nbar",
    summary="one adapter, its factors balanced by their gradients' norms",
    options=BalanceOptions,
    transformation=_balanced("gradients"),
  ),
)
