"""Names of the axes of adapters and of quantised kernels, from the kernels'."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util
import jax
from jax.sharding import PartitionSpec

from bilora_jax import _dora, _nodes, _quantised
from bilora_jax._factors import Factors, is_factors
from bilora_jax._plan import Plan, flatten
from bilora_jax._site import Path


def of_quantised(plan: Plan, axes: Mapping[Path, Any]) -> dict[Path, Any]:
  """Makes a `qwix.QArray` of names for each kernel that the spec quantises.

  Args:
    plan: the plan of the model.
    axes: a `PartitionSpec` for each parameter, by path.
  """
  new = {}
  for path, x in plan.weights.items():
    if x.form is not None:
      shape = x.form.scale_shape(x.site.shape)
      names = _quantised.scale_axes(axes[path], shape)
      new[path] = x.form.array(axes[path], PartitionSpec(*names))
  return new


def of_adapters(
  plan: Plan,
  names: Mapping[Path, tuple[Any, ...]],
  adapters: Mapping[str, Any],
) -> dict[str, Any]:
  """`Adapted.partition_specs`, from the names of the parameters' axes."""

  def of_kernel(path: Path) -> Factors:
    x = plan.weights[path]
    axes = names.get(path, (None,) * len(x.site.shape))
    batch = [axes[i] for i in (*range(x.site.scanned), *x.site.batch)]
    first = [
      axes[sides[0]] if sides else None
      for sides in (x.site.contracted, x.site.remaining)
    ]
    return Factors(
      PartitionSpec(*batch, first[0], None),
      PartitionSpec(*batch, None, first[1]),
      x.scale,
    )

  result = {}
  for part, tree in adapters.items():
    flat = {
      path: of_kernel(path)
      if is_factors(leaf)
      else jax.tree.map(lambda _: PartitionSpec(), leaf)
      if _nodes.is_adapter(leaf)
      else PartitionSpec(*names.get(path, ()))
      for path, leaf in flatten(tree).items()
    }
    for path in plan.weights:
      if part == "extra" and _dora.path_of(path) in flat:
        *batch, _, last = of_kernel(path).b
        flat[_dora.path_of(path)] = PartitionSpec(*batch, last)
    result[part] = traverse_util.unflatten_dict(flat)
  return result
