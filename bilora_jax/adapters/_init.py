"""New adapters of any kind, for the kernels that `adapt` found."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util
import jax

from bilora_jax import _patterns
from bilora_jax._adapted import Adapted
from bilora_jax._factors import is_factors
from bilora_jax.adapters import _kind


def init(
  key: jax.Array,
  adapted: Adapted,
  variables: Any,
  kinds: _kind.Kind | Mapping[str, _kind.Kind],
) -> dict[str, Any]:
  """Makes new adapters, which do not change the model's output.

  `Adapted.apply` and `Adapted.merge` take them like those of `Adapted.init`.

  Args:
    key: a JAX random key.
    adapted: the model, from `adapt`.
    variables: the model's.
    kinds: a kind, as `loha(rank=4)`; or a mapping from regular expressions for
      the paths in `adapted.targets` to kinds, as `{'.*query/kernel': ia3()}`.
      The first expression that matches counts. Kernels that match none have the
      pairs of `Adapted.init`.

  Returns:
    A dict of `primary`, `auxiliary`, and `extra`, if the spec has one.

  Raises:
    ValueError: if a pattern is not a regular expression, or no kernel gets its
      kind, or variables are not the model's.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from bilora_jax import LoraSpec, adapt, adapters
    >>> model, x = nn.Sequential([nn.Dense(8), nn.Dense(3)]), jnp.ones((2, 4))
    >>> adapted = adapt(model, LoraSpec(rank=2, auxiliary_rank=2), x)
    >>> variables = model.init(jax.random.key(0), x)
    >>> kinds = {'layers_0/.*': adapters.loha(rank=2)}
    >>> new = adapters.init(jax.random.key(1), adapted, variables, kinds)
    >>> [type(x['kernel']).__name__ for x in new['primary'].values()]
    ['LoHa', 'Factors']
    >>> adapted.apply(variables, new, x).shape
    (2, 3)
  """
  if not isinstance(kinds, Mapping):
    kinds = {".*": kinds}
  for pattern in kinds:
    _patterns.check(pattern)
  chosen = {
    path: next((p for p in kinds if _patterns.fullmatch(p, target)), None)
    for path, target in zip(adapted._plan.weights, adapted.targets)
  }
  idle = sorted(set(kinds) - set(chosen.values()))
  if idle:
    raise ValueError(
      f"no kernel gets the kinds of the patterns {idle}; the kernels are "
      f"{sorted(adapted.targets)}, and the first pattern that matches counts."
    )
  params = adapted._parameters(variables)
  adapters = adapted.init(key, variables)
  for part, part_key in zip(("primary", "auxiliary"), jax.random.split(key)):
    nodes = traverse_util.flatten_dict(
      adapters.get(part, {}), is_leaf=lambda _, x: is_factors(x)
    )
    keys = jax.random.split(part_key, len(chosen))
    for node_key, (path, pattern) in zip(keys, chosen.items()):
      if pattern is not None:
        kernel = adapted._plan.weights[path].matrices(params[path])
        nodes[path] = kinds[pattern](node_key, kernel)
    adapters[part] = traverse_util.unflatten_dict(nodes)
  return adapters
