"""Where a model multiplies by its weights, and adapters added there, by Qwix.

A `Site` is a weight that can have adapters. Sites are found by tracing the
model abstractly; nothing is computed and nothing is allocated.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import inspect
import math
import os
import re
from typing import Any

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import opt_einsum.parser
import qwix

from bilora_jax import _quantised, _stand_in

# An embedding's table is looked up, not multiplied by; a tied head does
# multiply, by the transpose, and an adapter there would miss the look-ups.
_NOT_ADAPTED = ("embedding",)
_A, _B = "_lora_a", "_lora_b"
_TRANSPARENT = ("convert_element_type", "sharding_constraint")
# Of `flax.linen.Module`, where a model is entered.
_ENTRIES = ("apply", "init_with_output")

# Where the frames of jitted functions are JAX's own.
_PJIT = os.path.join(os.path.dirname(jax.__file__), "_src", "pjit.py")

Path = tuple[str, ...]
Trace = Callable[[qwix.QuantizationProvider], Mapping[Path, Any]]


@dataclasses.dataclass(frozen=True)
class Site:
  """A weight, and how its layer multiplies by it.

  Attributes:
    path: of the weight, as `('layers', 'query', 'kernel')`.
    shape: of the weight, with leading scanned axes.
    scanned: how many leading axes are scanned layers.
    batch: axes of the weight that are batched over, as experts.
    contracted: axes of the weight that are summed over with the input.
    remaining: axes of the weight that become the output's.
    flat: whether Qwix holds the contracted axes of `lora_a` as one.
    dtype: what the layer computes in.
  """

  path: Path
  shape: tuple[int, ...]
  scanned: int
  batch: tuple[int, ...]
  contracted: tuple[int, ...]
  remaining: tuple[int, ...]
  flat: bool
  dtype: Any

  @property
  def outer_shape(self) -> tuple[tuple[int, ...], int, int]:
    """`(*batch)`, `in` and `out` of the pair that adapts this weight."""
    return (
      self._sizes((*range(self.scanned), *self.batch)),
      math.prod(self._sizes(self.contracted)),
      math.prod(self._sizes(self.remaining)),
    )

  def names(self) -> tuple[Path, Path]:
    """The paths at which Qwix looks for `lora_a` and `lora_b`."""
    *module, weight = self.path
    return (*module, weight + _A), (*module, weight + _B)

  def leaf_shapes(self, rank: int) -> list[tuple[int, ...]]:
    """The shapes that Qwix wants of them."""
    batch, size_in, size_out = self.outer_shape
    sizes = (size_in,) if self.flat else self._sizes(self.contracted)
    return [(*batch, *sizes, rank), (*batch, rank, size_out)]

  def kernel(self, weight: jax.Array) -> jax.Array:
    """A weight `(*batch, in, out)` with the axes of the kernel."""
    order = self._order
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return weight.reshape(self._sizes(order)).transpose(inverse)

  def matrices(self, kernel: jax.Array) -> jax.Array:
    """Undoes `kernel`: the kernel as `(*batch, in, out)`."""
    batch, size_in, size_out = self.outer_shape
    return kernel.transpose(self._order).reshape(*batch, size_in, size_out)

  def tiles(self, tile_size: int | None) -> tuple[int, ...]:
    """Sizes of the kernel's tiles, as `_quantised.tile_sizes` cuts them."""
    sizes = _quantised.tile_sizes(self._sizes(self.contracted), tile_size)
    along = dict(zip(self.contracted, sizes))
    return tuple(along.get(axis, 1) for axis in range(len(self.shape)))

  @property
  def _order(self) -> tuple[int, ...]:
    """The kernel's axes: those of the batch, of `in`, and of `out`."""
    batch = (*range(self.scanned), *self.batch)
    return (*batch, *self.contracted, *self.remaining)

  def _sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(self.shape[axis] for axis in axes)


@dataclasses.dataclass(frozen=True)
class _Use:
  """A product with a weight, as the provider sees it: inside of scans."""

  shape: tuple[int, ...]
  batch: tuple[int, ...]
  contracted: tuple[int, ...]
  flat: bool
  dtype: Any
  as_stored: bool


