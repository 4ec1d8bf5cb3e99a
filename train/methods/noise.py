"""Methods with noise in training: on factors, whole weights or logits."""

import dataclasses
from typing import Any

from ..options import option
from .spec import Apply, MethodSpec, baselines
from .trained import INPUT_AXES, WEIGHTS, primary


@dataclasses.dataclass(frozen=True)
class NoiseOptions:
  """The noise."""

  rho: float = option(0.05, least=0, below=1e6)
  """Standard deviation of the noise. For flat_lora it is relative to the size
  of the weights."""


def _merged(params: Any) -> Any:
  """Returns the weights of the adapted layers, without a perturbation."""
  import jax

  return jax.tree.map(
    lambda weight, pair: weight + pair.weight().reshape(weight.shape),
    params["weights"],
    params["trained"]["primary"],
  )


def _with_noise(options: NoiseOptions, apply: Apply) -> Apply:
  """Returns the model with noise on its logits in training."""
  import jax

  from ..models import chunks

  add_noise = baselines().output_noise(lambda logits: logits, options.rho)

  def read_noisy(keys, read, logits):
    own = jax.random.wrap_key_data(keys.reshape(-1, keys.shape[-1]))
    noisy = jax.vmap(add_noise)(own, logits.reshape(-1, logits.shape[-1]))
    return read(noisy.reshape(logits.shape))

  def with_noise(variables, trained, *inputs, rngs=None):
    if rngs is None:
      return apply(variables, trained, *inputs)
    # A new key, so that the noise does not depend on the dropout's draws.
    key = jax.random.fold_in(rngs["dropout"], 1)
    *others, read = inputs
    if not isinstance(read, chunks.Read):
      return add_noise(key, apply(variables, trained, *inputs, rngs=rngs))
    # Each token has its own key, so its noise does not depend on the number of
    # tokens that are read at a time.
    keys = jax.random.split(key, jax.tree.leaves(read)[0].shape[:2])
    noisy = chunks.Read(read_noisy, jax.random.key_data(keys), read)
    return apply(variables, trained, *others, noisy, rngs=rngs)

  return with_noise


SPECS = (
  MethodSpec(
    name="rwp",
    summary="one adapter; noise on its factors",
    options=NoiseOptions,
    estimator=lambda x: baselines().weight_noise(x.options.rho, primary),
  ),
  MethodSpec(
    name="rwp_full",
    summary="one adapter; noise on the whole weights",
    options=NoiseOptions,
    estimator=lambda x: baselines().weight_noise(x.options.rho, WEIGHTS),
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
    summary="one adapter; noise on the whole weights, scaled by the norms "
    "of their rows",
    options=NoiseOptions,
    estimator=lambda x: baselines().flat_lora(
      x.options.rho, x.steps, _merged, WEIGHTS, input_axes=INPUT_AXES
    ),
    perturbs_weights=True,
  ),
)
