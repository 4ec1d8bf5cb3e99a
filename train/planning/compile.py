"""`python -m train compile`: what a step needs, before one rents devices."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp

from .. import checked, files
from ..data import objectives
from ..devices import mesh as mesh_lib
from ..errors import UsageError
from ..models import registry
from ..models.family import Family
from ..models.io import weights
from ..run import assemble, lowering
from ..run import config as config_lib
from ..run.config import Config
from . import figures, topology
from .options import Compile

# The compiler says "Used 20.15G of 15.75G hbm"; or, if temporary arrays alone
# are too large, "(32.00G) exceeds available HBM (15.75G)".
_EXHAUSTED = re.compile(
  r"Used ([\d.]+ ?[KMG]) of|\(([\d.]+ ?[KMG])\) exceeds available"
)


def main(options: Compile) -> int:
  """Runs the command.

  Returns:
    0; 1 if a step does not fit its devices.

  Raises:
    UsageError: if the options are invalid.
  """
  configs = [_config(options, name) for name in options.method.split(",")]
  model, layout = _sizes(options), _layout(options)
  assemble.check_layout(layout, options.remat, model[0], (options.max_length,))
  if options.json:
    files.check_place("--json", pathlib.Path(options.json))
  used = jax.devices()[:1] if layout.mesh is None else layout.mesh.devices.flat
  memory = topology.memory(used[0])
  found: list[figures.Figures] = []
  too_large = {}
  for config in configs:
    print(f"compiling {config.method.name} ...", file=sys.stderr)
    try:
      found.append(_figures(options, config, model, layout, len(used)))
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      too_large[config.method.name] = _needed(str(error))
  if memory is not None:
    too_large |= {
      x.method: figures.gib(x.peak) for x in found if x.peak > memory
    }
  print(
    f"{options.model} on {len(used)} x {used[0].device_kind}, "
    f"{options.batch_size} rows of {options.max_length} tokens; for each device"
  )
  if found:
    print(figures.table(found))
  for method, needed in too_large.items():
    print(
      f"{method} does not fit: it needs {needed}, and a program may use "
      f"{figures.gib(memory) if memory else 'less'} of a device. To need "
      "less, use more devices along fsdp, --remat full, a greater "
      "--accumulate or a smaller --batch-size."
    )
  if memory is None:
    print(f"The memory of a {used[0].device_kind} is not known here.")
  elif not too_large:
    print(f"Fits: a program may use {figures.gib(memory)} of a device.")
  if options.json:
    _write(options, found, too_large, memory)
  return 1 if too_large else 0


def _layout(options: Compile) -> mesh_lib.Layout:
  devices = None
  if options.topology:
    devices = topology.devices(options.topology)
    if not options.mesh:
      raise UsageError(
        f"--topology {options.topology} needs a --mesh of its devices, for "
        f"example fsdp={len(devices)}."
      )
  return mesh_lib.make(
    options.mesh, options.batch_size // options.accumulate, devices
  )


def _config(options: Compile, method: str) -> Config:
  fields = config_lib.kinds()
  own = dataclasses.asdict(options) | {"method": method}
  config = config_lib.build(
    config_lib.fitting({k: v for k, v in own.items() if k in fields})
  )
  config_lib.check(config)
  return config


def _sizes(options: Compile) -> tuple[Family, Any]:
  """Returns the model's family and its sizes."""
  name = options.model
  families = [x for x in registry.families() if x.converses]
  known = {size: family for family in families for size in family.sizes}
  folder = pathlib.Path(name)
  if name in known:
    family = known[name]
    sizes = family.sizes[name]
  elif checked.is_folder(folder):
    try:
      config = weights.read_config(folder)
      family = registry.by_model_type(config.get("model_type"), families)
      sizes = family.config.from_hf(config)
    except ValueError as error:
      raise UsageError(f"--model {name}: {error}") from error
  else:
    raise UsageError(
      f"--model must be one of {', '.join(known)}, or a folder with a "
      f"config.json; got {name!r}."
    )
  if options.max_length > sizes.max_positions:
    raise UsageError(
      f"--max-length must be at most {sizes.max_positions}, the positions "
      f"that {name} was made for; got {options.max_length}."
    )
  return family, sizes


def _figures(
  options: Compile,
  config: Config,
  model: tuple[Family, Any],
  layout: mesh_lib.Layout,
  devices: int,
) -> figures.Figures:
  return figures.of(
    config.method.name,
    _lowered(options, config, model, layout).compile(
      topology.WITHOUT_GPU if topology.is_gpu(options.topology) else None
    ),
    _flops(options, config, *model) / devices,
  )


def _lowered(
  options: Compile,
  config: Config,
  model: tuple[Family, Any],
  layout: mesh_lib.Layout,
  **of_module: Any,
) -> jax.stages.Lowered:
  family, sizes = model
  assert family.language_model is not None
  module = family.language_model(
    sizes,
    dtype=jnp.dtype(config.model.dtype),
    param_dtype=jnp.dtype(config.model.param_dtype),
    remat=options.remat,
    scan=options.scan_layers,
    **of_module,
  )
  objective = objectives.NEXT_TOKEN
  batch = lowering.next_token_batch(options.batch_size, options.max_length)
  inputs = objective.inputs(batch)
  try:
    method = assemble.method_of(config, module, inputs, 1000, objective)
  except ValueError as error:
    raise UsageError(str(error)) from error
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  variables, state = lowering.abstract(
    config, method, layout, shapes, family.logical_axes(shapes)
  )
  return lowering.lower(
    layout, method, objective, variables, state, batch, options.accumulate
  )


def _flops(
  options: Compile, config: Config, family: Family, sizes: Any
) -> float:
  """Returns the operations of a step, over all devices together.

  XLA counts one turn of a loop. So the layers are not scanned here, the batch
  is not accumulated, and the logits are not computed in chunks. All layers are
  equal, so programs with one and two layers give the number for all layers.
  """
  plain = dataclasses.replace(options, scan_layers=False, accumulate=1)

  def of(layers):
    lowered = _lowered(
      plain,
      config,
      (family, dataclasses.replace(sizes, num_layers=layers)),
      mesh_lib.Layout(),
      logits_bytes=sys.maxsize,
    )
    cost = lowered.cost_analysis()
    assert cost is not None
    return cost["flops"]

  one = of(1)
  return one + (sizes.num_layers - 1) * (of(2) - one)


def _needed(message: str) -> str:
  """Returns the memory that a program needs, from XLA's error message."""
  found = _EXHAUSTED.search(message)
  if found is None:
    return "more than there is"
  size = found[1] or found[2]
  return f"{size[:-1].strip()} {size[-1]}iB"


def _write(
  options: Compile,
  found: Sequence[figures.Figures],
  too_large: Mapping[str, str],
  memory: int | None,
) -> None:
  files.write_json(
    pathlib.Path(options.json),
    {
      "options": dataclasses.asdict(options),
      "usable_bytes": memory,
      "does_not_fit": dict(too_large),
      "figures": [dataclasses.asdict(x) for x in found],
    },
  )
