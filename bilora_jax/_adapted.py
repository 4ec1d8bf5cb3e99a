"""`Adapted`: a Linen or NNX model with low-rank adapters, as functions."""

from collections.abc import Mapping
import dataclasses
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

  Adapters are a dict of `primary`, `auxiliary` and `extra`: the first two
  nested dicts of `Factors` that mirror the parameters, as
  ``{'layer': {'query': {'kernel': Factors}}}``; the last the parameters that
  are trained as they are. A part that would be empty is left out. In place of
  any pair, `apply`, `merge` and `partition_specs` also take a kernel's adapter
  of another kind, which `bilora_jax.adapters.init` makes.

  Where the spec has a `base_dtype`, the variables that the methods take are
  those that `quantize` gives: its adapted kernels are each a `qwix.QArray`.

  Attributes:
    skipped: why not, by path, for weights that the default targets leave out.
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
    """What was given to `adapt`."""
    return self._plan.spec

  @property
  def targets(self) -> dict[str, tuple[int, ...]]:
    """The adapted weights and their shapes."""
    return {"/".join(p): x.site.shape for p, x in self._plan.weights.items()}

  def train(self) -> "Adapted":
    """The same of an NNX model as `model.train()` makes it.

    Dropout is on and takes its keys from `rngs`, BatchNorm reads the batch.

    Raises:
      ValueError: for a Linen model, which takes this as an argument of its own.
    """
    return dataclasses.replace(self, _host=self._host.in_mode(training=True))

  def eval(self) -> "Adapted":
    """The same of an NNX model as `model.eval()` makes it.

    Dropout is off, that of the adapters too, and BatchNorm reads its averages.

    Raises:
      ValueError: for a Linen model, which takes this as an argument of its own.
    """
    return dataclasses.replace(self, _host=self._host.in_mode(training=False))

  def quantize(self, variables: Any, *, donate: bool = False) -> Any:
    """The variables with their adapted kernels in the spec's `base_dtype`.

    Of each tile the largest magnitude is the largest code, and the scale, in
    float32, goes from the codes to floats. All else stays as it is:
    embeddings, norms, heads, biases, and what the spec leaves out. One kernel
    after the other is quantised, where it is; under `jax.jit`, all at once.

    Args:
      variables: of the model; Linen's collections, or `nnx.state(model)`.
      donate: whether each float kernel on a device is deleted once it has
        been read, so that memory never holds more than the variables and one
        kernel; not under `jax.jit`, which has its own.

    Returns:
      Variables for the other methods, with metadata kept.

    Raises:
      ValueError: if the spec has no `base_dtype`, or `variables` are not those
        of the model, or quantised already.
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
    """One parameter of `quantize`, for loaders that read one at a time.

    Args:
      path: of the parameter, as in `targets`.
      array: its value; on a mesh, codes and scales stay where it is, except
        that scales are whole along axes that they are too few to divide.

    Returns:
      A `qwix.QArray` for an adapted kernel, and `array` for all else.

    Raises:
      ValueError: if the spec has no `base_dtype`, or the model no such
        parameter, or one of another shape.
    """
    if self.spec.base_dtype is None:
      raise ValueError(
        "the spec has base_dtype=None, in which kernels stay as they are; "
        f"to quantise, set one of {', '.join(_quantised.QTYPES)}."
      )
    key = tuple(path.split("/"))
    expected = self._plan.parameters.get(key)
    if expected is None or expected.shape != array.shape:
      raise ValueError(
        f"{path} is no parameter of the model, which has "
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
    """Names of the axes of what `quantize` returns.

    Args:
      axes: a tree like the variables before, of `jax.sharding.PartitionSpec`,
        as `nn.get_partition_spec` gives it.

    Returns:
      A tree like the variables after. Codes have the kernel's names, and
      scales too, but for axes of which they have one.
    """
    params = self._host.parameters(axes)
    return self._host.replace(axes, _axes.of_quantised(self._plan, params))

  def init(self, key: jax.Array, variables: Any) -> dict[str, Any]:
    """New adapters, that leave the model as it is.

    Of each pair, `a` is uniform in `+-1/sqrt(in)` (Kaiming's with
    `a = sqrt(5)`, as in LoRA) and `b` zero, both float32; primary and
    auxiliary draw from different keys. Only `extra` reads `variables`, which
    with DoRA has the norms of the kernels' columns, `(*batch, out)`.

    Args:
      key: a JAX random key.
      variables: of the model; Linen's collections, or `nnx.state(model)`.

    Raises:
      ValueError: if `variables` are not those of the model, each mismatch
        named.
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

    The two modules are joined along the rank, so each layer does two thin
    products, as with plain LoRA; given `primary(adapters)`, they have rank r1.

    Args:
      variables: of the model; Linen's collections, or `nnx.state(model)`.
      adapters: from `init`, with or without the auxiliary.
      *args: the model's.
      rngs: keys by name: Linen's rngs, or new keys for the streams of an NNX
        model. With a `dropout` key, dropout of the adapters is on.
      mutable: as in Linen. For NNX `True` returns `(output, variables)`, the
        latter with the state that the call changed, parameters as they were.
      method: as in Linen, one of the `methods` given to `adapt`.
      **kwargs: the model's.

    Returns:
      What the model returns.

    Raises:
      ValueError: if adapters are missing, unknown or of wrong shape, or
        variables are, each named; or the method has no adapters; or an NNX
        model that is not of `eval` draws from a stream without a key, or
        changes its state where that is not `mutable`.
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
    """The variables of a plain model at `W0 + scale * a @ b` of the primary.

    With DoRA, at that with its columns scaled to their magnitudes. Each sum is
    taken in float32 and cast once to the kernel's dtype; `extra` replaces what
    it was taken from. The auxiliary is thrown away. A quantised base becomes
    one of floats again, kernels in the dtype that the model makes them in
    (Flax's `param_dtype`).

    Args:
      variables: of the model.
      adapters: to add to them.
      donate: whether each adapted kernel is deleted once it has been read, so
        that memory never holds more than the variables and one kernel; not
        under `jax.jit`, which has its own.

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
    """Logical axes of adapters, that follow those of the kernels.

    Args:
      variables: with `nn.Partitioned` boxes, or NNX sharding metadata.
      adapters: the tree to describe; shapes are enough.

    Returns:
      A tree like `adapters` of `jax.sharding.PartitionSpec`. Scanned and
      batched axes keep their names, `in` and `out` get those of the first axis
      that they are made of, and the rank is never sharded. Adapters of other
      kinds than pairs are whole on each device.
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
    """Refuses adapters that are not of this model and spec.

    Args:
      adapters: from `init`, with or without the auxiliary.
      whole: whether all of `extra` must be there, if the spec has one.
      any_kind: whether a kernel may have an adapter of another kind than the
        spec's pair, as those of `bilora_jax.adapters`.

    Raises:
      ValueError: that names every mismatch.
    """
    self._plan.check_adapters(adapters, whole=whole, any_kind=any_kind)

  def shapes(self, part: str) -> dict[Path, Any]:
    """What a part of the adapters holds, by path.

    Returns:
      Of `extra` the shapes; of a pair `(shape of a, shape of b, scale)`.
    """
    return self._plan.shapes(part)

  def _parameters(
    self, variables: Any, *, as_floats: bool = False
  ) -> dict[Path, Any]:
    """The parameters by path, once the plan has checked them."""
    params = self._host.parameters(variables)
    self._plan.check_parameters(params, as_floats=as_floats)
    return params


def _new_pair(
  key: jax.Array, weight: _plan.AdaptedWeight, rank: int
) -> Factors:
  batch, size_in, size_out = weight.site.outer_shape
  bound = max(size_in, 1) ** -0.5
  a = jax.random.uniform(key, (*batch, size_in, rank), jnp.float32, -1, 1)
  return Factors(
    bound * a, jnp.zeros((*batch, rank, size_out), jnp.float32), weight.scale
  )
