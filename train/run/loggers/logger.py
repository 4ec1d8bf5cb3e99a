"""What a logger is: told of a run as it goes, in the first process alone."""

from collections.abc import Mapping
import pathlib
from typing import Any, NamedTuple, Protocol


class Logger(Protocol):
  """Is told of a run as it goes; what it does not define does nothing."""

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Takes scalars of a step; several calls may be of one step.

    Raises:
      OSError: if they cannot be written.
    """

  def say(self, sentence: str) -> None:
    """Takes a sentence for the user."""

  def advance(self, step: int) -> None:
    """Is told of each step."""

  def close(self) -> None:
    """Is told of the end of the run, or of its interruption."""


class Opened(NamedTuple):
  """The run that a logger is of.

  Attributes:
    folder: of the run.
    step: after which it begins or resumes; what was logged of later steps is
      logged again.
    total: steps of the whole run.
    config: all options of the run by their flags.
  """

  folder: pathlib.Path
  step: int
  total: int
  config: Mapping[str, Any]
