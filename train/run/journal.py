"""What a run writes down as it goes: to all of its loggers, as to one."""

from collections.abc import Sequence
import contextlib

from .. import command
from ..devices import processes
from ..errors import RunError
from .loggers import jsonl, registry, tensorboard, terminal
from .loggers.logger import Logger, Opened


class Journal:
  """All loggers of a run; with none it is silent."""

  def __init__(self, loggers: Sequence[Logger] = (), name: str = ""):
    """Logs to several.

    Args:
      loggers: of the run.
      name: of the run, for a message.
    """
    self._loggers = loggers
    self._name = name

  @property
  def is_heard(self) -> bool:
    """Whether this is the process that writes and prints."""
    return bool(self._loggers)

  def log(self, step: int, **values: float | None) -> None:
    """Logs scalars of a step; those that are None are left out.

    Raises:
      RunError: if they cannot be written.
    """
    known = {k: v for k, v in values.items() if v is not None}
    for logger in self._loggers:
      try:
        logger.log(step, known)
      except OSError as error:
        raise RunError(
          f"the metrics of step {step} of {self._name} could not be written: "
          f"{error.strerror or error}; {command.RESUMES}"
        ) from error

  def say(self, sentence: str) -> None:
    """Tells the user a sentence."""
    for logger in self._loggers:
      logger.say(sentence)

  def advance(self, step: int) -> None:
    """Says that a step is done."""
    for logger in self._loggers:
      logger.advance(step)

  def close(self) -> None:
    """Ends all loggers."""
    with contextlib.ExitStack() as stack:
      for logger in self._loggers:
        stack.callback(logger.close)


def make(opened: Opened, more: str = "") -> Journal:
  """The journal of a run; silent in all processes but the first.

  Args:
    opened: the run.
    more: the loggers of `--loggers`.

  Raises:
    UsageError: if one of these cannot be opened.
  """
  if not processes.is_first():
    return Journal()
  added = registry.make(more, opened)
  return Journal(
    [
      jsonl.Rows(opened),
      tensorboard.Board(opened),
      terminal.Terminal(opened),
      *added,
    ],
    str(opened.folder),
  )
