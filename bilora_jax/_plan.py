"""`Plan`: the decisions of `adapt`, and checks of variables and adapters."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import traverse_util
import jax

from bilora_jax import _dora, _nodes, _partition, _quantised
from bilora_jax._factors import is_factors
from bilora_jax._site import Path, Site
from bilora_jax._spec import LoraSpec


@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
  """One adapted weight: its site, and the ranks and scale of its pairs.

  Attributes:
    form: storage of its kernel; None for floats.
  """

  site: Site
  rank: int
  auxiliary_rank: int
  scale: float
  dtype: Any
  form: _quantised.Form | None

  def rank_in(self, part: str) -> int:
    """The rank of the weight's pair in `primary` or `auxiliary`."""
    return self.rank if part == "primary" else self.auxiliary_rank

  def matrices(self, kernel: Any) -> jax.Array:
    """The weight's kernel as floats, `(*batch, in, out)`."""
    if self.form is not None:
      kernel = _quantised.dequantise(kernel)
    return self.site.matrices(kernel)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """The decisions of `adapt`.

  Attributes:
    spec: the spec that `adapt` was called with.
    weights: the weights with adapters, by path.
    parameters: shapes of all parameters of the model, by path.
  """

  spec: LoraSpec
  weights: Mapping[Path, AdaptedWeight]
  parameters: Mapping[Path, jax.ShapeDtypeStruct]

  @property
  def extra(self) -> list[Path]:
    """The paths of the parameters that are trained whole."""
    return [p for p in self.parameters if self.spec.is_extra("/".join(p))]

  def shapes(self, part: str) -> dict[Path, Any]:
    """The shapes in a part of the adapters, by path.

    Returns:
      For `extra`, shapes; otherwise `(shape of a, shape of b, scale)`.
    """
    wanted: dict[Path, Any] = {}
    if part == "extra":
      wanted = {path: self.parameters[path].shape for path in self.extra}
      for path, x in self.weights.items():
        if self.spec.dora:
          batch, _, size_out = x.site.outer_shape
          wanted[_dora.path_of(path)] = (*batch, size_out)
      return wanted
    for path, x in self.weights.items():
      batch, size_in, size_out = x.site.outer_shape
      if rank := x.rank_in(part):
        wanted[path] = (
          (*batch, size_in, rank),
          (*batch, rank, size_out),
          x.scale,
        )
    return wanted

  def check_adapters(
    self, adapters: Mapping[str, Any], *, whole: bool, any_kind: bool
  ) -> None:
    """As `Adapted.check`."""
    _partition.check_parts(adapters)
    wrong = []
    for part, tree in adapters.items():
      got = {p: _shape(x) for p, x in flatten(tree).items()}
      wanted = self.shapes(part)
      if any_kind:
        wanted |= {
          path: self.weights[path].site.outer_shape
          for path, node in flatten(tree).items()
          if path in self.weights and hasattr(node, "outer_shape")
        }
      wrong += [
        f"{part}/{'/'.join(path)}: {got.get(path, 'missing')}, expected "
        f"{wanted.get(path, 'nothing')}"
        for path in ({**wanted, **got} if whole or part != "extra" else got)
        if got.get(path) != wanted.get(path)
      ]
    if whole and "extra" not in adapters and self.shapes("extra"):
      wrong.append("extra: missing")
    if wrong:
      raise ValueError(
        "these adapters do not fit the model and its spec: "
        + "; ".join(wrong)
        + "."
      )

  def check_parameters(
    self, params: Mapping[Path, Any], *, as_floats: bool
  ) -> None:
    """Refuses parameters that are not the model's, or have another form.

    Args:
      params: parameters by path.
      as_floats: whether the expected form is floats, for any spec.

    Raises:
      ValueError: if there are mismatches; the message names each.
    """
    other = []
    for path, leaf in params.items():
      form = self.weights[path].form if path in self.weights else None
      stored = _quantised.form_of(leaf)
      wanted = "floats" if form is None or as_floats else str(form)
      if stored != wanted and path in self.parameters:
        other.append(f"{'/'.join(path)}: {stored}, expected {wanted}")
    if other:
      raise ValueError(
        f"the spec has base_dtype={self.spec.base_dtype!r}, but some of these "
        f"variables are stored in another form: {'; '.join(other)}. `quantize` "
        "of the same spec makes quantised variables from floats."
      )
    wrong = [
      f"{'/'.join(path)}: {_shape(params.get(path))}, expected {shape.shape}"
      for path, shape in self.parameters.items()
      if path not in params or _shape(params[path]) != shape.shape
    ]
    if wrong:
      raise ValueError(
        "these variables are not those of the adapted model: "
        + "; ".join(wrong)
        + "."
      )


def flatten(tree: Any) -> dict[Path, Any]:
  """A part of the adapters by path; adapters are leaves."""
  return traverse_util.flatten_dict(
    tree, is_leaf=lambda _, x: _nodes.is_adapter(x)
  )


def _shape(node: Any) -> Any:
  if is_factors(node):
    return tuple(node.a.shape), tuple(node.b.shape), node.scale
  if _nodes.is_adapter(node):
    return getattr(node, "outer_shape", type(node).__name__)
  return tuple(node.shape) if hasattr(node, "shape") else node
