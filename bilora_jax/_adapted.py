"""`Adapted`: a Linen or NNX model with low-rank adapters, as pure functions."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from bilora_jax import (
  _axes,
  _combined,
  _dora,
  _hosts,
  _partition,
  _plan,
  _quantised,
  _unmatched,
)
from bilora_jax._factors import Factors
from bilora_jax._site import Path
from bilora_jax._spec import LoraSpec


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
  """A model with adapters; made by `adapt`.

  Adapters are a dict of `primary`, `auxiliary` and `extra`. The first two are
  nested dicts of `Factors` that mirror the parameters, as
  ``{'layer': {'query': {'kernel': Factors}}}``; `extra` holds the parameters
  that are trained whole. An empty part is left out. In place of any pair,
  `apply`, `merge` and `partition_specs` also take an adapter of another kind,
  made by `bilora_jax.adapters.init`.

  If the spec has a `base_dtype`, the methods take the variables that `quantize`
  returns, in which each adapted kernel is a `qwix.QArray`.

  Attributes:
    skipped: the reason for each weight that matches the default targets but
      cannot be adapted, by path.
  """

  _host: _hosts.Host
  _plan: _plan.Plan
  skipped: Mapping[str, str]

  def __repr__(self) -> str:
    names = list(self.targets)
    more = ", ..." if len(names) > 2 else ""
    return (
      f"Adapted({len(names)} weights: {', '.join(map(repr, names[:2]))}{more}; "
      f"rank={self.spec.rank}, auxiliary_rank={self.spec.auxiliary_rank})"
    )

  @property
  def spec(self) -> LoraSpec:
    """The spec that `adapt` was called with."""
    return self._plan.spec

  @property
  def targets(self) -> dict[str, tuple[int, ...]]:
    """The paths of the adapted weights, and their shapes."""
    return {"/".join(p): x.site.shape for p, x in self._plan.weights.items()}

  def train(self) -> "Adapted":
    """Returns a copy for training, as `model.train()` sets an NNX model.

    Dropout is on and takes its keys from `rngs`; BatchNorm uses the batch's
    statistics.

    Raises:
      ValueError: for a Linen model, whose call takes the mode as an argument.
    """
    return dataclasses.replace(self, _host=self._host.in_mode(training=True))

  def eval(self) -> "Adapted":
    """Returns a copy for evaluation, as `model.eval()` sets an NNX model.

    Dropout is off, also in the adapters; BatchNorm uses its running averages.

    Raises:
      ValueError: for a Linen model, whose call takes the mode as an argument.
    """
    return dataclasses.replace(self, _host=self._host.in_mode(training=False))

  def quantize(self, variables: Any, *, donate: bool = False) -> Any:
    """Quantises the adapted kernels to the spec's `base_dtype`.

    The largest magnitude of each tile becomes the largest code; the tile's
    scale, in float32, maps codes back to floats. All other parameters stay
    unchanged: embeddings, norms, heads, biases, and kernels without adapters.
    Kernels are quantised one after the other, on their devices; under
    `jax.jit`, all at once.

    Args:
      variables: the model's: Linen's collections, or `nnx.state(model)`.
      donate: whether each float kernel on a device is deleted once it has
        been read, so that memory never holds more than the variables and one
        kernel; not under `jax.jit`, which has its own donation.

    Returns:
      Variables for the other methods, with metadata kept.

    Raises:
      ValueError: if the spec has no `base_dtype`, or `variables` are not those
        of the model, or are already quantised.
    """
    params = self._parameters(variables, as_floats=True)
    new = {}
    for path in self._plan.weights:
      new[path] = self.quantize_leaf("/".join(path), params[path])
      if donate and isinstance(params[path], jax.Array):
        jax.block_until_ready(new[path])
        params[path].delete()
    return self._host.replace(variables, new)

  def quantize_leaf(self, path: str, array: Any) -> Any:
    """Quantises one parameter, for loaders that read one at a time.

    Args:
      path: path of the parameter, as in `targets`.
      array: value of the parameter. On a mesh, codes and scales keep its
        sharding, but scales are replicated along an axis that has too few of
        them to divide.

    Returns:
      A `qwix.QArray` for an adapted kernel, and `array` for any other
      parameter.

    Raises:
      ValueError: if the spec has no `base_dtype`, the model has no such
        parameter, or the array has another shape.
    """
    if self.spec.base_dtype is None:
      raise ValueError(
        "the spec has base_dtype=None, with which kernels stay floats; "
        f"to quantise, set one of {', '.join(_quantised.QTYPES)}."
      )
    key = tuple(path.split("/"))
    expected = self._plan.parameters.get(key)
    if expected is None or expected.shape != array.shape:
      raise ValueError(
        f"{path} is not a parameter of the model, which has "
        f"{_unmatched.listed('/'.join(p) for p in self._plan.parameters)}."
        if expected is None
        else f"{path} has the shape {expected.shape}; got {tuple(array.shape)}."
      )
    if key not in self._plan.weights:
      return array
    form = self._plan.weights[key].form
    assert form is not None  # there is a base_dtype
    sharding = getattr(array, "sharding", None)
    return _quantised.quantise(
      array, form, _quantised.shardings(sharding, array.shape, form)
    )

  def quantized_axes(self, axes: Any) -> Any:
    """Names the axes of the variables that `quantize` returns.

    Args:
      axes: a tree like the float variables, of `jax.sharding.PartitionSpec`,
        as `nn.get_partition_spec` returns it.

    Returns:
      A tree like the quantised variables. Codes have the kernel's axis names;
      scales have them too, except on axes of size 1.
    """
    params = self._host.parameters(axes)
    return self._host.replace(axes, _axes.of_quantised(self._plan, params))

  def init(self, key: jax.Array, variables: Any) -> dict[str, Any]:
    """Makes new adapters, which do not change the model's output.

    In each pair, `a` is uniform in `+-1/sqrt(in)` (Kaiming's initialisation
    with `a = sqrt(5)`, as in LoRA) and `b` is zero, both float32; primary and
    auxiliary draw from different keys. Only `extra` depends on the values of
    `variables`; with DoRA, `extra` includes the norms of the kernels' columns,
    `(*batch, out)`.

    Args:
      key: a JAX random key.
      variables: the model's: Linen's collections, or `nnx.state(model)`.

    Returns:
      The adapters, a dict of `primary`, `auxiliary` and `extra`.

    Raises:
      ValueError: if `variables` are not those of the model; the message names
        each mismatch.
    """
    params = self._parameters(variables)
    adapters: dict[str, Any] = {}
    for part, part_key in zip(("primary", "auxiliary"), jax.random.split(key)):
      keys = jax.random.split(part_key, len(self._plan.weights))
      pairs = {
        path: _new_pair(path_key, x, x.rank_in(part))
        for path_key, (path, x) in zip(keys, self._plan.weights.items())
        if x.rank_in(part)
      }
      if pairs:
        adapters[part] = traverse_util.unflatten_dict(pairs)
    extra = {
      path: jnp.array(params[path], jnp.float32) for path in self._plan.extra
    }
    if self.spec.dora:
      for path, x in self._plan.weights.items():
        kernel = x.matrices(params[path])
        extra[_dora.path_of(path)] = _dora.column_norms(kernel)
    if extra:
      adapters["extra"] = traverse_util.unflatten_dict(extra)
    return adapters

  def apply(
    self,
    variables: Any,
    adapters: Any,
    *args: Any,
    rngs: Mapping[str, jax.Array] | None = None,
    mutable: Any = False,
    method: Any = None,
    **kwargs: Any,
  ) -> Any:
    """Runs the model at `W0 + primary + auxiliary`, or `W0 + primary`.

    The two adapters are joined along the rank, so each layer computes two thin
    products, as with plain LoRA; with `primary(adapters)`, of rank r1.

    Args:
      variables: the model's: Linen's collections, or `nnx.state(model)`.
      adapters: from `init`, with or without the auxiliary.
      *args: arguments of the model.
      rngs: keys by name: Linen's rngs, or new keys for the streams of an NNX
        model. A `dropout` key turns the adapters' dropout on.
      mutable: as in Linen. For NNX, `True` returns `(output, variables)`:
        the variables with the state that the call changed, and the same
        parameters.
      method: as in Linen, one of the `methods` given to `adapt`.
      **kwargs: keyword arguments of the model.

    Returns:
      The model's output.

    Raises:
      ValueError: if adapters or variables are missing, unknown or of the wrong
        shape (the message names each), or the method has no adapters, or an
        NNX model that is not in `eval` mode draws from a stream without a key
        or changes its state without `mutable`.
    """
    self.check(adapters, any_kind=True)
    params = self._parameters(variables)
    key = None
    if self.spec.dropout and not self._host.evaluating:
      key = (rngs or {}).get("dropout")
    new = _combined.stand_ins(self._plan, params, adapters, key)
    return self._host.call(
      variables, new, args, kwargs, rngs=rngs, mutable=mutable, method=method
    )

  def merge(
    self,
    variables: Any,
    adapters: Any,
    *,
    donate: bool = False,
  ) -> Any:
    """Adds the primary to the variables: `W0 + scale * a @ b`.

    With DoRA, the columns of this sum are scaled to their magnitudes. Each sum
    is computed in float32 and cast once to the kernel's dtype. `extra` replaces
    the parameters that it was copied from. The auxiliary is dropped. Quantised
    kernels become floats again, in the dtype in which the model makes them
    (Flax's `param_dtype`).

    Args:
      variables: the model's.
      adapters: from `init`, with or without the auxiliary.
      donate: whether each adapted kernel is deleted once it has been read, so
        that memory never holds more than the variables and one kernel; not
        under `jax.jit`, which has its own donation.

    Returns:
      Variables for the model without adapters.

    Raises:
      ValueError: as `apply`.
    """
    adapters = _partition.without_auxiliary(adapters)
    self.check(adapters, any_kind=True)
    params = self._parameters(variables)
    new = _combined.merged(self._plan, params, adapters, donate=donate)
    return self._host.replace(variables, new)

  def partition_specs(
    self, variables: Any, adapters: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Derives the logical axes of adapters from those of the kernels.

    Args:
      variables: the model's, with `nn.Partitioned` boxes or NNX sharding
        metadata.
      adapters: the tree to describe; shapes suffice.

    Returns:
      A tree like `adapters`, of `jax.sharding.PartitionSpec`. Scanned and
      batched axes keep their names; `in` and `out` have the name of the first
      kernel axis that they combine; the rank is never sharded. Adapters that
      are not pairs are replicated.
    """
    names = self._host.logical_axes(variables)
    return _axes.of_adapters(self._plan, names, adapters)

  def check(
    self,
    adapters: Mapping[str, Any],
    *,
    whole: bool = True,
    any_kind: bool = False,
  ) -> None:
    """Refuses adapters that do not fit this model and spec.

    Args:
      adapters: from `init`, with or without the auxiliary.
      whole: whether `extra` must be complete, if the spec has one.
      any_kind: whether a kernel may have an adapter of another kind than the
        spec's pair, such as `adapters.LoHa`.

    Raises:
      ValueError: if anything does not fit; the message names every mismatch.
    """
    self._plan.check_adapters(adapters, whole=whole, any_kind=any_kind)

  def shapes(self, part: str) -> dict[Path, Any]:
    """The shapes in a part of the adapters, by path.

    Args:
      part: `'primary'`, `'auxiliary'` or `'extra'`.

    Returns:
      For `extra`, shapes; otherwise `(shape of a, shape of b, scale)`.
    """
    return self._plan.shapes(part)

  def _parameters(
    self, variables: Any, *, as_floats: bool = False
  ) -> dict[Path, Any]:
    """The parameters by path, after the plan's check."""
    params = self._host.parameters(variables)
    self._plan.check_parameters(params, as_floats=as_floats)
    return params


def _new_pair(
  key: jax.Array, weight: _plan.AdaptedWeight, rank: int
) -> Factors:
  a, b = _new_factors(key, weight.site.outer_shape, rank)
  return Factors(a, b, weight.scale)


# One program for all weights of a shape, where each operation was one.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _new_factors(
  key: jax.Array, shape: tuple[tuple[int, ...], int, int], rank: int
) -> tuple[jax.Array, jax.Array]:
  batch, size_in, size_out = shape
  bound = max(size_in, 1) ** -0.5
  a = jax.random.uniform(key, (*batch, size_in, rank), jnp.float32, -1, 1)
  return bound * a, jnp.zeros((*batch, rank, size_out), jnp.float32)
