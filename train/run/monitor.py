"""Times and metrics of the steps of a window, traces, and signals."""

import os
import pathlib
import signal
import time

import jax

from . import step

_STOPS = (
  b"stopping: the step is finished and saved first; a second Ctrl-C stops at "
  b"once.\n"
)


class Window:
  """The steps since the last line of metrics, and the time they took."""

  def __init__(self, at: int):
    self._restart(at)

  def _restart(self, at: int) -> None:
    self._start: float | None = time.perf_counter()
    self._at = at
    # Kept on the device, so that steps are dispatched ahead.
    self._rows: list[step.Metrics] = []
    self._seen = 0

  def add(self, metrics: step.Metrics) -> None:
    self._rows.append(metrics)

  def fresh(self) -> list[step.Metrics]:
    """The metrics of the steps since it was last called."""
    rows = jax.device_get(self._rows[self._seen :])
    self._seen = len(self._rows)
    return rows

  def discard_time(self) -> None:
    """Leaves the time out: something else took some of it."""
    self._start = None

  def close(
    self, at: int
  ) -> tuple[list[step.Metrics], dict[str, float | None]]:
    """The metrics of each step, and times: none if its time was discarded."""
    rows = jax.device_get(self._rows)
    times: dict[str, float | None] = {}
    if self._start is not None:
      seconds = time.perf_counter() - self._start
      times = {
        "step_seconds": seconds / (at - self._at),
        "tokens_per_second": sum(int(row.tokens) for row in rows) / seconds,
      }
    self._restart(at)
    return rows, times


class Profile:
  """A trace of some steps, for TensorBoard or Perfetto."""

  def __init__(self, folder: pathlib.Path, first: int, steps: int):
    """Traces into a folder.

    Args:
      folder: to write to.
      first: how many steps to let pass; compilation is not to be in it.
      steps: how many to trace; 0 for none.
    """
    self._folder = folder
    self._steps = range(first, first + steps)
    self._on = False

  def before(self, at: int) -> None:
    """Is told how many steps there were."""
    if self._steps and at == self._steps[0]:
      jax.profiler.start_trace(str(self._folder))
      self._on = True

  def after(self, at: int, metrics: step.Metrics) -> bool:
    """Whether the step that ended was traced."""
    if not self._on:
      return False
    if at == self._steps[-1] + 1:
      # Steps are dispatched ahead.
      jax.block_until_ready(metrics)
      self.close()
    return True

  def close(self) -> None:
    if self._on:
      jax.profiler.stop_trace()
      self._on = False


class Interruption:
  """SIGTERM and the first Ctrl-C ask the loop to save and to stop.

  A second Ctrl-C ends the run at once, as one does that comes before the steps
  or after them; the last checkpoint is whole.
  """

  def __init__(self):
    self.asked = False

  def __enter__(self):
    self._before = {
      number: signal.signal(number, self._ask)
      for number in (signal.SIGTERM, signal.SIGINT)
    }
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _ask(self, number, frame):
    if number == signal.SIGINT:
      handler = self._before[number]
      if self.asked and callable(handler):
        handler(number, frame)
      # Not print, which the signal may have come in the middle of.
      os.write(2, _STOPS)
    self.asked = True
