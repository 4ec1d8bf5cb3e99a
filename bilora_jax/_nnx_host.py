"""NNX models as hosts of adapters."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax

from bilora_jax import _hosts
from bilora_jax._products import Products
from bilora_jax._site import Path
from bilora_jax._stand_in import StandInProducts

# Attributes that Qwix sets on each NNX module, for other providers than ours.
_QWIX_ATTRIBUTES = ("qwix_path", "qwix_rngs", "disable_quant_stats_update")


@dataclasses.dataclass(frozen=True)
class NnxHost:
  """An `nnx.Module`; its variables are `nnx.state(model)`.

  Attributes:
    evaluating: whether the model is in `model.eval()` mode.
  """

  graphdef: Any
  state: Any
  inputs: _hosts.Inputs
  method: str
  evaluating: bool = False

  @classmethod
  def of(
    cls, model: nnx.Module, inputs: _hosts.Inputs, methods: tuple[str, ...]
  ) -> "NnxHost":
    if len(methods) != 1:
      raise ValueError(
        "one method of an NNX model can have adapters; got "
        f"methods={list(methods)}."
      )
    graphdef, state = nnx.split(model)
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state
    )
    return cls(graphdef, abstract, inputs, methods[0])

  def shapes(self) -> _hosts.Flat:
    return self.parameters(self.state)

  def program(self, products: Products, shapes: _hosts.Flat) -> Any:
    graphdef = self._graphdef(products)
    traced, rebuild = _hosts.split_inputs(*self.inputs)

    def run(params, state, traced):
      args, kwargs = rebuild(traced)
      state = self.replace(state, dict(zip(shapes, params)))
      getattr(nnx.merge(graphdef, state), self.method)(*args, **kwargs)

    return jax.make_jaxpr(run)(list(shapes.values()), self.state, traced)

  def parameters(self, variables: Any) -> _hosts.Flat:
    if isinstance(variables, nnx.Module):
      raise ValueError(
        "variables is the state of the model, nnx.state(model); got the model "
        f"itself, of the class {type(variables).__name__}."
      )
    return {
      _strings(path): leaf.get_raw_value()
      for path, leaf in nnx.to_flat_state(variables)
      if isinstance(leaf, nnx.Param)
    }

  def logical_axes(self, variables: Any) -> dict[Path, tuple[Any, ...]]:
    axes = {}
    for path, leaf in nnx.to_flat_state(variables):
      metadata = leaf.get_metadata()
      # Renamed in Flax 0.12.
      names = metadata.get("out_sharding") or metadata.get("sharding_names")
      if isinstance(leaf, nnx.Param) and names:
        axes[_strings(path)] = tuple(names)
    return axes

  def replace(self, variables: Any, new: _hosts.Flat) -> Any:
    return nnx.from_flat_state(
      [
        (path, leaf.replace(new.get(_strings(path), leaf.get_raw_value())))
        for path, leaf in nnx.to_flat_state(variables)
      ]
    )

  def in_mode(self, training: bool) -> "NnxHost":
    model = nnx.merge(self.graphdef, self.state)
    if training:
      model.train()
    else:
      model.eval()
    return dataclasses.replace(
      self, graphdef=nnx.graphdef(model), evaluating=not training
    )

  def call(self, variables, new, args, kwargs, *, rngs, mutable, method):
    name = getattr(method, "__name__", method) or self.method
    if name != self.method:
      raise ValueError(
        f"adapters are active in the method {self.method!r}; got {name!r}."
      )
    state = self.replace(variables, new)
    given = {p: leaf.get_raw_value() for p, leaf in _leaves(state).items()}
    model = nnx.merge(self._model, state)
    if rngs:
      _check_streams(state, rngs)
      nnx.reseed(model, policy="match_shape", **rngs)
    output = getattr(model, self.method)(*args, **kwargs)
    after = nnx.state(model)
    if mutable is False:
      if not self.evaluating:
        _check_unchanged(given, after, rngs or {})
      return output
    changed = {
      path: leaf.get_raw_value()
      for path, leaf in _leaves(after).items()
      # The optimizer owns the parameters, and the caller owns the given keys.
      if not isinstance(leaf, nnx.Param) and not _is_stream(leaf, rngs or {})
    }
    return output, self.replace(variables, changed)

  @functools.cached_property
  def _model(self) -> Any:
    return self._graphdef(StandInProducts())

  def _graphdef(self, products: Products) -> Any:
    model = _hosts.intercepted(
      nnx.merge(self.graphdef, self.state),
      products,
      methods=(self.method,),
      # Otherwise Qwix runs the model once.
      skip_nnx_init=True,
    )
    for _, module in nnx.iter_modules(model):
      if isinstance(module, nnx.bridge.ToNNX):
        # ToNNX reads all attributes as Linen variables, also Qwix's.
        for name in set(vars(module)) & set(_QWIX_ATTRIBUTES):
          delattr(module, name)
    return nnx.graphdef(model)


def _check_streams(state: Any, rngs: Mapping[str, Any]) -> None:
  """Refuses keys of streams that the model does not have."""
  streams = {
    leaf.tag
    for leaf in _leaves(state).values()
    if isinstance(leaf, nnx.RngState)
  }
  # Adapters draw from `dropout`.
  unknown = sorted(set(rngs) - streams - {"dropout"})
  if unknown:
    raise ValueError(
      f"rngs has keys for {unknown}; the streams of the model are "
      f"{sorted(streams)}."
    )


def _check_unchanged(
  given: _hosts.Flat, after: Any, rngs: Mapping[str, Any]
) -> None:
  """Refuses a call whose changes to the model's state would be lost.

  Args:
    given: values before the call.
    after: state after the call.
    rngs: new keys of streams, whose counts may change.
  """
  streams, state = set(), set()
  for path, leaf in _leaves(after).items():
    if isinstance(leaf, nnx.Param) or path not in given:
      continue
    if leaf.get_raw_value() is given[path] or _is_stream(leaf, rngs):
      continue
    if isinstance(leaf, nnx.RngState):
      streams.add(leaf.tag)
    else:
      state.add("/".join(path))
  if streams:
    names = ", ".join(f"{name!r}: key" for name in sorted(streams))
    raise ValueError(
      "the model draws random numbers, and without new keys they would be the "
      f"same in each call. Pass rngs={{{names}}} to train, or take "
      "adapted.eval() to evaluate."
    )
  if state:
    raise ValueError(
      f"the call changes the model's state ({', '.join(sorted(state))}), which "
      "would be lost. Pass mutable=True, which returns (output, variables), to "
      "train, or take adapted.eval() to evaluate."
    )


def _is_stream(leaf: Any, rngs: Mapping[str, Any]) -> bool:
  """Whether a variable belongs to a stream with a key in `rngs`."""
  return isinstance(leaf, nnx.RngState) and leaf.tag in rngs


def _leaves(state: Any) -> _hosts.Flat:
  return {_strings(path): leaf for path, leaf in nnx.to_flat_state(state)}


def _strings(path: Sequence[Any]) -> Path:
  return tuple(map(str, path))
