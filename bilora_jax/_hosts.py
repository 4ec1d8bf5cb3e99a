"""`Host`: one interface to Linen and NNX models; `LinenHost` for Linen."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any, Protocol

from flax import linen as nn
from flax import traverse_util
from flax.core import meta
import jax
import qwix

from bilora_jax import _quantised
from bilora_jax._products import Products
from bilora_jax._site import Path
from bilora_jax._stand_in import StandIn, StandInProducts

Flat = dict[Path, Any]
Inputs = tuple[Sequence[Any], Mapping[str, Any]]


class Host(Protocol):
  """The interface that `adapt` needs of a model.

  Attributes:
    evaluating: whether dropout of the adapters is off, even with a key.
  """

  @property
  def evaluating(self) -> bool: ...

  def shapes(self) -> Flat:
    """Shapes of all parameters of the model."""
    ...

  def program(self, products: Products, shapes: Flat) -> Any:
    """The model's traced program; its first inputs are the parameters."""
    ...

  def parameters(self, variables: Any) -> Flat:
    """The parameters in `variables`, unboxed, by path."""
    ...

  def logical_axes(self, variables: Any) -> dict[Path, tuple[Any, ...]]:
    """The names of the parameters' axes, for parameters with names."""
    ...

  def replace(self, variables: Any, new: Flat) -> Any:
    """Replaces some parameters in `variables` and keeps their metadata."""
    ...

  def in_mode(self, training: bool) -> "Host":
    """The host in the mode of `model.train()` or `model.eval()`."""
    ...

  def call(
    self,
    variables: Any,
    new: Flat,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    rngs: Any,
    mutable: Any,
    method: Any,
  ) -> Any:
    """Runs the model with some parameters replaced by stand-ins or arrays."""
    ...


@dataclasses.dataclass(frozen=True)
class LinenHost:
  """A `flax.linen.Module`; its variables are a dict of collections."""

  model: nn.Module
  inputs: Inputs
  methods: tuple[str, ...]
  evaluating: bool = False

  def shapes(self) -> Flat:
    return self.parameters(self._variables)

  def program(self, products: Products, shapes: Flat) -> Any:
    model = intercepted(self.model, products, methods=self.methods)
    others = {k: v for k, v in self._variables.items() if k != "params"}
    args, kwargs = self._inputs()
    traced, rebuild = split_inputs(args, kwargs)

    def run(params, others, traced):
      args, kwargs = rebuild(traced)
      nested = traverse_util.unflatten_dict(dict(zip(shapes, params)))
      rngs = {"params": jax.random.key(0)}
      model.apply(
        {**others, "params": nested}, *args, rngs=rngs, mutable=True, **kwargs
      )

    others = jax.tree.map(_unboxed, others, is_leaf=_is_box)
    return jax.make_jaxpr(run)(list(shapes.values()), others, traced)

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

  def in_mode(self, training: bool) -> "LinenHost":
    name = "train" if training else "eval"
    raise ValueError(
      f"{name}() is for NNX models; a Linen model takes the mode as an "
      "argument, as apply(..., train=False) or deterministic=True."
    )

  def call(self, variables, new, args, kwargs, *, rngs, mutable, method):
    result = self._model.apply(
      self.replace(variables, new),
      *args,
      rngs=rngs,
      mutable=mutable,
      # By name, as the function itself has no adapters.
      method=self._name(method),
      **kwargs,
    )
    if mutable is False:
      return result
    output, changed = result
    # The optimizer owns the parameters; stand-ins must not leave this module.
    return output, {k: v for k, v in changed.items() if k != "params"}

  @functools.cached_property
  def _model(self) -> Any:
    return intercepted(self.model, StandInProducts(), methods=self.methods)

  def _inputs(self) -> Inputs:
    args, kwargs = self.inputs
    if "method" not in kwargs and "__call__" not in self.methods:
      kwargs = {**kwargs, "method": self.methods[0]}
    return args, kwargs

  @functools.cached_property
  def _variables(self) -> Any:
    def init(*args, **kwargs):
      return self.model.init(jax.random.key(0), *args, **kwargs)

    return _abstractly(init, *self._inputs())

  def _name(self, method: Any) -> str:
    name = getattr(method, "__name__", method) or "__call__"
    if name not in self.methods:
      raise ValueError(
        f"adapters are active in the methods {list(self.methods)}; got "
        f"{name!r}. Name it in adapt(..., methods=...)."
      )
    return name


def intercepted(model: Any, products: Products, **kwargs: Any) -> Any:
  """The model with its products replaced by `products`."""
  changed = qwix.quantize_model(model, products, **kwargs)
  if isinstance(model, nn.Module):
    # Flax has made an `__init__` of the fields for the new class. Diffusers'
    # models keep more than the fields, in an `__init__` of their own.
    type(changed).__init__ = type(model).__init__
  return changed


def _flatten(tree: Any) -> Flat:
  return traverse_util.flatten_dict(tree, is_leaf=lambda _, x: _is_box(x))


def _is_box(x: Any) -> bool:
  return isinstance(x, meta.AxisMetadata)


def _box(leaf: Any) -> Any:
  """The array that may carry metadata: the codes of a quantised kernel."""
  return leaf.qvalue if _quantised.is_quantised(leaf) else leaf


def _unboxed(leaf: Any) -> Any:
  if _quantised.is_quantised(leaf) and isinstance(leaf.scale, nn.Partitioned):
    # Unboxing constrains the sharding, for which scales may be too few.
    leaf = leaf.replace(scale=leaf.scale.unbox(apply_constraint=False))
  if isinstance(leaf, nn.Partitioned) and isinstance(
    leaf.value, jax.ShapeDtypeStruct
  ):
    return leaf.unbox(apply_constraint=False)
  return meta.unbox(leaf)


def _boxed_as(old: Any, value: Any) -> Any:
  """A value with the metadata of the leaf that it replaces."""
  box = _box(old)
  if not _is_box(box) or _is_box(value) or isinstance(value, StandIn):
    return value
  if not _quantised.is_quantised(value):
    return box.replace_boxed(value)
  scale = box.replace_boxed(value.scale)
  if isinstance(scale, nn.Partitioned):
    names = _quantised.scale_axes(scale.names, value.scale.shape)
    scale = scale.replace(names=names)
  return value.replace(qvalue=box.replace_boxed(value.qvalue), scale=scale)


def split_inputs(args, kwargs):
  """Separates arrays to trace; returns them and a function to put them back."""
  leaves, treedef = jax.tree.flatten((tuple(args), dict(kwargs)))
  arrays = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

  def rebuild(traced):
    full = list(leaves)
    for i, leaf in zip(arrays, traced):
      full[i] = leaf
    return jax.tree.unflatten(treedef, full)

  return [leaves[i] for i in arrays], rebuild


def _abstractly(function, args, kwargs):
  traced, rebuild = split_inputs(args, kwargs)

  def run(traced):
    args, kwargs = rebuild(traced)
    return function(*args, **kwargs)

  return jax.eval_shape(run, traced)
