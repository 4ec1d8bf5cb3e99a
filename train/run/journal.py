"""The journal of a run, which passes numbers and sentences to all loggers."""

from collections.abc import Sequence
import contextlib

from .. import command
from ..devices import processes
from ..errors import RunError
from .loggers import jsonl, registry, tensorboard, terminal
from .loggers.logger import Logger, Opened


class Journal:
  """All loggers of a run; without loggers, it does nothing."""

  def __init__(self, loggers: Sequence[Logger] = (), name: str = ""):
    """Makes a journal of several loggers.

    Args:
      loggers: the loggers of the run.
      name: the name of the run, for messages.
    """
    self._loggers = loggers
    self._name = name

  @property
  def is_heard(self) -> bool:
    """Whether the journal has loggers, as in the process that writes."""
    return bool(self._loggers)

  def log(self, step: int, **values: float | None) -> None:
    """Logs scalars of a step, except those that are None.

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
    """Passes a sentence for the user to all loggers."""
    for logger in self._loggers:
      logger.say(sentence)

  def advance(self, step: int) -> None:
    """Tells all loggers that a step is done."""
    for logger in self._loggers:
      logger.advance(step)

  def close(self) -> None:
    """Closes all loggers."""
    with contextlib.ExitStack() as stack:
      for logger in self._loggers:
        stack.callback(logger.close)


def make(opened: Opened, more: str = "") -> Journal:
  """Returns the journal of a run, which has loggers only in the first process.

  Args:
    opened: the run.
    more: the value of `--loggers`.

  Raises:
    UsageError: if a logger of `--loggers` cannot be opened.
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
