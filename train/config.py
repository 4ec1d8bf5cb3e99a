"""Builds a configuration from a command line: presets, files and options."""

import argparse
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import pathlib
from typing import Annotated, Any, Literal

import tyro
import yaml

from . import checked, command, options, plugins, presets
from .errors import UsageError
from .methods import spec as methods
from .run import config as config_lib
from .run.config import Config

# The most bytes of a configuration file, and its deepest nesting.
_LONGEST, _DEEPEST = 2**20, 100
_EXAMPLES = """\
examples:
  {program} --preset snippets
  {program} --task classification --data reviews.csv --run-dir runs/reviews
  {program} --method lora_sam --rho 0.01 --help

{program} --help lists the options of the method that --method names. Each of
these commands has its own --help:
  predict    label new rows with a finished run
  evaluate   test a finished run on labelled rows
  generate   print what a model answers to prompts
  export     write adapters for PEFT or a model for transformers
  compile    compute what a training step needs, without the devices
  study      compare methods on tasks, over several seeds

--preset NAME starts from a preset: {presets}.
Without --preset, --config and --from-run the program uses the first preset,
unless --task names another task than that of this preset.
--config FILE.yaml starts from a file, whose options stand alone or in the
groups of a run's config.json.
--from-run DIR repeats a run with the same configuration, in the folder
DIR-repeat unless --run-dir is given.

Options on the command line change what the preset, the file or the run sets.
The same command resumes a run that was interrupted.

On several machines, start the same command on each, with --num-processes N and
with --process-id I (from 0) and --coordinator HOST:PORT (address of process 0).
Under srun, under mpirun and on TPU pods of Kubernetes these options are not
needed. Other TPU pods need --coordinator auto. All machines must see the
folders of --run-dir and --data-dir."""


def start() -> argparse.ArgumentParser:
  """Returns a parser of the options that are no field of a configuration."""
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument("--preset")
  parser.add_argument("--from-run", type=pathlib.Path)
  parser.add_argument("--config", type=pathlib.Path)
  parser.add_argument("--coordinator")
  parser.add_argument("--num-processes", type=int)
  parser.add_argument("--process-id", type=int)
  return parser


def parse(argv: Sequence[str], program: str = command.NAME) -> Config:
  """Returns the configuration for a command line.

  Raises:
    UsageError: if a preset, a run, a file or an option is wrong.
    SystemExit: with code 2, if an option is unknown; with 0 after `--help`.
  """
  known, rest = start().parse_known_args(argv)
  plugins.load(_given(rest, "plugins") or "")
  base = _base(known, rest)
  method = _given(rest, "method") or base.method.name
  methods.get(method)
  base = config_lib.replace(base, method=method)
  _check_flags(rest, method)
  kind = _cli_type(method, options.asks_for_help(rest))
  found = tyro.cli(
    kind,
    default=_cli_value(base, kind),
    args=rest,
    prog=program,
    description=(
      "Fine-tunes a pretrained model with Bi-LoRA or another method, tests it"
      " and writes a report.\n\n"
      + _EXAMPLES.format(program=program, presets=presets.listed())
    ),
    config=(
      tyro.conf.OmitArgPrefixes,
      tyro.conf.OmitSubcommandPrefixes,
      # The fields have docstrings. A search for comments would take as long as
      # everything else together.
      tyro.conf.HelptextFromCommentsOff,
    ),
  )
  given: dict[str, Any] = {"method": method}
  for name, kind in config_lib.groups(method).items():
    group = getattr(found, name)
    given |= {
      flag: getattr(group, field.name)
      for flag, field in options.fields(kind).items()
    }
  return config_lib.build(given)


def _base(known: argparse.Namespace, rest: Sequence[str]) -> Config:
  """Returns the configuration before the options of the command line."""
  given = {
    "--preset": known.preset,
    "--from-run": known.from_run,
    "--config": known.config,
  }
  several = [name for name, value in given.items() if value]
  if len(several) > 1:
    raise UsageError(f"{' and '.join(several)} cannot be given together.")
  if known.preset:
    return presets.get(known.preset)
  if known.config:
    return from_file(known.config)
  if known.from_run:
    old = known.from_run.absolute()
    return config_lib.replace(
      config_lib.from_run(known.from_run),
      run_dir=str(old.with_name(old.name + "-repeat")),
    )
  # The first preset fits only its own task, so other tasks do not use it.
  first = next(iter(presets.PRESETS.values()))
  task = _given(rest, "task")
  return first if task in (None, first.data.task) else Config()


