"""The methods whose steps are timed, with the paper's separate branches."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax import traverse_util

from benchmarks.workloads import Workload
from bilora_jax import Factors
from train.methods import method as methods
from train.methods import spec
from train.run import assemble
from train.run import config as config_lib

BASE = "LoRA r=8"
_SEPARATE = "Bi-LoRA 8+8, separate branches"
# By name: the options that differ from the program's defaults.
_OPTIONS: dict[str, dict[str, Any]] = {
  BASE: {"method": "lora"},
  "LoRA r=16": {"method": "lora", "rank": 16},
  "Bi-LoRA 8+8": {"method": "bilora"},
  _SEPARATE: {"method": "bilora"},
  "Bi-LoRA 8+8, power ascent": {
    "method": "bilora",
    "auxiliary_optimizer": "power",
  },
  "LoRA-SAM r=8": {"method": "lora_sam"},
}
NAMES = tuple(_OPTIONS)
"""The methods that are timed by default."""
_TIMED = {fields["method"] for fields in _OPTIONS.values()}
_OTHERS = {
  name: {"method": name} for name in spec.every() if name not in _TIMED
}
ALL = (*NAMES, *_OTHERS)
"""`NAMES`, and every other method of the program by its own name."""
_PARTS = ("primary", "auxiliary")


def method(name: str, workload: Workload) -> methods.Method:
  """Returns a method of `ALL`, with AdamW and adapters on all linear layers."""
  config = _config(name)
  found = assemble.method_of(
    config, workload.model, workload.inputs, 1000, workload.objective
  )
  if name == _SEPARATE:
    found = found._replace(apply=separate(workload.model, workload.dtype))
  return found


def gradients(name: str) -> float:
  """Returns the gradients over the batch that a step of the method takes."""
  return _config(name).method.gradients


def _config(name: str) -> config_lib.Config:
  # Without a warm-up, all steps do the same work, from the first step on.
  return config_lib.build({"warmup_ratio": 0.0, **(_OPTIONS | _OTHERS)[name]})


def separate(model: nn.Module, dtype: Any) -> Callable[..., Any]:
  """Returns an `Adapted.apply` with separate products for the two adapters.

  A layer then has four thin products: y = x W + s (x a1) b1 + s (x a2) b2. The
  paper's implementation, with two PEFT adapters, has the same products.

  Args:
    model: a model whose linear layers are all `nn.Dense`.
    dtype: the dtype of the model's activations.
  """

  def apply(variables, adapters, *inputs, rngs=None):
    params: dict[Any, Any] = traverse_util.flatten_dict(variables["params"])
    params |= traverse_util.flatten_dict(adapters.get("extra", {}))
    scales = set()
    for part in _PARTS:
      pairs: dict[Any, Any] = traverse_util.flatten_dict(
        adapters[part], is_leaf=lambda _, x: isinstance(x, Factors)
      )
      for (*module, _), pair in pairs.items():
        scales.add(pair.scale)
        # The factors are put beside the kernel, so that `nn.scan` gives each
        # layer its own factors.
        params[*module, f"{part}_a"] = pair.a.astype(dtype)
        params[*module, f"{part}_b"] = pair.b.astype(dtype)
    (scale,) = scales

    def with_branches(layer, args, kwargs, context):
      y, dense = layer(*args, **kwargs), context.module
      if isinstance(dense, nn.Dense):
        for part in _PARTS:
          if dense.has_variable("params", f"{part}_a"):
            a = dense.get_variable("params", f"{part}_a")
            b = dense.get_variable("params", f"{part}_b")
            y = y + (args[0] @ a @ b) * scale
      return y

    with nn.intercept_methods(with_branches):
      return model.apply(
        {**variables, "params": traverse_util.unflatten_dict(params)},
        *inputs,
        rngs=rngs,
      )

  return apply
