"""The command line: `python -m train`, or `bilora` after an installation."""

from . import interrupts

with interrupts.leaving():
  from collections.abc import Sequence
  import difflib
  import errno
  import importlib
  import sys

  from . import command

  with command.needing_the_extra():
    from . import config as config_lib
    from . import options
    from .devices import launch
    from .errors import LostError, RunError, UsageError

_ROOMS = {
  "predict": "finished",
  "evaluate": "finished",
  "generate": "finished",
  "export": "finished",
  "compile": "planning",
}
"""The room of each command.

The room has a module with the name of the command, and this module has a
`main`. The argument of `main` is an instance of the class with the name of the
command in the room's `options`.
"""
_NAMES = (*_ROOMS, "study")
_LONG = {
  "": command.RESUMES,
  "study": "the same command runs the unfinished part.",
}
"""How a user continues a stopped command, for each command that trains."""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the program. Returns 0, 1 for a failed run, or 2 for wrong usage."""
  argv = list(sys.argv[1:] if argv is None else argv)
  name = argv[0] if argv and argv[0] in _NAMES else ""
  try:
    if not name and argv and not argv[0].startswith("-"):
      near = difflib.get_close_matches(argv[0], _NAMES, n=1)
      hint = f" Did you mean {near[0]}?" if near else ""
      raise UsageError(
        f"There is no command {argv[0]!r}; the commands are "
        f"{', '.join(_NAMES)}. Options without a command train a "
        f"model.{hint}"
      )
    if not name:
      return _train(argv)
    if name == "study":
      from .study import main as study

      return study.main(argv[1:])
    room = f"{__package__}.{_ROOMS[name]}"
    with interrupts.leaving(within=True):
      kinds = importlib.import_module(f"{room}.options")
    found = options.parse(
      getattr(kinds, name.title()), argv[1:], f"{command.NAME} {name}"
    )
    # Imported late, so that --help and typing errors get an answer at once.
    with interrupts.leaving(within=True):
      module = importlib.import_module(f"{room}.{name}")
    return module.main(found)
  except LostError as error:
    print(f"error: {error}", file=sys.stderr)
    launch.leave(1)
  except RunError as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except ValueError as error:
    if name in _LONG and not isinstance(error, UsageError):
      raise
    print(f"error: {error}", file=sys.stderr)
    return 2
  except OSError as error:
    print(f"error: {_told(name, error)}", file=sys.stderr)
    return 1


def _told(name: str, error: OSError) -> str:
  """Returns a sentence with the file, the error and a remedy."""
  sentence = str(error)
  if error.strerror and error.filename:
    sentence = f"{error.filename}: {error.strerror}."
  if name in _LONG and error.errno in (errno.ENOSPC, errno.EDQUOT):
    # Files are replaced as a whole, so a full disk damages no file.
    sentence += f" When there is space, {_LONG[name]}"
  return sentence


def _train(argv: Sequence[str]) -> int:
  config = config_lib.parse(argv)
  with interrupts.leaving(within=True):
    from .devices import processes
    from .run import loop

  place, _ = config_lib.start().parse_known_args(argv)
  processes.join(place.coordinator, place.num_processes, place.process_id)
  loop.run(config, [*command.NAME.split(), *argv])
  return 0


def program() -> int:
  """Runs `main`; watches it if this process is one of several.

  Returns:
    The exit code of `main`; 130 after a Ctrl-C.
  """
  try:
    with interrupts.interruptible(), command.needing_the_extra():
      place, _ = config_lib.start().parse_known_args()
      several = place.coordinator or launch.in_cluster()
      return launch.watched(main) if several else main()
  except SystemExit as end:
    if end.code == interrupts.CODE:
      interrupts.leave(told=True)
    raise


if __name__ == "__main__":
  sys.exit(program())
