"""The configuration of a run: groups of options, checks, and its JSON."""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
import re
from typing import Any

from .. import checked, options
from .. import plugins as plugins_lib
from ..data import options as data_options
from ..data import registry as tasks
from ..data.options import DataOptions
from ..devices.options import DeviceOptions
from ..errors import UsageError
from ..methods import spec as methods
from ..methods.options import AdapterOptions, OptimisationOptions
from ..models.options import ModelOptions
from .loggers import registry as loggers
from .options import EvaluationOptions, OutputOptions, after

# Options that may differ between two calls for the same run.
_NEUTRAL = {
  *("run_dir", "data_dir", "compilation_cache", "log_every", "mesh", "profile"),
  *("checkpoint_every", "eval_batch_size", "loggers", "samples", "plugins"),
  "accept_changes",
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The configuration of a run, in groups of options.

  Each group is defined in the room that uses it. All flags are different.
  """

  data: DataOptions = dataclasses.field(default_factory=DataOptions)
  model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
  method: methods.Chosen = dataclasses.field(default_factory=methods.default)
  adapter: AdapterOptions = dataclasses.field(default_factory=AdapterOptions)
  optimisation: OptimisationOptions = dataclasses.field(
    default_factory=OptimisationOptions
  )
  evaluation: EvaluationOptions = dataclasses.field(
    default_factory=EvaluationOptions
  )
  output: OutputOptions = dataclasses.field(default_factory=OutputOptions)
  devices: DeviceOptions = dataclasses.field(default_factory=DeviceOptions)
  plugins: plugins_lib.PluginOptions = dataclasses.field(
    default_factory=plugins_lib.PluginOptions
  )

  def folder(self) -> pathlib.Path:
    """The folder of the run."""
    task = self.data.task.replace("/", "-")
    seed = self.optimisation.seed
    return pathlib.Path(
      self.output.run_dir or f"runs/{task}-{self.method.name}-seed{seed}"
    )


GROUPS: dict[str, Any] = {
  field.name: field.type
  for field in dataclasses.fields(Config)
  if field.name != "method"
}
"""The groups of all methods; only methods with adapters have `adapter`."""


def groups(method: str) -> dict[str, Any]:
  """Returns the groups of options of a method's runs, with its own group."""
  spec = methods.get(method)
  found = {}
  for name, kind in GROUPS.items():
    if name == "adapter":
      found["method"] = spec.options
      if not spec.has_adapters:
        continue
    found[name] = kind
  return found


def kinds() -> dict[str, Any]:
  """Returns the types of all options of all methods, by flag."""
  found: dict[str, Any] = {"method": str}
  for group in (*GROUPS.values(), *_method_groups()):
    found |= {name: x.type for name, x in options.fields(group).items()}
  return found


def _method_groups() -> list[Any]:
  return [spec.options for spec in methods.every().values()]


def flat(config: Config) -> dict[str, Any]:
  """Returns all options of a configuration by flag."""
  found: dict[str, Any] = {"method": config.method.name}
  for name in groups(config.method.name):
    group = config.method.options if name == "method" else getattr(config, name)
    found |= options.values(group)
  return found


def build(given: Mapping[str, Any], where: str = "") -> Config:
  """Returns a configuration from options by flag.

  Args:
    given: the options; missing options have their defaults.
    where: where the options are from, for messages.

  Raises:
    UsageError: if an option is unknown, out of its bounds, or belongs to
      another method.
  """
  method = given.get("method", methods.DEFAULT)
  try:
    known = groups(method)
  except UsageError as error:
    raise UsageError(f"{where}{where and ': '}{error}") from error
  own = {flag: name for name, x in known.items() for flag in options.fields(x)}
  sorted_out: dict[str, dict[str, Any]] = {name: {} for name in known}
  for flag, value in given.items():
    if flag == "method":
      continue
    if flag not in own:
      raise UsageError(f"{where}{where and ': '}{misplaced(flag, method)}")
    sorted_out[own[flag]][flag] = value
  built = {
    name: options.build(known[name], values)
    for name, values in sorted_out.items()
  }
  for group in built.values():
    try:
      options.check(group)
    except UsageError as error:
      raise UsageError(f"{where}{where and ': '}{error}") from error
  chosen = methods.Chosen(method, built.pop("method"))
  return Config(method=chosen, **built)


def fitting(given: Mapping[str, Any]) -> dict[str, Any]:
  """Returns options without those of methods other than `given["method"]`."""
  method = given.get("method", methods.DEFAULT)
  other = set(kinds()) - set(flat(build({"method": method})))
  return {flag: value for flag, value in given.items() if flag not in other}


def replace(config: Config, **changes: Any) -> Config:
  """Returns the configuration with some options changed, by flag.

  If the method changes, options that only the old method has are removed.
  Options with the old method's default get the new method's default.
  """
  base, method = flat(config), changes.get("method", config.method.name)
  if method != config.method.name:
    defaults = options.values(type(config.method.options)())
    base = {
      flag: x
      for flag, x in base.items()
      if flag not in defaults or x != defaults[flag]
    }
  return build({**fitting({**base, "method": method}), **changes})


def misplaced(flag: str, method: str) -> str:
  """Returns a sentence on why a method refuses a flag."""
  name = options.spelt(flag)
  if flag in options.fields(AdapterOptions):
    return (
      f"{name} is an option of adapters, which --method {method} does not "
      "train; leave it out, or choose a method with adapters, such as "
      f"{methods.DEFAULT}."
    )
  having = methods.having(flag)
  if not having:
    return f"there is no option {name}."
  own = [options.spelt(x) for x in options.fields(methods.get(method).options)]
  return (
    f"{name} is an option of --method {having}; got --method {method}, "
    + (f"whose own options are {', '.join(own)}." if own else "which has none.")
  )


def check(config: Config) -> None:
  """Refuses a configuration that cannot be run, before any work starts.

  Raises:
    UsageError: if it cannot be run. The message names the option, its value and
      the allowed values.
  """
  for name in groups(config.method.name):
    group = config.method.options if name == "method" else getattr(config, name)
    options.check(group)
  data_options.check(config.data)
  adapter, optimisation = config.adapter, config.optimisation
  spec = config.method.spec
  spec.check(config.method.options, adapter, optimisation)
  if spec.trains == "parameters" and config.model.base_dtype != "float32":
    raise UsageError(
      f"--base-dtype must be float32 with --method {spec.name}, which trains "
      f"the weights and does not freeze them; got {config.model.base_dtype}."
    )
  if not spec.has_adapters and adapter != AdapterOptions():
    changed = (
      options.values(adapter).items() - options.values(AdapterOptions()).items()
    )
    raise UsageError(misplaced(sorted(changed)[0][0], spec.name))
  if optimisation.learning_rate * optimisation.weight_decay >= 1:
    raise UsageError(
      "--learning-rate times --weight-decay is the share of a weight that a "
      "step takes away, and must be below 1; got "
      f"{optimisation.learning_rate:g} times {optimisation.weight_decay:g}."
    )
  _check_adapter(config)
  _check_after(config)
  loggers.check(config.output.loggers)
  if config.output.diagnose_every and (
    not spec.has_auxiliary or config.model.quantised
  ):
    able = [x.name for x in methods.every().values() if x.has_auxiliary]
    raise UsageError(
      "--diagnose-every needs the auxiliary of --method "
      f"{options.listed(able, 'or')}, and a base that is not quantised; got "
      f"--method {spec.name} and --base-dtype {config.model.base_dtype}."
    )
  if optimisation.batch_size % optimisation.accumulate:
    raise UsageError(
      "--batch-size must be a multiple of --accumulate; got "
      f"{optimisation.batch_size} and {optimisation.accumulate}."
    )


def _check_after(config: Config) -> None:
  if not after(config.evaluation):
    return
  kind = tasks.get(config.data.task).kind
  if kind != "classification" or config.devices.mesh or config.model.quantised:
    raise UsageError(
      "--after is only for classification, on one device, with a base that is "
      f"not quantised; got --task {config.data.task}, which is for {kind}, "
      f"--mesh {config.devices.mesh or 'none'} and --base-dtype "
      f"{config.model.base_dtype}."
    )


def _check_adapter(config: Config) -> None:
  adapter, spec = config.adapter, config.method.spec
  if adapter.dora and spec.perturbs_weights:
    raise UsageError(
      "--dora is only for methods with adapters that do not perturb the whole "
      f"weights; got --method {spec.name}."
    )
  try:
    re.compile(adapter.targets)
  except (re.error, OverflowError, RecursionError) as error:
    raise UsageError(
      "--targets must be a regular expression; got "
      f"{options.shown(adapter.targets)}: {error}."
    ) from error
  if adapter.path:
    _check_folder(adapter)
  elif adapter.new_head:
    raise UsageError(
      "--new-head leaves out the head in the folder of --adapter; got it "
      "without --adapter, and then the head is always new."
    )
  if adapter.start != "uniform" and adapter.path:
    raise UsageError(
      "--start is the initialisation of new adapters, and --adapter gives "
      f"trained ones; got --start {adapter.start} with --adapter."
    )
  if adapter.start in ("pissa", "olora", "lora_ga"):
    wrong = {
      "--mesh": config.devices.mesh,
      "--base-dtype": config.model.quantised,
      "--dora": adapter.dora,
      "--keep-auxiliary": spec.keeps_auxiliary(config.method.options),
    }
    given = [name for name, value in wrong.items() if value]
    if given:
      raise UsageError(
        f"--start {adapter.start} takes a part out of the base. It needs one "
        "device, a base that is not quantised, and a primary adapter that is "
        f"kept alone; got it with {' and '.join(given)}."
      )


def _check_folder(adapter: AdapterOptions) -> None:
  for name in ("rank", "alpha", "targets", "dora"):
    value = getattr(adapter, name)
    if value != getattr(AdapterOptions(), name):
      raise UsageError(
        "the folder of --adapter sets the ranks, alphas, targets and DoRA, so "
        f"leave out {options.spelt(name)}; got {value}."
      )
  try:
    there = checked.is_file(pathlib.Path(adapter.path) / "adapter_config.json")
  except UsageError as error:
    raise UsageError(f"--adapter: {error}") from error
  if not there:
    raise UsageError(
      "--adapter must be a folder with adapter_config.json and "
      f"adapter_model.safetensors; got {adapter.path}, which has none."
    )


def nested(config: Config) -> dict[str, Any]:
  """Returns the configuration as tables for JSON, one for each group."""
  found: dict[str, Any] = {}
  for name in groups(config.method.name):
    if name == "method":
      own = options.values(config.method.options)
      found[name] = {"method": config.method.name, **own}
    else:
      found[name] = options.values(getattr(config, name))
  return found


def to_json(config: Config) -> str:
  """Returns the configuration as JSON, with an option on each line."""
  return json.dumps(nested(config), indent=2) + "\n"


def from_tables(where: str, tables: Any) -> dict[str, Any]:
  """Returns options by flag, from tables of groups or from one table.

  Args:
    where: where the tables are, for messages.
    tables: the result of `nested`; it may also have options outside of groups.

  Raises:
    UsageError: if an option is unknown or has a wrong type.
  """
  every = kinds()
  options.known(where, tables, [*GROUPS, *every], "option or group")
  rows = [tables] + [x for x in tables.values() if isinstance(x, Mapping)]
  given: dict[str, Any] = {}
  for row in rows:
    for flag, value in row.items():
      if row is tables and isinstance(value, Mapping):
        if flag not in (*GROUPS, "method"):
          raise UsageError(
            f"{where}: {flag} must be {options.wanted(every[flag])}; got "
            f"{options.shown(value)}."
          )
        continue
      options.known(where, {flag: value}, every, "option")
      given[flag] = options.checked(where, flag, value, every[flag])
  return given


def from_run(folder: pathlib.Path) -> Config:
  """Returns the configuration of a run of this or an older version.

  Raises:
    UsageError: if there is no such run, or its file cannot be read.
  """
  path = folder / "config.json"
  if not checked.is_file(path):
    raise UsageError(f"{folder} is not a run: {path} is missing.")
  tables = checked.read_json(path)
  if isinstance(tables.get("plugins"), Mapping):
    plugins_lib.load(
      checked.field(str(path), tables["plugins"], "plugins", str, "")
    )
  # Older runs have one table with the options of all methods.
  return from_any(str(path), tables)


def from_any(where: str, tables: Any) -> Config:
  """Returns the configuration in tables, without options of other methods.

  Raises:
    UsageError: if an option is unknown, has a wrong type or is out of its
      bounds.
  """
  given = from_tables(where, tables)
  # This option was only for the command that wrote the tables.
  given.pop("accept_changes", None)
  build({"method": given.get("method", methods.DEFAULT)}, where)
  return build(fitting(given), where)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
  """Returns the differences of two configurations that change the results."""
  there, here = flat(old), flat(new)
  return {
    name: (there.get(name), here.get(name))
    for name in {**there, **here}
    if name not in _NEUTRAL and there.get(name) != here.get(name)
  }
