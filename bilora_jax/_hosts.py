"""Linen and NNX models behind one interface: trace, call, read and replace."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, Protocol

from flax import linen as nn
from flax import nnx, traverse_util
from flax.core import meta
import jax
import qwix

from bilora_jax import _quantised
from bilora_jax._injection import Path

Flat = dict[Path, Any]


class Host(Protocol):
  """What `adapt` needs of a model."""

  def trace(self, provider: qwix.QuantizationProvider) -> Flat:
    """Shapes of all parameters of the model under `provider`."""
    ...

  def parameters(self, variables: Any) -> Flat:
    """The parameters in `variables`, unboxed, by path."""
    ...

  def logical_axes(self, variables: Any) -> dict[Path, tuple[Any, ...]]:
    """The names of the parameters' axes, where they have any."""
    ...

  def replace(self, variables: Any, new: Flat) -> Any:
    """`variables` with some parameters replaced, metadata kept."""
    ...

  def prepare(self, provider: qwix.QuantizationProvider) -> Callable[..., Any]:
    """Returns `call(variables, new, args, kwargs, rngs=, mutable=, method=)`.

    `new` are parameters to add or replace.
    """
    ...


@dataclasses.dataclass(frozen=True)
class LinenHost:
  """A `flax.linen.Module`; its variables are a dict of collections."""

  model: nn.Module
  inputs: tuple[Sequence[Any], Mapping[str, Any]]
  methods: tuple[str, ...]

  def trace(self, provider: qwix.QuantizationProvider) -> Flat:
    model = self._adapted(provider)
    args, kwargs = self.inputs

    def init(*args, **kwargs):
      return model.init(jax.random.key(0), *args, **kwargs)

    if "method" not in kwargs and "__call__" not in self.methods:
      kwargs = {**kwargs, "method": self.methods[0]}
    return self.parameters(_abstractly(init, args, kwargs))

  def parameters(self, variables: Any) -> Flat:
    params = _flatten(variables.get("params", {}))
    return {path: _unboxed(leaf) for path, leaf in params.items()}

  def logical_axes(self, variables: Any) -> dict[Path, tuple[Any, ...]]:
    boxes = {
      path: _box(leaf)
      for path, leaf in _flatten(variables.get("params", {})).items()
    }
    return {
      path: tuple(box.names)
      for path, box in boxes.items()
      if isinstance(box, nn.Partitioned)
    }

  def replace(self, variables: Any, new: Flat) -> Any:
    params = _flatten(variables.get("params", {}))
    boxed = {
      path: _boxed_as(params.get(path), value) for path, value in new.items()
    }
    params = traverse_util.unflatten_dict({**params, **boxed})
    return {**variables, "params": params}

  def prepare(self, provider: qwix.QuantizationProvider) -> Callable[..., Any]:
    model = self._adapted(provider)

    def call(variables, new, args, kwargs, *, rngs, mutable, method):
      result = model.apply(
        self.replace(variables, new),
        *args,
        rngs=rngs,
        mutable=mutable,
        # Not the function itself, that has no adapters.
        method=self._name(method),
        **kwargs,
      )
      if mutable is False:
        return result
      output, changed = result
      # Parameters belong to the optimizer; those of adapters, to us alone.
      return output, {k: v for k, v in changed.items() if k != "params"}

    return call

  def _adapted(self, provider: qwix.QuantizationProvider) -> nn.Module:
    return qwix.apply_lora_to_model(  # pyright: ignore[reportReturnType]
      self.model, provider, methods=self.methods
    )

  def _name(self, method: Any) -> str:
    name = getattr(method, "__name__", method) or "__call__"
    if name not in self.methods:
      raise ValueError(
        f"adapters are active in the methods {list(self.methods)}; got "
        f"{name!r}. Name it in adapt(..., methods=...)."
      )
    return name