def from_file(path: pathlib.Path) -> Config:
  """Returns the configuration in a YAML file.

  Raises:
    UsageError: if the file cannot be read, or is not a configuration.
  """
  text = checked.read_text(path, _LONGEST)
  steps = ((sign in "[{") - (sign in "]}") for sign in text)
  # The time of the YAML reader grows with the square of the depth.
  if max(itertools.accumulate(steps), default=0) > _DEEPEST:
    raise UsageError(f"--config {path} is nested too deeply.")
  try:
    tables = yaml.safe_load(text)
  # Python code of the reader recurses into nested values, and makes dates and
  # numbers, so it may also raise RecursionError and ValueError.
  except RecursionError as error:
    raise UsageError(f"--config {path} is nested too deeply.") from error
  except (yaml.YAMLError, ValueError) as error:
    raise UsageError(
      f"--config {path} is not YAML: {' '.join(str(error).split())}."
    ) from error
  where = f"--config {path}"
  if isinstance(tables, dict):
    group = tables.get("plugins")
    own = group.get("plugins") if isinstance(group, dict) else group
    plugins.load(own if isinstance(own, str) else "")
  return config_lib.build(
    config_lib.from_tables(where, {} if tables is None else tables), where
  )


def _given(argv: Sequence[str], name: str) -> str | None:
  """Returns the last value of an option on a command line, or None."""
  found = None
  for arg, following in zip(argv, [*argv[1:], None]):
    if arg == f"--{name}":
      found = following
    elif arg.startswith(f"--{name}="):
      found = arg.partition("=")[2]
  return found


def _check_flags(argv: Sequence[str], method: str) -> None:
  """Refuses an option that belongs only to other methods."""
  own = {
    flag
    for group in config_lib.groups(method).values()
    for flag in options.fields(group)
  }
  for arg in argv:
    flag = arg.partition("=")[0].removeprefix("--").replace("-", "_")
    positive = flag.removeprefix("no_")
    if not arg.startswith("--") or flag in own or positive in own:
      continue
    for name in (flag, positive):
      if name in config_lib.kinds() and name != "method":
        raise UsageError(config_lib.misplaced(name, method))


@functools.cache
def _cli_type(method: str, explained: bool) -> Any:
  """Returns a dataclass of the groups of a method, for Tyro.

  The group of the method also has the option --method.

  Args:
    method: the name of the method.
    explained: whether each option gets the text that `--help` shows.
  """
  every = methods.every()
  name = tyro.conf.arg(
    name="method",
    help="Training method. The number in brackets is the number of gradients "
    "that a step takes. "
    + ". ".join(
      f"{spec.name} [{spec.gradients(spec.options()):g}]: {spec.summary}"
      for spec in every.values()
    )
    + ".",
    help_behavior_hint=f"default: {method}",
  )
  chosen = dataclasses.make_dataclass(
    "Method",
    [("name", Annotated[Literal[tuple(every)], name])],
    frozen=True,
  )
  fields: list[Any] = []
  for group, kind in config_lib.groups(method).items():
    bases: tuple[type, ...] = (kind,)
    if group == "method":
      # A dataclass begins with the fields of its last base, so --method comes
      # before the method's options.
      bases = (kind, chosen)
    help_of = options.help_texts(kind) if explained else {}
    annotated = [
      (
        x.name,
        Annotated[x.type, tyro.conf.arg(name=flag, help=help_of.get(x.name))],
        _field(x),
      )
      for flag, x in options.fields(kind).items()
      if explained or flag != x.name
    ]
    fields.append(
      (
        group,
        dataclasses.make_dataclass(
          kind.__name__, annotated, bases=bases, frozen=True
        ),
      )
    )
  return dataclasses.make_dataclass("Options", fields, frozen=True)


def _field(field: dataclasses.Field) -> Any:
  return dataclasses.field(default=field.default, metadata=field.metadata)


def _cli_value(config: Config, kind: Any) -> Any:
  """Returns the configuration as an instance of a `_cli_type`."""
  values = {}
  for field in dataclasses.fields(kind):
    group, extra = getattr(config, field.name), {}
    if field.name == "method":
      group, extra = config.method.options, {"name": config.method.name}
    own = {x.name: getattr(group, x.name) for x in dataclasses.fields(group)}
    group_type: Any = field.type
    values[field.name] = group_type(**own, **extra)
  return kind(**values)
