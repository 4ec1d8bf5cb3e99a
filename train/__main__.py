"""`python -m train`, or `bilora` where it is installed: the command line."""

import argparse
from collections.abc import Sequence
import dataclasses
import pathlib
import sys

from . import command

with command.needing_the_extra():
  import tyro

  from . import presets
  from .devices import processes
  from .errors import LostError, RunError, UsageError
  from .run import config as config_lib


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the program. Returns 0, 1 for a failed run, or 2 for bad usage."""
  argv = list(sys.argv[1:] if argv is None else argv)
  # Imported late, so that --help and a typo answer at once.
  if argv[:1] == ["compile"]:
    from .planning import compile

    return compile.main(argv[1:])
  if argv[:1] == ["export"]:
    from .finished import export

    return export.main(argv[1:])
  if argv[:1] == ["generate"]:
    from .finished import generate

    return generate.main(argv[1:])
  if argv[:1] == ["study"]:
    from .study import main as study

    return study.main(argv[1:])
  try:
    config = parse(argv)
    from .run import loop

    place, _ = _start().parse_known_args(argv)
    processes.join(place.coordinator, place.num_processes, place.process_id)
    loop.run(config, [*command.NAME.split(), *argv])
  except UsageError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except LostError as error:
    print(f"error: {error}", file=sys.stderr)
    processes.leave(1)
  except RunError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except OSError as error:
    # A full disk, mostly: what is written whole stays whole.
    print(f"error: {error}; the same command resumes.", file=sys.stderr)
    return 1
  return 0


def parse(argv: Sequence[str]) -> config_lib.Config:
  """The configuration that a command line asks for.

  Raises:
    UsageError: if a preset or run is unknown.
    SystemExit: with code 2, if an option is; with 0 after `--help`.
  """
  known, rest = _start().parse_known_args(argv)
  if known.preset and known.from_run:
    raise UsageError("--preset and --from-run exclude each other.")
  # The first preset is for a task of its own; other tasks start from nothing.
  named = any(arg.split("=")[0] == "--task" for arg in rest)
  default = config_lib.Config()
  if not named:
    default = next(iter(presets.PRESETS.values()))
  if known.preset:
    default = presets.get(known.preset)
  elif known.from_run:
    default = config_lib.from_run(known.from_run)
    old = known.from_run.absolute()
    repeat = old.with_name(old.name + "-repeat")
    default = dataclasses.replace(default, run_dir=str(repeat))
  return tyro.cli(
    config_lib.Config,
    default=default,
    args=rest,
    prog=command.NAME,
    description=(
      "Fine-tunes a pretrained model with Bi-LoRA, LoRA or all its parameters,"
      " and reports what came of it. The same command resumes a run.\n\n"
      f"{command.NAME} compile --help: what a step takes, before chips are"
      f" rented.\n{command.NAME} generate --help: what a decoder says.\n"
      f"{command.NAME} export --help: adapters for PEFT, models for"
      " transformers.\n"
      f"{command.NAME} study --help: methods, tasks and seeds.\n\n"
      f"--preset NAME starts from one of: {presets.listed()} (the first is the"
      " default, unless --task is given).\n--from-run DIR repeats"
      " a run with its own configuration, in DIR-repeat unless --run-dir is"
      " given.\nOptions after them change what they set.\n\n"
      "On several machines, each starts the same command with --coordinator"
      " HOST:PORT (of the first), --num-processes N and --process-id I (from"
      " 0). Under srun, mpirun and on TPU pods of Kubernetes none of these is"
      " needed; --coordinator auto is for other TPU pods. --run-dir and"
      " --data-dir are folders that all see."
    ),
  )


def _start() -> argparse.ArgumentParser:
  """The options that are no field of a configuration."""
  start = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  start.add_argument("--preset")
  start.add_argument("--from-run", type=pathlib.Path)
  start.add_argument("--coordinator")
  start.add_argument("--num-processes", type=int)
  start.add_argument("--process-id", type=int)
  return start


def program() -> int:
  """What the program runs: `main`, watched if it is one of several."""
  place, _ = _start().parse_known_args()
  several = place.coordinator or processes.in_cluster()
  with command.needing_the_extra():
    return processes.watched(main) if several else main()


if __name__ == "__main__":
  sys.exit(program())