@dataclasses.dataclass(frozen=True)
class NnxHost:
  """An `nnx.Module`; its variables are `nnx.state(model)`."""

  graphdef: Any
  state: Any
  inputs: tuple[Sequence[Any], Mapping[str, Any]]
  method: str

  @classmethod
  def of(
    cls,
    model: nnx.Module,
    inputs: tuple[Sequence[Any], Mapping[str, Any]],
    methods: tuple[str, ...],
  ) -> "NnxHost":
    if len(methods) != 1:
      raise ValueError(
        "of an NNX model one method can have adapters; got "
        f"methods={list(methods)}."
      )
    graphdef, state = nnx.split(model)
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state
    )
    return cls(graphdef, abstract, inputs, methods[0])

  def trace(self, provider: qwix.QuantizationProvider) -> Flat:
    try:
      model = self._adapted(provider)
    except Exception as error:
      raise ValueError(
        "the model does not run with its example inputs and room for adapters; "
        "Qwix cannot make that where layers are under nnx.scan. The error was "
        f"{type(error).__name__}: {error}."
      ) from error
    return self.parameters(nnx.state(model))

  def parameters(self, variables: Any) -> Flat:
    return {
      _strings(path): leaf.get_raw_value()
      for path, leaf in nnx.to_flat_state(variables)
      if isinstance(leaf, nnx.Param)
    }

  def logical_axes(self, variables: Any) -> dict[Path, tuple[Any, ...]]:
    found = {}
    for path, leaf in nnx.to_flat_state(variables):
      metadata = leaf.get_metadata()
      # Renamed in Flax 0.12.
      names = metadata.get("out_sharding") or metadata.get("sharding_names")
      if isinstance(leaf, nnx.Param) and names:
        found[_strings(path)] = tuple(names)
    return found

  def replace(self, variables: Any, new: Flat) -> Any:
    return nnx.from_flat_state(
      [
        (path, leaf.replace(new.get(_strings(path), leaf.get_raw_value())))
        for path, leaf in nnx.to_flat_state(variables)
      ]
    )

  def prepare(self, provider: qwix.QuantizationProvider) -> Callable[..., Any]:
    graphdef, abstract = nnx.split(self._adapted(provider))
    leaves = list(nnx.to_flat_state(abstract))

    def call(variables, new, args, kwargs, *, rngs, mutable, method):
      name = getattr(method, "__name__", method) or self.method
      if name != self.method:
        raise ValueError(
          f"adapters are active in the method {self.method!r}; got {name!r}."
        )
      given = {
        _strings(path): leaf.get_raw_value()
        for path, leaf in nnx.to_flat_state(variables)
      } | new
      model = nnx.merge(
        graphdef,
        nnx.from_flat_state(
          [(path, leaf.replace(given[_strings(path)])) for path, leaf in leaves]
        ),
      )
      if rngs is not None:
        # Qwix draws the adapters' dropout from here.
        model.set_attributes(qwix_rngs=nnx.Rngs(**rngs))
      output = getattr(model, self.method)(*args, **kwargs)
      if mutable is False:
        return output
      changed = {
        _strings(path): leaf.get_raw_value()
        for path, leaf in nnx.to_flat_state(nnx.state(model))
      }
      return output, self.replace(
        variables,
        {p: v for p, v in changed.items() if p not in new and p in given},
      )

    return call

  def _adapted(self, provider: qwix.QuantizationProvider) -> Any:
    args, kwargs = self.inputs

    def build(state, args, kwargs):
      model = nnx.merge(self.graphdef, state)
      # NNX and JAX keep the traces of jitted and rematerialised methods; those
      # of other providers, with other scales, are not to be found.
      for _, module in nnx.iter_modules(model):
        module.bilora_provider = provider  # pyright: ignore
      return qwix.apply_lora_to_model(
        model,
        provider,
        *args,
        methods=(self.method,),
        rngs=nnx.Rngs(0),
        **kwargs,
      )

    return _nnx_abstractly(build, self.state, args, kwargs)


def _flatten(tree: Any) -> Flat:
  return traverse_util.flatten_dict(
    tree, is_leaf=lambda _, x: isinstance(x, meta.AxisMetadata)
  )


def _box(leaf: Any) -> Any:
  """Where metadata may be: each array of a quantised kernel has its own."""
  return leaf.qvalue if _quantised.is_quantised(leaf) else leaf


def _unboxed(leaf: Any) -> Any:
  if _quantised.is_quantised(leaf) and isinstance(leaf.scale, nn.Partitioned):
    # A box asks for its array to be split by its names; scales may be too few.
    leaf = leaf.replace(scale=leaf.scale.unbox(apply_constraint=False))
  return meta.unbox(leaf)


def _boxed_as(old: Any, value: Any) -> Any:
  """A value with the metadata of what it replaces."""
  box = _box(old)
  if not isinstance(box, meta.AxisMetadata) or isinstance(
    value, meta.AxisMetadata
  ):
    return value
  if not _quantised.is_quantised(value):
    return box.replace_boxed(value)
  scale = box.replace_boxed(value.scale)
  if isinstance(scale, nn.Partitioned):
    names = _quantised.scale_axes(scale.names, value.scale.shape)
    scale = scale.replace(names=names)
  return value.replace(qvalue=box.replace_boxed(value.qvalue), scale=scale)


def _strings(path: Sequence[Any]) -> Path:
  return tuple(map(str, path))


def _split_inputs(args, kwargs):
  """Arrays to trace, and a function that puts them back among the rest."""
  leaves, treedef = jax.tree.flatten((tuple(args), dict(kwargs)))
  arrays = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

  def rebuild(traced):
    full = list(leaves)
    for i, leaf in zip(arrays, traced):
      full[i] = leaf
    return jax.tree.unflatten(treedef, full)

  return [leaves[i] for i in arrays], rebuild


def _abstractly(function, args, kwargs):
  traced, rebuild = _split_inputs(args, kwargs)

  def run(traced):
    args, kwargs = rebuild(traced)
    return function(*args, **kwargs)

  return jax.eval_shape(run, traced)


def _nnx_abstractly(function, state, args, kwargs):
  traced, rebuild = _split_inputs(args, kwargs)
  return nnx.eval_shape(
    lambda state, traced: function(state, *rebuild(traced)), state, traced
  )
