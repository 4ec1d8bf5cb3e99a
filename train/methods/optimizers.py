"""What `--method` does with the gradient: AdamW, and what is put around it."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import optax

import bilora_jax
from bilora_jax import baselines, variants

from ..run.config import Config


def learning_rate(config: Config, steps: int) -> optax.Schedule:
  """A linear warm-up, then a cosine to zero."""
  # Scaled outside, so that it may be traced: optax looks at a peak's value.
  unit = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=1.0,
    warmup_steps=round(config.warmup_ratio * steps),
    decay_steps=max(steps, 1),
  )
  return lambda count: config.learning_rate * unit(count)


def radius(config: Config, steps: int) -> optax.ScalarOrSchedule:
  """The radius of the auxiliary's ball, by the step."""
  match config.rho_schedule:
    case "constant":
      return config.rho
    case "growing":
      # As the noise of Flat-LoRA grows.
      falling = optax.cosine_decay_schedule(config.rho, max(steps, 1))
      return lambda count: config.rho - falling(count)
    case "falling":
      return optax.cosine_decay_schedule(config.rho, max(steps, 1))


def build(config: Config, steps: int) -> optax.GradientTransformation:
  """The transformation of a method; its updates are of what it trains."""
  rate = learning_rate(config, steps)
  optimizer = optax.chain(
    optax.clip_by_global_norm(config.max_grad_norm)
    if config.max_grad_norm
    else optax.identity(),
    optax.adamw(rate, weight_decay=config.weight_decay),
  )
  match config.method:
    case "lora_plus":
      return baselines.lora_plus(optimizer, config.lora_plus_ratio)
    case "obar" | "nbar":
      strength = optax.cosine_decay_schedule(config.balance, max(steps, 1))
      return baselines.balanced(
        optimizer,
        lambda count: strength(count) * rate(count),
        by="factors" if config.method == "obar" else "gradients",
      )
    case "bilora" | "dual_lora":
      return _bilora(config, steps, optimizer)
  return optimizer


def started(
  config: Config, init: Callable[[jax.Array, Any], Any]
) -> Callable[[jax.Array, Any], Any]:
  """How adapters begin, with the auxiliary where `--auxiliary-start` says."""
  if config.auxiliary_start == "zero":
    return init

  def scattered(key, variables):
    own, of_auxiliary = jax.random.split(key)
    return variants.scattered(of_auxiliary, init(own, variables), config.rho)

  return scattered


def _bilora(
  config: Config, steps: int, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
  tx = bilora_jax.bilora(
    optimizer,
    radius(config, steps),
    _auxiliary_optimizer(config, steps),
    clip=None if config.clip == "none" else config.clip,
    direction="descent" if config.method == "dual_lora" else "ascent",
  )
  if config.rho_ratio:
    tx = variants.adaptive_radius(tx, config.rho_ratio)
  if config.rescale_moments:
    tx = variants.rescale_moments(tx)
  return tx


def _auxiliary_optimizer(
  config: Config, steps: int
) -> optax.GradientTransformation | None:
  """None for the primary's own."""
  same = not config.auxiliary_learning_rate
  constant = config.auxiliary_schedule == "constant"
  kind = config.auxiliary_optimizer
  if kind == "adamw" and same and not constant:
    return None
  peak = config.learning_rate if same else config.auxiliary_learning_rate
  own = dataclasses.replace(config, learning_rate=peak)
  schedule = peak if constant else learning_rate(own, steps)
  match kind:
    case "adamw":
      return optax.adamw(schedule, weight_decay=config.weight_decay)
    case "sgd":
      return optax.sgd(schedule)
    case "sign":
      return optax.sign_sgd(schedule)
    case "power":
      return variants.power_ascent()