class Provider(qwix.LoraProvider, _stand_in.Products):
  """Qwix's provider, with einsums as products, and none in jitted functions.

  Qwix 0.1.8 cannot adapt an einsum in Linen (it sets an attribute on a frozen
  module), and refuses one of three operands even in modules that nobody asked
  to adapt. It adapts inside of jitted functions, `@` being one, whose traces
  JAX keeps: the adapters would then be in every product of these shapes.
  """

  def __init__(self, rules: Sequence[qwix.QuantizationRule]):
    def zeros(_, shape, dtype):
      return jnp.zeros(shape, self._dtype or dtype)

    super().__init__(
      rules=[
        dataclasses.replace(rule, lora_a_initializer=zeros)
        if isinstance(rule, qwix.LoraRule)
        else rule
        for rule in rules
      ]
    )
    self._dtype: Any = None

  def dot_general(
    self,
    lhs,
    rhs,
    dimension_numbers,
    precision=None,
    preferred_element_type=None,
    out_sharding=None,
  ):
    # Adapters may compute in more bits than their layer, that is not to show.
    plain = preferred_element_type or jnp.result_type(lhs, rhs.dtype)
    args = (dimension_numbers, precision, preferred_element_type)
    known = self.known(rhs)
    if _in_jitted_function():
      return super(qwix.LoraProvider, self).dot_general(
        lhs, known, *args, out_sharding=out_sharding
      )
    result = super().dot_general(lhs, known, *args, out_sharding=out_sharding)
    (_, contracted), (_, batch) = dimension_numbers
    self._record("dot_general", lhs, rhs, tuple(batch), tuple(contracted), True)
    sizes = [
      size
      for axis, size in enumerate(rhs.shape)
      if axis not in (*contracted, *batch)
    ]
    result = _stand_in.scaled(result, rhs, len(batch), sizes)
    return result.astype(plain)

  def einsum(self, einsum_str, *operands, **kwargs):
    rule, _ = self._get_current_rule_and_op_id("einsum", only_rule=True)
    product = _as_product(einsum_str, *operands)
    ours = isinstance(rule, qwix.LoraRule) or any(
      isinstance(x, _stand_in.StandIn) for x in operands
    )
    if not ours or product is None or _in_jitted_function():
      return super(qwix.LoraProvider, self).einsum(
        einsum_str,
        *operands,  # pyright: ignore[reportArgumentType]
        **kwargs,
      )
    dimension_numbers, order = product
    result = self.dot_general(
      *operands,
      dimension_numbers,  # pyright: ignore[reportCallIssue]
      precision=kwargs.get("precision"),
      preferred_element_type=kwargs.get("preferred_element_type"),
    )
    return result.transpose(order)

  def conv_general_dilated(self, lhs, rhs, *args, **kwargs):
    # Of a grouped convolution, the groups would have to divide the rank, and
    # the adapter would not be a product of two factors.
    known = self.known(rhs)
    if kwargs.get("feature_group_count", 1) > 1 or _in_jitted_function():
      return super(qwix.LoraProvider, self).conv_general_dilated(
        lhs, known, *args, **kwargs
      )
    # XLA convolves arrays of one dtype, and Qwix asks for the stored kernel's.
    self._dtype = lhs.dtype
    result = super().conv_general_dilated(lhs, known, *args, **kwargs)
    self._dtype = None
    contracted = tuple(range(len(rhs.shape) - 1))
    self._record("conv_general_dilated", lhs, rhs, (), contracted, False)
    return _stand_in.scaled(result, rhs, 0, rhs.shape[-1:])

  def _record(self, op, lhs, rhs, batch, contracted, flat):
    """Is told of each product with a weight."""


class _Recorder(Provider):
  """A provider that records how weights are used. It holds on to tracers."""

  def __init__(self, rules: Sequence[qwix.QuantizationRule]):
    super().__init__(rules)
    self.uses: dict[str, set[_Use]] = {}
    self._params: list[Any] = []

  def nn_param(self, *args, **kwargs):
    param = super().nn_param(*args, **kwargs)
    self._params.append(param)
    return param

  def _record(self, op, lhs, rhs, batch, contracted, flat):
    rule, _ = self._get_current_rule_and_op_id(op, only_rule=True)
    if isinstance(rule, qwix.LoraRule):
      use = _Use(
        tuple(rhs.shape),
        batch,
        contracted,
        flat,
        lhs.dtype,
        self._is_as_stored(rhs),
      )
      self.uses.setdefault(rule.module_path, set()).add(use)

  def _is_as_stored(self, weight: Any) -> bool:
    """Whether nothing but casts is between a traced weight and its parameter.

    Qwix follows a tracer back to a parameter, through transposes too.
    """
    while not any(weight is param for param in self._params):
      parent = getattr(weight, "parent", None)
      if parent is None or not parent.in_tracers:
        return True
      if parent.primitive.name not in _TRANSPARENT:
        return False
      weight = parent.in_tracers[0]
    return True


