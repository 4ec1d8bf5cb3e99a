"""`python -m train`, or `bilora` where it is installed: the command line."""

from collections.abc import Sequence
import sys

from . import command

with command.needing_the_extra():
  from . import config as config_lib
  from .devices import processes
  from .errors import LostError, RunError, UsageError


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
    config = config_lib.parse(argv)
    from .run import loop

    place, _ = config_lib.start().parse_known_args(argv)
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


def program() -> int:
  """What the program runs: `main`, watched if it is one of several."""
  place, _ = config_lib.start().parse_known_args()
  several = place.coordinator or processes.in_cluster()
  with command.needing_the_extra():
    return processes.watched(main) if several else main()


if __name__ == "__main__":
  sys.exit(program())
