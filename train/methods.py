"""What is trained, and how: LoRA, Bi-LoRA, LoRA-SAM or all parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import optax

import bilora_jax
from train.config import Config
from train.models import decoder


def _as_it_is(value_and_grad: Callable[..., Any]) -> Callable[..., Any]:
  return value_and_grad


class Method(NamedTuple):
  """A way to fine-tune a model.

  Attributes:
    init: `(key, variables)` to what is trained.
    apply: `(variables, trained, *inputs, rngs=None)` to the logits.
    tx: what is done with the gradient.
    evaluated: from what is trained to what is evaluated and kept.
    gradient: where the gradient is taken: from one `value_and_grad` function
      to another.
    adapted: the model with adapters, if it has any.
    rho: radius of the auxiliary's ball, if there is one.
  """

  init: Callable[[jax.Array, Any], Any]
  apply: Callable[..., Any]
  tx: optax.GradientTransformationExtraArgs
  evaluated: Callable[[Any], Any]
  gradient: Callable[[Callable[..., Any]], Callable[..., Any]] = _as_it_is
  adapted: bilora_jax.Adapted | None = None
  rho: float | None = None


def schedule(config: Config, steps: int) -> optax.Schedule:
  """The learning rate: a linear warm-up, then a cosine to zero."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=round(config.warmup_ratio * steps),
    decay_steps=max(steps, 1),
  )


def build(
  config: Config, model: nn.Module, inputs: tuple[Any, ...], steps: int
) -> Method:
  """The method that a configuration names.

  Args:
    config: of the run.
    model: an encoder with a new `head`, or a decoder, whose own is frozen.
    inputs: example inputs of the model.
    steps: optimizer steps of the whole run.

  Raises:
    ValueError: if the targets match no module of the model.
  """
  optimizer = optax.chain(
    optax.clip_by_global_norm(config.max_grad_norm)
    if config.max_grad_norm
    else optax.identity(),
    optax.adamw(schedule(config, steps), weight_decay=config.weight_decay),
  )
  if config.method == "full":

    def init_full(key, variables):
      del key
      return variables["params"]

    def apply_full(variables, trained, *inputs, rngs=None):
      return model.apply({**variables, "params": trained}, *inputs, rngs=rngs)

    return Method(init_full, apply_full, optimizer, lambda trained: trained)

  is_decoder = isinstance(model, decoder.Decoder)
  adapted = bilora_jax.adapt(
    model,
    bilora_jax.LoraSpec(
      rank=config.rank,
      alpha=config.alpha,
      auxiliary_rank=config.auxiliary_rank if config.method == "bilora" else 0,
      targets=config.targets,
      exclude="lm_head" if is_decoder else None,
      extra=None if is_decoder else "head/.*",
      dropout=config.dropout,
      base_dtype=config.quantised,
    ),
    *inputs,
  )
  rho, gradient = None, _as_it_is
  if config.method == "bilora":
    rho = config.rho
    optimizer = bilora_jax.bilora(
      optimizer,
      config.rho,
      clip=None if config.clip == "none" else config.clip,
      direction=config.direction,
    )
  elif config.method == "lora_sam":

    def gradient(value_and_grad):
      return bilora_jax.sam(
        value_and_grad,
        config.rho,
        lambda trained: {part: part == "primary" for part in trained},
      )

  return Method(
    adapted.init,
    adapted.apply,
    optimizer,
    bilora_jax.primary,
    gradient=gradient,
    adapted=adapted,
    rho=rho,
  )
