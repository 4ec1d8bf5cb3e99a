"""Compresses the kernels of linear layers: fewer bits, or fewer weights."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import qwix

import bilora_jax

from ..models import registry

Change = Callable[[jax.Array], jax.Array]

QUANTISED = ("int8", "nf4", "int3")
PRUNED = (0.3, 0.5)


def changes(
  model: nn.Module, inputs: tuple[Any, ...], kinds: tuple[str, ...]
) -> dict[str, Callable[[Any], Any]]:
  """Returns functions that compress the variables of a model, by name.

  The kind `quantised` has `int8` and `int3` with a scale for each output
  channel, and `nf4` with a scale for each 64 weights along the input. The
  largest magnitude that shares a scale becomes the largest code. The kind
  `pruned` sets the weights of smallest magnitude in each kernel to 0.

  The functions change the kernels of all linear layers except the head. The
  results are floats, so one compiled model runs them all.

  Args:
    model: a model of a family, without adapters.
    inputs: example inputs of the model.
    kinds: some of `quantised` and `pruned`.
  """
  tiles = {
    name: _tiles(model, inputs, size)
    for name, size in {"nf4": 64, "channel": None}.items()
  }
  found: dict[str, Callable[[Any], Any]] = {}
  if "quantised" in kinds:
    for bits in QUANTISED:
      own = tiles["nf4" if bits == "nf4" else "channel"]
      found[bits] = _over(
        {path: _rounded(bits, tile) for path, tile in own.items()}
      )
  if "pruned" in kinds:
    for share in PRUNED:
      found[f"pruned {share:.0%}"] = _over(
        dict.fromkeys(tiles["channel"], _pruned(share))
      )
  return found


def quantised(
  kernel: jax.Array, qtype: str, tile: tuple[int, ...]
) -> jax.Array:
  """Returns a kernel rounded to the values of a quantised type, float32.

  Args:
    kernel: a kernel of floats.
    qtype: Qwix's name of the type.
    tile: for each axis, how many weights share a scale.
  """
  sizes = dict(enumerate(tile))
  array = qwix.quantize(
    kernel.astype(jnp.float32),
    qtype,
    channelwise_axes=[axis for axis, size in sizes.items() if size == 1],
    tiled_axes={axis: size for axis, size in sizes.items() if size > 1},
    # By default, Qwix scales the largest magnitude to the largest integer code
    # plus a half.
    calibration_method=f"absmax,{_half_more(qtype)}",
  )
  return qwix.dequantize(array)


def pruned(kernel: jax.Array, share: float) -> jax.Array:
  """Returns a kernel whose smallest weights are 0.

  Args:
    kernel: a kernel of floats.
    share: the share of the weights that become 0, rounded to whole weights.
  """
  order = jnp.argsort(jnp.abs(kernel).ravel())
  kept = jnp.ones(kernel.size, bool)
  kept = kept.at[order[: round(share * kernel.size)]].set(False)
  return kernel * kept.reshape(kernel.shape)


def _half_more(qtype: str) -> float:
  if not qtype.startswith("int"):
    return 1.0
  largest = 2 ** (int(qtype[3:]) - 1) - 1
  return (largest + 0.5) / largest


def _rounded(qtype: str, tile: tuple[int, ...]) -> Change:
  return lambda kernel: quantised(kernel, qtype, tile)


def _pruned(share: float) -> Change:
  return lambda kernel: pruned(kernel, share)


def _over(by_path: Mapping[str, Change]) -> Callable[[Any], Any]:
  """Returns a function that changes the parameters at some paths."""

  @jax.jit
  def change(variables):
    flat: dict[str, Any] = traverse_util.flatten_dict(
      variables["params"], sep="/"
    )
    new = {path: of(flat[path]) for path, of in by_path.items()}
    params = traverse_util.unflatten_dict({**flat, **new}, sep="/")
    return {**variables, "params": params}

  return change


def _tiles(
  model: nn.Module, inputs: tuple[Any, ...], size: int | None
) -> dict[str, tuple[int, ...]]:
  """Returns, by kernels' paths, the tiles of weights that share a scale."""
  family = registry.family_of(model)
  adapted = bilora_jax.adapt(
    model,
    bilora_jax.LoraSpec(
      rank=1,
      alpha=1.0,
      targets=".*",
      exclude=family.own_head(model),
      extra="head/.*" if family.has_new_head else None,
      base_dtype="int8",
      tile_size=size,
    ),
    *inputs,
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  stored: dict[str, Any] = traverse_util.flatten_dict(
    jax.eval_shape(adapted.quantize, shapes)["params"], sep="/"
  )
  return {path: stored[path].scale_tile_shape for path in adapted.targets}
