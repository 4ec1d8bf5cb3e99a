"""The interface of loggers, which run only in the first process."""

from collections.abc import Mapping
import pathlib
from typing import Any, NamedTuple, Protocol


class Logger(Protocol):
  """Gets the numbers and sentences of a run.

  Methods that a logger does not define do nothing.
  """

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Gets scalars of a step; a step may have several calls.

    Raises:
      OSError: if they cannot be written.
    """

  def say(self, sentence: str) -> None:
    """Gets a sentence for the user."""

  def advance(self, step: int) -> None:
    """Is called after each step."""

  def close(self) -> None:
    """Is called when the run ends or is interrupted."""


class Opened(NamedTuple):
  """The run of a logger.

  Attributes:
    folder: the folder of the run.
    step: the step after which the run begins or resumes. Later steps are logged
      again.
    total: the steps of the whole run.
    config: all options of the run by flag.
  """

  folder: pathlib.Path
  step: int
  total: int
  config: Mapping[str, Any]
