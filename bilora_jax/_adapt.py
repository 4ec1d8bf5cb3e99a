"""`adapt`: low-rank adapters on a Linen or NNX model, as pure functions."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any
import warnings
import zlib

from flax import linen as nn
from flax import nnx, traverse_util
import jax
import jax.numpy as jnp

from bilora_jax import (
  _dora,
  _finding,
  _hosts,
  _nnx_host,
  _nodes,
  _partition,
  _quantised,
  _unmatched,
)
from bilora_jax._factors import Factors, is_factors
from bilora_jax._site import Path, Site
from bilora_jax._spec import LoraSpec
from bilora_jax._stand_in import StandIn


@dataclasses.dataclass(frozen=True)
class _Adapter:
  """One adapted weight: where it is, and the sizes of its modules.

  Attributes:
    form: in what its kernel is stored; None for floats.
  """

  site: Site
  rank: int
  auxiliary_rank: int
  scale: float
  dtype: Any
  form: _quantised.Form | None


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

  spec: LoraSpec
  _host: _hosts.Host
  _adapters: Mapping[Path, _Adapter]
  _parameters: Mapping[Path, jax.ShapeDtypeStruct]
  skipped: Mapping[str, str]

  def __repr__(self) -> str:
    names = list(self.targets)
    more = ", ..." if len(names) > 2 else ""
    return (
      f"Adapted({len(names)} weights: {', '.join(map(repr, names[:2]))}{more}; "
      f"rank={self.spec.rank}, auxiliary_rank={self.spec.auxiliary_rank})"
    )

  @property
  def targets(self) -> dict[str, tuple[int, ...]]:
    """The adapted weights and their shapes."""
    return {"/".join(p): x.site.shape for p, x in self._adapters.items()}

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
    params = self._check(variables, as_floats=True)
    new = {}
    for path in self._adapters:
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
    own = self._parameters.get(key)
    if own is None or own.shape != array.shape:
      raise ValueError(
        f"{path} is no parameter of the model, which has "
        f"{_unmatched.listed('/'.join(p) for p in self._parameters)}."
        if own is None
        else f"{path} has the shape {own.shape}; got {tuple(array.shape)}."
      )
    if key not in self._adapters:
      return array
    form = self._adapters[key].form
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
    new = {}
    for path, x in self._adapters.items():
      if x.form is not None:
        shape = x.form.scale_shape(x.site.shape)
        names = _quantised.scale_axes(params[path], shape)
        scale = jax.sharding.PartitionSpec(*names)
        new[path] = x.form.array(params[path], scale)
    return self._host.replace(axes, new)

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
    params = self._check(variables)
    adapters: dict[str, Any] = {}
    for part, part_key in zip(("primary", "auxiliary"), jax.random.split(key)):
      keys = jax.random.split(part_key, len(self._adapters))
      pairs = {
        path: _new_pair(k, x, x.rank if part == "primary" else x.auxiliary_rank)
        for k, (path, x) in zip(keys, self._adapters.items())
        if part == "primary" or x.auxiliary_rank
      }
      if pairs:
        adapters[part] = traverse_util.unflatten_dict(pairs)
    extra = {
      path: jnp.array(leaf, jnp.float32)
      for path, leaf in params.items()
      if self.spec.is_extra("/".join(path))
    }
    if self.spec.dora:
      for path in self._adapters:
        kernel = self._matrices(path, params[path])
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
    pairs, gains = self._joined(adapters)
    params = self._check(variables)
    magnitudes, new = self._extra(adapters, params)
    key = None
    if self.spec.dropout and not self._host.evaluating:
      key = (rngs or {}).get("dropout")
    for path, x in self._adapters.items():
      weight, pair, gain = params[path], pairs.get(path), gains.get(path)
      if x.form is None:
        weight = jnp.asarray(weight)
      if path in magnitudes:
        kernel = self._matrices(path, weight)
        of_dora = _dora.gain(kernel, pair, magnitudes[path])
        gain = of_dora if gain is None else of_dora * gain
      if pair is not None:
        pair = Factors(
          pair.a.astype(x.dtype), pair.b.astype(x.dtype), pair.scale
        )
      new[path] = StandIn(
        weight,
        pair,
        gain,
        None if key is None else _key_at(key, x.site),
        x.site,
        self._parameters[path].dtype,
        self.spec.dropout,
      )
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
    adapters = _partition.primary(adapters)
    pairs, gains = self._joined(adapters)
    params = self._check(variables)
    magnitudes, new = self._extra(adapters, params)
    for path, x in self._adapters.items():
      if x.form is None:
        kernel, dtype = params[path].astype(jnp.float32), params[path].dtype
      else:
        kernel = _quantised.dequantise(params[path])
        dtype = self._parameters[path].dtype
      whole = kernel
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
    spec = jax.sharding.PartitionSpec

    def of_kernel(path):
      site = self._adapters[path].site
      axes = names.get(path, (None,) * len(site.shape))
      batch = [axes[i] for i in (*range(site.scanned), *site.batch)]
      first = [
        axes[x[0]] if x else None for x in (site.contracted, site.remaining)
      ]
      return Factors(
        spec(*batch, first[0], None),
        spec(*batch, None, first[1]),
        self._adapters[path].scale,
      )

    result = {}
    for part, tree in adapters.items():
      flat = {
        path: of_kernel(path)
        if is_factors(leaf)
        else jax.tree.map(lambda _: spec(), leaf)
        if _nodes.is_adapter(leaf)
        else spec(*names.get(path, ()))
        for path, leaf in _flatten(tree).items()
      }
      for path in self._adapters:
        if part == "extra" and _dora.path_of(path) in flat:
          *batch, _, last = of_kernel(path).b
          flat[_dora.path_of(path)] = spec(*batch, last)
      result[part] = traverse_util.unflatten_dict(flat)
    return result

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
    _partition.check_parts(adapters)
    wrong = []
    for part, tree in adapters.items():
      found = {p: _shape(x) for p, x in _flatten(tree).items()}
      wanted = self.shapes(part)
      if any_kind:
        wanted |= {
          path: self._adapters[path].site.outer_shape
          for path, node in _flatten(tree).items()
          if path in self._adapters and hasattr(node, "outer_shape")
        }
      wrong += [
        f"{part}/{'/'.join(path)}: {found.get(path, 'missing')}, expected "
        f"{wanted.get(path, 'nothing')}"
        for path in ({**wanted, **found} if whole or part != "extra" else found)
        if found.get(path) != wanted.get(path)
      ]
    if whole and "extra" not in adapters and self.shapes("extra"):
      wrong.append("extra: missing")
    if wrong:
      raise ValueError(
        "these adapters do not fit the model and its spec: "
        + "; ".join(wrong)
        + "."
      )

  def shapes(self, part: str) -> dict[Path, Any]:
    """What a part of the adapters holds, by path.

    Returns:
      Of `extra` the shapes; of a pair `(shape of a, shape of b, scale)`.
    """
    wanted: dict[Path, Any] = {}
    if part == "extra":
      wanted = {
        path: own.shape
        for path, own in self._parameters.items()
        if self.spec.is_extra("/".join(path))
      }
      for path, x in self._adapters.items():
        if self.spec.dora:
          batch, _, size_out = x.site.outer_shape
          wanted[_dora.path_of(path)] = (*batch, size_out)
      return wanted
    for path, x in self._adapters.items():
      rank = x.rank if part == "primary" else x.auxiliary_rank
      batch, size_in, size_out = x.site.outer_shape
      if rank:
        wanted[path] = (
          (*batch, size_in, rank),
          (*batch, rank, size_out),
          x.scale,
        )
    return wanted

  def _joined(
    self, adapters: Mapping[str, Any]
  ) -> tuple[dict[Path, Factors], dict[Path, jax.Array]]:
    """What is added to kernels, and what their outputs are multiplied by."""
    self.check(adapters, any_kind=True)
    pairs: dict[Path, Factors] = {}
    gains: dict[Path, jax.Array] = {}
    for part in ("primary", "auxiliary"):
      for path, node in _flatten(adapters.get(part, {})).items():
        if hasattr(node, "gain"):
          gains[path] = gains.get(path, 1.0) + node.gain
          continue
        pair = node if is_factors(node) else node.factors()
        pairs[path] = pairs[path].join(pair) if path in pairs else pair
    return pairs, gains

  def _extra(
    self, adapters: Mapping[str, Any], params: Mapping[Path, Any]
  ) -> tuple[dict[Path, Any], dict[Path, Any]]:
    """Magnitudes by their kernels, and parameters that adapters replace.

    The latter in the dtypes of these.
    """
    magnitudes, others = _dora.split(
      _flatten(adapters.get("extra", {})), self._adapters
    )
    return magnitudes, {
      path: leaf.astype(params[path].dtype) for path, leaf in others.items()
    }

  def _matrices(self, path: Path, kernel: Any) -> jax.Array:
    """A kernel as floats, `(*batch, in, out)`."""
    x = self._adapters[path]
    if x.form is not None:
      kernel = _quantised.dequantise(kernel)
    return x.site.matrices(kernel)

  def _check(self, variables: Any, as_floats: bool = False) -> dict[Path, Any]:
    """The parameters, if they are the model's, in the form that is expected.

    Args:
      variables: of the model.
      as_floats: whether that is floats, whatever the spec says.
    """
    params = self._host.parameters(variables)
    other = []
    for path, leaf in params.items():
      form = self._adapters[path].form if path in self._adapters else None
      found = _quantised.form_of(leaf)
      wanted = "floats" if form is None or as_floats else str(form)
      if found != wanted and path in self._parameters:
        other.append(f"{'/'.join(path)}: {found}, expected {wanted}")
    if other:
      raise ValueError(
        f"the spec has base_dtype={self.spec.base_dtype!r}, and some of these "
        f"variables are stored otherwise: {'; '.join(other)}. Quantised ones "
        "are made by `quantize`, of the same spec, from floats."
      )
    wrong = [
      f"{'/'.join(path)}: {_shape(params.get(path))}, expected {own.shape}"
      for path, own in self._parameters.items()
      if path not in params or _shape(params[path]) != own.shape
    ]
    if wrong:
      raise ValueError(
        "these variables are not those of the adapted model: "
        + "; ".join(wrong)
        + "."
      )
    return params


def adapt(
  model: nn.Module | nnx.Module,
  spec: LoraSpec,
  *inputs: Any,
  methods: Sequence[str] = ("__call__",),
  **kwargs: Any,
) -> Adapted:
  """Finds a model's weights and plans adapters for them.

  The model is traced abstractly; nothing runs and nothing of the model is
  copied. Linear layers, general ones too, einsums of two operands, convolutions
  without groups and attention are found, also under `scan` and `vmap` (along
  the first axis) and `remat` of Linen and NNX. Embeddings are not, nor weights
  that a jitted function multiplies by: `x @ w`, `jnp.matmul(x, w)` and `nn.jit`
  are such, `jnp.dot(x, w)` is not.

  What the default targets, `.*`, match and cannot be adapted is left as it is,
  with a warning, and listed in `skipped`.

  Args:
    model: a `flax.linen.Module`, or an `nnx.Module`.
    spec: what to put where.
    *inputs: example inputs of the model; shapes (`jax.ShapeDtypeStruct`) do.
    methods: the model's methods in which adapters are active.
    **kwargs: keyword inputs, as `train=False`.

  Returns:
    The adapted model: `init`, `apply`, `merge`, and `quantize`.

  Raises:
    ValueError: if an entry of the spec's targets or its `exclude` matches no
      module, or its `extra` no parameter, with what could match; or a matching
      weight cannot be adapted.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from bilora_jax import adapt, LoraSpec
    >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), jnp.ones((2, 4))
    >>> adapted = adapt(model, LoraSpec(rank=2, auxiliary_rank=2), x)
    >>> adapted.targets
    {'layers_0/kernel': (4, 8), 'layers_2/kernel': (8, 3)}
    >>> variables = model.init(jax.random.key(0), x)
    >>> adapters = adapted.init(jax.random.key(1), variables)
    >>> adapted.apply(variables, adapters, x).shape
    (2, 3)
  """  # noqa: E501
  if not isinstance(spec, LoraSpec):
    raise ValueError(f"spec is a LoraSpec; got {type(spec).__name__}.")
  if isinstance(model, nn.Module):
    host = _hosts.LinenHost(model, (inputs, kwargs), tuple(methods))
  elif isinstance(model, nnx.Module):
    host = _nnx_host.NnxHost.of(model, (inputs, kwargs), tuple(methods))
  else:
    raise ValueError(
      "model is a flax.linen.Module or a flax.nnx.Module; got "
      f"{type(model).__name__}."
    )
  parameters = {
    path: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
    for path, leaf in host.shapes().items()
  }
  program = host.program(_finding.Finder(), parameters)
  sites, unfit = _finding.find_sites(program, parameters)
  _unmatched.check(
    spec,
    ("/".join(p[:-1]) for p in (*sites, *unfit)),
    ("/".join(p[:-1]) for p in parameters),
  )
  extra = {p for p in parameters if spec.is_extra("/".join(p))}
  if spec.extra is not None and not extra:
    raise ValueError(
      f"extra={spec.extra!r} matches no parameter; there are "
      f"{_unmatched.listed('/'.join(p) for p in parameters)}."
    )
  adapters: dict[Path, _Adapter] = {}
  skipped: dict[str, str] = {}
  for path in sorted({*sites, *unfit} - extra):
    match = spec.match("/".join(path[:-1]))
    if match is None:
      continue
    name = "/".join(path)
    if path in unfit and spec.targets == LoraSpec.targets:
      skipped[name] = unfit[path]
      continue
    if path in unfit:
      raise ValueError(
        f"the weight {name} cannot be adapted: {unfit[path]}. Leave its module "
        "out with LoraSpec(exclude=...)."
      )
    rank, auxiliary_rank, scale = match
    site = sites[path]
    # XLA convolves arrays of one dtype only.
    own = spec.dtype is None or site.convolution
    dtype = site.dtype if own else jnp.dtype(spec.dtype)
    form = None
    if spec.base_dtype is not None:
      form = _quantised.Form(spec.base_dtype, site.tiles(spec.tile_size))
    adapters[path] = _Adapter(site, rank, auxiliary_rank, scale, dtype, form)
  reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
  if not adapters:
    raise ValueError(
      f"all modules that targets={spec.targets!r} match are left out, by "
      f"exclude={spec.exclude!r} or extra={spec.extra!r}"
      + (f", or cannot be adapted: {reasons}." if skipped else ".")
    )
  if skipped:
    warnings.warn(f"adapt leaves out {reasons}.", stacklevel=2)
  return Adapted(spec, host, adapters, parameters, skipped)


def _new_pair(key: jax.Array, x: _Adapter, rank: int) -> Factors:
  batch, size_in, size_out = x.site.outer_shape
  bound = max(size_in, 1) ** -0.5
  a = jax.random.uniform(key, (*batch, size_in, rank), jnp.float32, -1, 1)
  return Factors(
    bound * a, jnp.zeros((*batch, rank, size_out), jnp.float32), x.scale
  )


def _key_at(key: jax.Array, site: Site) -> jax.Array:
  """The key for dropout at a weight, one for each scanned layer."""
  own = jax.random.fold_in(key, zlib.crc32("/".join(site.path).encode()))
  layers = site.shape[: site.scanned]
  return jax.random.split(own, layers) if layers else own


def _flatten(tree: Any) -> dict[Path, Any]:
  return traverse_util.flatten_dict(
    tree, is_leaf=lambda _, x: _nodes.is_adapter(x)
  )


def _shape(node: Any) -> Any:
  if is_factors(node):
    return tuple(node.a.shape), tuple(node.b.shape), node.scale
  if _nodes.is_adapter(node):
    return getattr(node, "outer_shape", type(node).__name__)
  return tuple(node.shape) if hasattr(node, "shape") else node
