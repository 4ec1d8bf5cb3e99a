"""The optimizer of all methods: AdamW with a warm-up and a cosine decay."""

import optax

from ..errors import UsageError
from .options import OptimisationOptions


def schedule(options: OptimisationOptions, steps: int) -> optax.Schedule:
  """Returns a linear warm-up to the learning rate, and a cosine decay to 0.

  Raises:
    UsageError: if the warm-up takes all steps.
  """
  warmup = round(options.warmup_ratio * steps)
  if warmup and warmup >= steps:
    raise UsageError(
      "--warmup-ratio must leave at least one step in which the learning rate "
      f"falls; got {options.warmup_ratio}, which is {warmup} of the {steps} "
      "steps."
    )
  # The learning rate may be traced here. optax would branch on the value of a
  # peak, so the peak is 1, and the schedule is scaled afterwards.
  unit = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=1.0,
    warmup_steps=warmup,
    decay_steps=max(steps, 1),
  )
  return lambda count: options.learning_rate * unit(count)


def adamw(
  options: OptimisationOptions, steps: int
) -> optax.GradientTransformation:
  """Returns the optimizer of the parameters that descend the loss."""
  return optax.chain(
    optax.clip_by_global_norm(options.max_grad_norm)
    if options.max_grad_norm
    else optax.identity(),
    optax.adamw(schedule(options, steps), weight_decay=options.weight_decay),
  )
