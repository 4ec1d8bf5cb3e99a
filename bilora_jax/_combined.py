"""Combines base weights and adapters: as stand-ins for layers, or merged."""

from collections.abc import Mapping
from typing import Any
import zlib

import jax
import jax.numpy as jnp

from bilora_jax import _dora, _quantised
from bilora_jax._factors import Factors, is_factors
from bilora_jax._plan import Plan, flatten
from bilora_jax._site import Path, Site
from bilora_jax._stand_in import StandIn


def stand_ins(
  plan: Plan,
  params: Mapping[Path, Any],
  adapters: Mapping[str, Any],
  dropout_key: jax.Array | None,
) -> dict[Path, Any]:
  """Makes the values with which a model runs in place of some parameters.

  Args:
    plan: the plan of the model.
    params: all parameters of the base, by path.
    adapters: adapters that fit the plan, with or without the auxiliary.
    dropout_key: key for dropout of the adapters; None for no dropout.

  Returns:
    A `StandIn` for each adapted weight, and an array for each parameter of
    `extra`, by path.
  """
  pairs, gains = _joined(adapters)
  magnitudes, new = _extra(plan, params, adapters)
  for path, x in plan.weights.items():
    weight, pair, gain = params[path], pairs.get(path), gains.get(path)
    if x.form is None:
      weight = jnp.asarray(weight)
    if path in magnitudes:
      of_dora = _dora.gain(x.matrices(weight), pair, magnitudes[path])
      gain = of_dora if gain is None else of_dora * gain
    if pair is not None:
      pair = Factors(pair.a.astype(x.dtype), pair.b.astype(x.dtype), pair.scale)
    new[path] = StandIn(
      weight,
      pair,
      gain,
      None if dropout_key is None else _key_at(dropout_key, x.site),
      x.site,
      plan.parameters[path].dtype,
      plan.spec.dropout,
    )
  return new


def merged(
  plan: Plan,
  params: Mapping[Path, Any],
  adapters: Mapping[str, Any],
  *,
  donate: bool,
) -> dict[Path, Any]:
  """Makes the parameters that turn the base into the merged model.

  Args:
    plan: the plan of the model.
    params: all parameters of the base, by path.
    adapters: adapters that fit the plan.
    donate: whether each adapted kernel is deleted once it has been read.

  Returns:
    A kernel for each adapted weight, and an array for each parameter of
    `extra`, by path.
  """
  pairs, gains = _joined(adapters)
  magnitudes, new = _extra(plan, params, adapters)
  for path, x in plan.weights.items():
    if x.form is None:
      whole, dtype = params[path].astype(jnp.float32), params[path].dtype
    else:
      whole = _quantised.dequantise(params[path])
      dtype = plan.parameters[path].dtype
    if path in pairs:
      whole += x.site.kernel(pairs[path].weight())
    if path in magnitudes:
      matrices = _dora.scaled(x.site.matrices(whole), magnitudes[path])
      whole = x.site.kernel(matrices)
    if path in gains:
      matrices = x.site.matrices(whole) * gains[path][..., None, :]
      whole = x.site.kernel(matrices)
    new[path] = whole.astype(dtype)
    if donate:
      jax.block_until_ready(new[path])
      for array in jax.tree.leaves(params[path]):
        if isinstance(array, jax.Array):
          array.delete()
  return new


def _joined(
  adapters: Mapping[str, Any],
) -> tuple[dict[Path, Factors], dict[Path, jax.Array]]:
  """The pairs to add to kernels, and the gains of their outputs, by path."""
  pairs: dict[Path, Factors] = {}
  gains: dict[Path, jax.Array] = {}
  for part in ("primary", "auxiliary"):
    for path, node in flatten(adapters.get(part, {})).items():
      if hasattr(node, "gain"):
        gains[path] = gains.get(path, 1.0) + node.gain
        continue
      pair = node if is_factors(node) else node.factors()
      pairs[path] = pairs[path].join(pair) if path in pairs else pair
  return pairs, gains


def _extra(
  plan: Plan, params: Mapping[Path, Any], adapters: Mapping[str, Any]
) -> tuple[dict[Path, Any], dict[Path, Any]]:
  """Magnitudes by their kernels' paths, and new values of whole parameters.

  The values have the dtypes of the parameters.
  """
  magnitudes, others = _dora.split(
    flatten(adapters.get("extra", {})), plan.weights
  )
  return magnitudes, {
    path: leaf.astype(params[path].dtype) for path, leaf in others.items()
  }


def _key_at(key: jax.Array, site: Site) -> jax.Array:
  """The keys for dropout at a weight, one for each scanned layer."""
  site_key = jax.random.fold_in(key, zlib.crc32("/".join(site.path).encode()))
  layers = site.shape[: site.scanned]
  return jax.random.split(site_key, layers) if layers else site_key