def find_sites(trace: Trace) -> tuple[dict[Path, Site], set[Path]]:
  """All weights that adapters can be put on.

  Args:
    trace: runs the model abstractly under a provider, and returns all its
      parameters' shapes by path, those of adapters included.

  Returns:
    The sites by path; and the weights that Qwix would adapt but whose use is
    not as they are stored: transposed, reshaped, used in two ways, or scanned
    along another axis than the first.
  """
  everywhere = qwix.LoraRule(module_path=".*", rank=1, alpha=1.0)
  weights = [
    (*path[:-1], path[-1].removesuffix(_A))
    for path in trace(Provider([everywhere]))
    if path[-1].endswith(_A)
  ]
  weights = [path for path in weights if path[-1] not in _NOT_ADAPTED]
  # A rule for each module, so that its uses are recorded under its own name.
  modules = dict.fromkeys(re.escape("/".join(path[:-1])) for path in weights)
  provider = _Recorder(
    [qwix.LoraRule(module_path=m, rank=1, alpha=1.0) for m in modules]
  )
  shapes = trace(provider)
  sites = {}
  for path in weights:
    uses = provider.uses.get(re.escape("/".join(path[:-1])), set())
    fitting = {
      site
      for site in (_site(path, shapes[path].shape, use) for use in uses)
      if site is not None
      and [shapes[name].shape for name in site.names()] == site.leaf_shapes(1)
    }
    altered = any(
      not use.as_stored and shapes[path].shape[-len(use.shape) :] == use.shape
      for use in uses
    )
    if len(fitting) == 1 and not altered:
      sites[path] = fitting.pop()
  return sites, set(weights) - set(sites)


def provider_for(
  ranks: Mapping[Path, int], scales: Mapping[Path, float], dropout: float
) -> Provider:
  """A provider that adapts some weights.

  Args:
    ranks: of the adapters, by the weight's path.
    scales: what their products are multiplied by, likewise.
    dropout: the rate at the input of every adapter.
  """
  modules: dict[tuple[int, float], dict[str, None]] = {}
  for path, rank in ranks.items():
    modules.setdefault((rank, scales[path]), {})[
      re.escape("/".join(path[:-1]))
    ] = None
  return Provider(
    [
      qwix.LoraRule(
        module_path="|".join(names),
        rank=rank,
        alpha=scale * rank,
        dropout=dropout,
      )
      for (rank, scale), names in modules.items()
    ]
  )


def _site(path: Path, shape: tuple[int, ...], use: _Use) -> Site | None:
  scanned = len(shape) - len(use.shape)
  if scanned < 0 or shape[scanned:] != use.shape:
    return None
  used = {*use.batch, *use.contracted}
  remaining = (i for i in range(len(use.shape)) if i not in used)

  def outside(axes):
    return tuple(scanned + axis for axis in axes)

  return Site(
    path=path,
    shape=tuple(shape),
    scanned=scanned,
    batch=outside(use.batch),
    contracted=outside(use.contracted),
    remaining=outside(remaining),
    flat=use.flat,
    dtype=use.dtype,
  )


def _in_jitted_function() -> bool:
  """Whether JAX traces a jitted function that the model called.

  A jitted method of an NNX module is none: its trace is the module's own.
  """
  frame = inspect.currentframe()
  jitted = False
  while frame is not None:
    module = frame.f_locals.get("self")
    if isinstance(module, nnx.Module) or (
      isinstance(module, nn.Module) and frame.f_code.co_name in _ENTRIES
    ):
      return jitted
    jitted |= frame.f_code.co_filename == _PJIT
    frame = frame.f_back
  return False


def _as_product(einsum_str: str, *operands: Any):
  """An einsum of two operands as a `dot_general` and a transpose, or None."""
  if len(operands) != 2:
    return None
  inputs, out, _ = opt_einsum.parser.parse_einsum_input(
    (einsum_str, *(operand.shape for operand in operands)), shapes=True
  )
  lhs, rhs = inputs.split(",")
  shared = [letter for letter in rhs if letter in lhs]
  batch = [letter for letter in shared if letter in out]
  contracted = [letter for letter in shared if letter not in out]
  free = [letter for letter in lhs + rhs if letter not in shared]
  result = [*batch, *free]
  repeats = any(len(set(term)) < len(term) for term in (lhs, rhs))
  if repeats or sorted(result) != sorted(out):
    return None
  dimension_numbers = tuple(
    tuple(tuple(map(term.index, letters)) for term in (lhs, rhs))
    for letters in (contracted, batch)
  )
  return dimension_numbers, tuple(map(result.index, out))
