"""The logger of the terminal: lines, and a progress bar below them."""

from collections.abc import Mapping
import sys

from rich import console as rich_console
from rich import progress as rich_progress

from .logger import Logger, Opened

_BAR_WIDTH = 20


class Terminal(Logger):
  """Prints a line for each logged step.

  On a terminal, the last line is a progress bar with the steps, the remaining
  time and the loss.
  """

  def __init__(
    self,
    opened: Opened,
    console: rich_console.Console | None = None,
  ):
    self._console = console or rich_console.Console()
    self._bar = None
    if self._console.is_terminal if console else sys.stdout.isatty():
      self._bar = rich_progress.Progress(
        rich_progress.TextColumn("step"),
        rich_progress.MofNCompleteColumn(),
        rich_progress.BarColumn(_BAR_WIDTH),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[loss]}"),
        console=self._console,
      )
      self._task = self._bar.add_task(
        "", total=opened.total, completed=opened.step, loss=""
      )
      self._bar.start()

  def log(self, step: int, values: Mapping[str, float]) -> None:
    text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    if self._bar is not None and "loss" in values:
      self._bar.update(self._task, loss=f"loss {values['loss']:.4g}")
    self.say(f"step {step:>6}  {text}")

  def say(self, sentence: str) -> None:
    # The console prints above the progress bar.
    self._console.print(
      sentence, markup=False, emoji=False, highlight=False, soft_wrap=True
    )

  def advance(self, step: int) -> None:
    if self._bar is not None:
      self._bar.update(self._task, completed=step)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.stop()
