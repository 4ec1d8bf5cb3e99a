"""Finds where a traced model multiplies by its weights.

`find_sites` follows each weight through the traced program to the marks of a
`_marking.Finder`. Nothing is computed and nothing is allocated.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
from typing import Any

from jax.extend import core as programs
import jax.numpy as jnp

from bilora_jax import _marking
from bilora_jax._site import Path, Site

# An embedding's table is looked up. A tied head multiplies by its transpose,
# but an adapter there would miss the look-ups.
_NOT_ADAPTED = ("embedding",)
_SLICES = ("slice", "dynamic_slice")
_SAME = ("convert_element_type", "copy", "sharding_constraint", "name")
# The parameters of JAX's equations that hold the program of a call.
_PROGRAMS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def find_sites(
  program: programs.ClosedJaxpr, shapes: Mapping[Path, Any]
) -> tuple[dict[Path, Site], dict[Path, str]]:
  """Finds all weights that can have adapters.

  Args:
    program: the model's program, traced under a `_marking.Finder`; its first
      inputs are the parameters.
    shapes: shapes of the parameters, in the order of these inputs.

  Returns:
    The sites by path; and, for weights in products that cannot be adapted, the
    reasons by path.
  """
  uses = _Uses()
  weights: list[_Weight | None] = [_Weight(path) for path in shapes]
  rest = len(program.jaxpr.invars) - len(weights)
  uses.follow(program.jaxpr, weights + [None] * rest)
  sites, unfit = {}, {}
  for path, products in uses.products.items():
    if path[-1] in _NOT_ADAPTED:
      continue
    found = {_site(path, tuple(shapes[path].shape), x) for x in products}
    if any(x.altered for x in products):
      unfit[path] = (
        "it is reshaped, cut or scaled before its product, or scanned along "
        "another axis than the first"
      )
    elif None in found:
      unfit[path] = (
        "it is mapped over another axis than the first, or all its axes have "
        "the same size, so that the mapped axis is unknown"
      )
    elif len(found) > 1:
      unfit[path] = "its products differ in their axes or dtypes"
    elif path in uses.others:
      unfit[path] = (
        "it is used not only in products, but also in "
        f"{', '.join(sorted(uses.others[path]))}"
      )
    else:
      sites[path] = found.pop()
  return sites, unfit


@dataclasses.dataclass(frozen=True)
class _Weight:
  """A parameter, or an array that was made from it.

  Attributes:
    scanned: number of leading axes that a scan or an index, as `w[0]`, removed.
    order: for each axis, its index among the remaining axes; None for all axes
      in order.
    cut: whether the first axis was sliced to one entry, before it is removed.
    altered: whether the array was changed in another way, except for casts and
      transposes.
  """

  path: Path
  scanned: int = 0
  order: tuple[int, ...] | None = None
  cut: bool = False
  altered: bool = False

  def sliced(self) -> "_Weight":
    """One entry of the first axis."""
    if self.order or self.cut:
      return dataclasses.replace(self, altered=True)
    return dataclasses.replace(self, scanned=self.scanned + 1)

  def transposed(self, order: Sequence[int]) -> "_Weight":
    axes = tuple(self.order[i] if self.order else i for i in order)
    if axes == tuple(range(len(axes))):
      return dataclasses.replace(self, order=None)
    return dataclasses.replace(self, order=axes)


@dataclasses.dataclass(frozen=True)
class _Product:
  """A product with a weight, seen inside of scans.

  Attributes:
    shape: shape of the weight before it is transposed.
    batch: batch axes of that shape.
    contracted: contracted axes of that shape.
    remaining: other axes of that shape.
  """

  shape: tuple[int, ...]
  batch: tuple[int, ...]
  contracted: tuple[int, ...]
  remaining: tuple[int, ...]
  convolution: bool
  dtype: str
  scanned: int
  altered: bool


class _Uses:
  """The uses of a program's parameters.

  Attributes:
    products: products with each parameter, by its path.
    others: names of other operations that read each parameter.
  """

  def __init__(self):
    self.products: dict[Path, set[_Product]] = {}
    self.others: dict[Path, set[str]] = {}

  def follow(
    self, program: Any, inputs: Sequence[_Weight | None]
  ) -> list[_Weight | None]:
    """Records all uses of weights in a program.

    Args:
      program: a jaxpr.
      inputs: the weights among its inputs; None for other inputs.

    Returns:
      The weights among its outputs; None for other outputs.
    """
    program = getattr(program, "jaxpr", program)
    known = {v: x for v, x in zip(program.invars, inputs) if x is not None}

    def weight(variable: Any) -> _Weight | None:
      literal = isinstance(variable, programs.Literal)
      return None if literal else known.get(variable)

    for equation in program.eqns:
      weights = [weight(x) for x in equation.invars]
      if any(weights):
        outputs = self._equation(equation, weights)
        known |= {
          v: x for v, x in zip(equation.outvars, outputs) if x is not None
        }
    return [weight(x) for x in program.outvars]

  def _equation(
    self, equation: Any, weights: list[_Weight | None]
  ) -> list[_Weight | None]:
    name, params = equation.primitive.name, equation.params
    first = weights[0]
    if name == "name" and params["name"].startswith(_marking.MARK):
      assert first is not None  # its only input
      product = _parsed(params["name"], first)
      self.products.setdefault(first.path, set()).add(product)
      return []
    if name in _SAME:
      return [first]
    if first is not None and not first.cut:
      if name == "transpose":
        return [first.transposed(params["permutation"])]
      if name in _SLICES and _is_one_entry(equation):
        return [dataclasses.replace(first, cut=True)]
    elif (
      first is not None and name == "squeeze" and params["dimensions"] == (0,)
    ):
      return [dataclasses.replace(first, cut=False).sliced()]
    if name == "scan":
      fixed, carry = _scan_sizes(equation)
      return self._loop(params["jaxpr"], weights, fixed, carry)
    if name == "while":
      self.follow(
        params["cond_jaxpr"],
        weights[: params["cond_nconsts"]]
        + weights[params["cond_nconsts"] + params["body_nconsts"] :],
      )
      weights = weights[params["cond_nconsts"] :]
      fixed = params["body_nconsts"]
      carry = len(weights) - fixed
      return self._loop(params["body_jaxpr"], weights, fixed, carry)
    if name == "cond":
      for branch in params["branches"]:
        self.follow(branch, weights[1:])
      return []
    for key in _PROGRAMS:
      inner = params.get(key)
      if inner is not None:
        inner = getattr(inner, "jaxpr", inner)
        if len(inner.invars) == len(weights):
          return self.follow(inner, weights)
    for used in filter(None, weights):
      if not used.altered:
        self.others.setdefault(used.path, set()).add(name)
    arrays = [w for w, x in zip(weights, equation.invars) if x.aval.ndim > 0]
    if len(arrays) > 1 or not arrays or arrays[0] is None:
      return []
    altered = dataclasses.replace(arrays[0], altered=True)
    return [altered] * len(equation.outvars)

  def _loop(
    self,
    program: Any,
    weights: list[_Weight | None],
    fixed: int,
    carry: int,
  ) -> list[_Weight | None]:
    """As `_equation`, for a loop with fixed, carried and sliced inputs."""
    carried = weights[fixed : fixed + carry]
    slices = [x and x.sliced() for x in weights[fixed + carry :]]
    outputs = self.follow(program, weights[: fixed + carry] + slices)
    for before, after in zip(carried, outputs):
      if before is not None and before != after:
        self.others.setdefault(before.path, set()).add("the carry of a loop")
    return outputs[:carry] + [
      x
      and dataclasses.replace(
        x, scanned=x.scanned - 1, altered=x.altered or x.order is not None
      )
      for x in outputs[carry:]
    ]


def _is_one_entry(equation: Any) -> bool:
  """Whether a slice takes one entry of the first axis and all other axes."""
  whole, part = (x[0].aval.shape for x in (equation.invars, equation.outvars))
  return part == (1, *whole[1:])


def _scan_sizes(equation: Any) -> tuple[int, int]:
  """The numbers of fixed and of carried inputs of a scan.

  Sliced inputs have one axis more outside of the scan than inside. (JAX 0.12
  stores these numbers in another form than earlier versions.)
  """
  program = equation.params["jaxpr"]
  program = getattr(program, "jaxpr", program)

  def whole(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    pairs = zip(outside, inside)
    return sum(x.aval.ndim == y.aval.ndim for x, y in pairs)

  carry = whole(equation.outvars, program.outvars)
  return whole(equation.invars, program.invars) - carry, carry


def _parsed(mark: str, weight: _Weight) -> _Product:
  note = json.loads(mark.removeprefix(_marking.MARK))
  axes = range(len(note["shape"]))
  # Axes of a map come first in the order; the layer does not see them.
  mapped = len(weight.order) - len(axes) if weight.order else 0
  order = tuple(i - mapped for i in (weight.order or axes)[mapped:])
  used = {*note["batch"], *note["contracted"]}

  def before(transposed_axes: Iterable[int]) -> tuple[int, ...]:
    return tuple(order[axis] for axis in transposed_axes)

  return _Product(
    shape=tuple(note["shape"][order.index(axis)] for axis in axes)
    if min(order, default=0) >= 0
    else (),
    batch=before(note["batch"]),
    contracted=before(note["contracted"]),
    remaining=before(axis for axis in axes if axis not in used),
    convolution=note["convolution"],
    dtype=note["dtype"],
    scanned=weight.scanned,
    altered=weight.altered or weight.cut or min(order, default=0) < 0,
  )


def _site(path: Path, shape: tuple[int, ...], product: _Product) -> Site | None:
  # A scan removes its axes; a map does not.
  scanned = len(shape) - len(product.shape)
  if scanned < product.scanned or shape[scanned:] != product.shape:
    return None
  if scanned > product.scanned and len(set(shape[scanned - 1 :])) == 1:
    return None  # any of these axes may be mapped over

  def outside(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(scanned + axis for axis in axes)

  return Site(
    path=path,
    shape=shape,
    scanned=scanned,
    batch=outside(product.batch),
    contracted=outside(product.contracted),
    remaining=outside(product.remaining),
    convolution=product.convolution,
    dtype=jnp.dtype(product.dtype),
  )
