"""Converts adapters of a changed base to adapters of the original base."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from bilora_jax import _partition
from bilora_jax._factors import Factors, is_factors
from bilora_jax._spec import LoraSpec


def on_original(
  spec: LoraSpec, adapters: Mapping[str, Any], start: Any
) -> tuple[LoraSpec, dict[str, Any]]:
  r"""Makes adapters for the original weights, of twice the rank.

  `pissa`, `olora` and `lora_ga` subtract the initial factors, a0 and b0, from
  the base. Since

  .. math::
    (W_0 - s a_0 b_0) + s a b
    = W_0 + s \begin{pmatrix} a & a_0 \end{pmatrix}
      \begin{pmatrix} b \\ -b_0 \end{pmatrix}

  the trained adapters can be saved, merged or given to PEFT with the published
  weights. PEFT converts its own adapters in the same way.

  Args:
    spec: the spec of the adapters.
    adapters: the trained adapters; the auxiliary and extra do not change.
    start: the primary that `pissa`, `olora` or `lora_ga` returned.

  Returns:
    The spec of rank 2 r1, for `adapt`, and its adapters.

  Raises:
    ValueError: if `start` does not have the primary's pairs and shapes, or the
      spec has `dora`, whose magnitudes belong to the changed base.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from bilora_jax import LoraSpec, adapt
    >>> from bilora_jax.initializers import on_original, pissa
    >>> model, x = nn.Dense(3), jnp.ones((2, 4))
    >>> adapted = adapt(model, LoraSpec(rank=1), x)
    >>> variables = model.init(jax.random.key(0), x)
    >>> base, adapters = pissa(
    ...   adapted, variables, adapted.init(jax.random.key(1), variables)
    ... )
    >>> start = adapters['primary']
    >>> adapters['primary'] = jax.tree.map(lambda w: w + 1, start)  # trained
    >>> spec, wider = on_original(adapted.spec, adapters, start)
    >>> y = adapt(model, spec, x).apply(variables, wider, x)
    >>> bool(jnp.allclose(y, adapted.apply(base, adapters, x), atol=1e-5))
    True

  References:
    Hugging Face PEFT, `src/peft/tuners/lora/model.py`,
    `subtract_mutated_init`.
  """
  _partition.check_parts(adapters)
  if spec.dora:
    raise ValueError(
      "dora's magnitudes scale the base that was trained on, so these adapters "
      "cannot be converted to another base; got a spec with dora=True."
    )
  wanted, got = map(_shapes, (adapters["primary"], start))
  wrong = [
    f"{'/'.join(path)}: {got.get(path, 'missing')}, expected "
    f"{wanted.get(path, 'nothing')}"
    for path in {**wanted, **got}
    if got.get(path) != wanted.get(path)
  ]
  if wrong:
    raise ValueError(
      "start is the primary before training, with the pairs and shapes of the "
      f"trained primary: {'; '.join(wrong)}."
    )

  def joined(pair: Factors, first: Factors) -> Factors:
    return Factors(
      jnp.concatenate([pair.a, first.a], axis=-1),
      jnp.concatenate([pair.b, -first.b], axis=-2),
      pair.scale,
    )

  pairs = jax.tree.map(joined, adapters["primary"], start, is_leaf=is_factors)
  doubled = _doubled(spec)
  parts = {**adapters, "primary": pairs}
  for part in {"primary", "auxiliary"} & set(parts):
    parts[part] = _scaled(doubled, parts[part])
  return doubled, parts


def _shapes(part: Mapping[str, Any]) -> dict[Any, Any]:
  """The shapes of each pair, by its path."""
  pairs: dict[Any, Any] = traverse_util.flatten_dict(
    part, is_leaf=lambda _, x: is_factors(x)
  )
  return {path: (pair.a.shape, pair.b.shape) for path, pair in pairs.items()}


def _scaled(spec: LoraSpec, part: Mapping[str, Any]) -> Any:
  """The pairs with the spec's scales, which may differ in the last bit."""
  pairs: dict[Any, Any] = traverse_util.flatten_dict(
    part, is_leaf=lambda _, x: is_factors(x)
  )
  for path, pair in pairs.items():
    match = spec.match("/".join(path[:-1]))
    if match is not None:
      pairs[path] = Factors(pair.a, pair.b, match[2])
  return traverse_util.unflatten_dict(pairs)


def _doubled(spec: LoraSpec) -> LoraSpec:
  """The spec with twice the ranks and the same scales."""
  more = math.sqrt(2) if spec.rslora else 2.0

  def sizes(rank: int, alpha: float) -> dict[str, Any]:
    return {"rank": 2 * rank, "alpha": more * alpha}

  targets = spec.targets
  if isinstance(targets, Mapping):
    targets = {
      pattern: {
        **overrides,
        **sizes(
          overrides.get("rank", spec.rank), overrides.get("alpha", spec.alpha)
        ),
      }
      for pattern, overrides in targets.items()
    }
  return dataclasses.replace(
    spec, targets=targets, **sizes(spec.rank, spec.alpha)
  )
