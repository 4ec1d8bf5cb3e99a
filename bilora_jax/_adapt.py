"""`adapt`: finds a model's weights, and plans adapters for them."""

from collections.abc import Sequence
from typing import Any
import warnings

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp

from bilora_jax import (
  _finding,
  _hosts,
  _marking,
  _nnx_host,
  _quantised,
  _unmatched,
)
from bilora_jax._adapted import Adapted
from bilora_jax._plan import AdaptedWeight, Plan
from bilora_jax._site import Path
from bilora_jax._spec import LoraSpec


def adapt(
  model: nn.Module | nnx.Module,
  spec: LoraSpec,
  *inputs: Any,
  methods: Sequence[str] = ("__call__",),
  **kwargs: Any,
) -> Adapted:
  """Finds a model's weights and plans adapters for them.

  The model is traced abstractly: nothing is computed, and no parameter is
  copied. `adapt` finds linear layers (also general ones), einsums of two
  operands, convolutions without groups, and attention, also under `scan`,
  `vmap` (along the first axis) and `remat` of Linen and NNX. A model may
  transpose a weight before the product, or take one entry of its first axis, as
  `w[0]` of stacked experts. `adapt` does not find embeddings, or weights that
  are multiplied inside a jitted function: `x @ w`, `jnp.matmul(x, w)` and
  `nn.jit` are jitted, `jnp.dot(x, w)` is not.

  If the default targets, `.*`, match a weight that cannot be adapted, the
  weight gets no adapter, `adapt` warns, and `skipped` lists it.

  Args:
    model: a `flax.linen.Module`, or an `nnx.Module`.
    spec: which weights get adapters, and of which rank and scale.
    *inputs: example inputs of the model; `jax.ShapeDtypeStruct` suffices.
    methods: the model's methods in which adapters are active.
    **kwargs: keyword inputs, such as `train=False`.

  Returns:
    The adapted model, with `init`, `apply`, `merge` and `quantize`.

  Raises:
    ValueError: if an entry of the spec's `targets` or `exclude` matches no
      module, or its `extra` matches no parameter (the message lists what could
      match), or a matching weight cannot be adapted.

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
  program = host.program(_marking.Finder(), parameters)
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
  weights: dict[Path, AdaptedWeight] = {}
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
    as_layer = spec.dtype is None or site.convolution
    dtype = site.dtype if as_layer else jnp.dtype(spec.dtype)
    form = None
    if spec.base_dtype is not None:
      form = _quantised.Form(spec.base_dtype, site.tiles(spec.tile_size))
    weights[path] = AdaptedWeight(
      site, rank, auxiliary_rank, scale, dtype, form
    )
  reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items())
  if not weights:
    raise ValueError(
      f"all modules that targets={spec.targets!r} match are left out, by "
      f"exclude={spec.exclude!r} or extra={spec.extra!r}"
      + (f", or cannot be adapted: {reasons}." if skipped else ".")
    )
  if skipped:
    warnings.warn(f"adapt leaves out {reasons}.", stacklevel=2)
  return Adapted(host, Plan(spec, weights, parameters), skipped)
