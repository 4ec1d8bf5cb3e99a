"""Where `--method` takes the gradient: the baselines of `bilora_jax`."""

from collections.abc import Callable
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

import bilora_jax
from bilora_jax import baselines

from ..data.objectives import Objective
from ..run.config import Config

_OF_WEIGHTS = ("lora_full_sam", "rwp_full", "flat_lora")
_WEIGHTS = {"trained": False, "weights": True}
# Kernels here are (in, out), under scan with the layers in front.
_INPUT_AXES = (-2,)

Apply = Callable[..., jax.Array]


def build(
  config: Config, steps: int, apply: Apply, objective: Objective
) -> baselines.GradientEstimator:
  """The estimator of a method.

  Args:
    config: names the method, and has its radii and shares.
    steps: optimizer steps of the whole run.
    apply: `(variables, trained, *inputs, rngs=None)` to the logits.
    objective: what is learned from a batch.
  """
  rho = config.rho
  match config.method:
    case "full_sam":
      return baselines.sam(rho)
    case "lora_sam":
      return baselines.sam(rho, _primary)
    case "lora_asam":
      return baselines.sam(rho, _primary, adaptive=True)
    case "lora_full_sam":
      return baselines.sam(rho, _WEIGHTS)
    case "looksam":
      return baselines.looksam(
        rho, config.sam_every, config.sam_reuse, _primary
      )
    case "esam":
      return baselines.esam(
        rho,
        _losses(apply, objective),
        lambda args, index: _rows(objective, args, index),
        weight_fraction=config.weight_fraction,
        sample_fraction=config.sample_fraction,
        mask=_primary,
      )
    case "s2sam":
      return baselines.s2sam(rho, _primary)
    case "wsam":
      return baselines.wsam(rho, config.sharpness_weight, _primary)
    case "rwp":
      return baselines.weight_noise(rho, _primary)
    case "rwp_full":
      return baselines.weight_noise(rho, _WEIGHTS)
    case "flat_lora":
      return baselines.flat_lora(
        rho, steps, _merged, _WEIGHTS, input_axes=_INPUT_AXES
      )
  return baselines.gradient()


def gradients(config: Config) -> float:
  """Gradients over a whole batch that a step takes, in the mean.

  ESAM's is 1 and its share of the rows, and a forward pass beside.
  """
  match config.method:
    case "lora_sam" | "lora_asam" | "lora_full_sam" | "full_sam" | "wsam":
      return 2.0
    case "looksam":
      return 1 + 1 / config.sam_every
    case "esam":
      return 1 + config.sample_fraction
  return 1.0


def weights(
  config: Config, adapted: bilora_jax.Adapted | None
) -> Callable[[Any], Any] | None:
  """From the variables to the frozen weights that the method perturbs.

  Raises:
    ValueError: if it perturbs them and they are quantised.
  """
  if config.method not in _OF_WEIGHTS:
    return None
  assert adapted is not None
  if config.quantised:
    raise ValueError(
      f"--method {config.method} perturbs the frozen weights, which have to be "
      f"floats; got --base-dtype {config.base_dtype}."
    )
  return kernels(adapted)


def kernels(adapted: bilora_jax.Adapted) -> Callable[[Any], Any]:
  """From the variables to the weights with adapters, nested as they are."""
  paths = {tuple(path.split("/")) for path in adapted.targets}

  def select(variables):
    flat = traverse_util.flatten_dict(variables["params"])
    return traverse_util.unflatten_dict({path: flat[path] for path in paths})

  return select


def noisy(config: Config, apply: Apply) -> Apply:
  """The model, with noise on the logits in training, for `rop`."""
  if config.method != "rop":
    return apply

  add_noise = baselines.output_noise(lambda logits: logits, config.rho)

  def with_noise(variables, trained, *inputs, rngs=None):
    logits = apply(variables, trained, *inputs, rngs=rngs)
    if rngs is None:
      return logits
    # Not the dropout's own draws.
    key = jax.random.fold_in(rngs["dropout"], 1)
    return add_noise(key, logits)

  return with_noise


def _primary(trained: Any) -> dict[str, bool]:
  """What LoRA-SAM and its kin perturb: adapters, and no head."""
  return {part: part == "primary" for part in trained}


def _losses(apply: Apply, objective: Objective) -> Callable[..., jax.Array]:
  def losses(trained, variables, batch, total, key):
    logits = apply(
      variables, trained, *objective.inputs(batch), rngs={"dropout": key}
    )
    items = objective.items(logits, batch)
    of_rows = (items.losses * items.weights).reshape(len(logits), -1).sum(-1)
    return of_rows * (len(logits) / total)  # whose mean is the step's loss

  return losses


def _rows(objective: Objective, args: Any, index: jax.Array) -> Any:
  """The arguments of the step's loss, for some rows of the batch."""
  variables, batch, _, key = args
  batch = jax.tree.map(lambda x: x[index], batch)
  return variables, batch, jnp.maximum(objective.weights(batch).sum(), 1), key


def _merged(params: Any) -> Any:
  """The weights that the adapted layers multiply by, without a perturbation."""
  return jax.tree.map(
    lambda weight, pair: weight + pair.weight().reshape(weight.shape),
    params["weights"],
    params["trained"]["primary"],
  )
