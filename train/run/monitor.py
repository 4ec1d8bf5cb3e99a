"""Watches a run: times and metrics of steps, traces, and signals."""

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
  """The metrics and the time of the steps since the last line of metrics."""

  def __init__(self, at: int):
    self._restart(at)

  def _restart(self, at: int) -> None:
    self._start: float | None = time.perf_counter()
    self._at = at
    # The rows stay on the device, so that JAX can dispatch steps ahead.
    self._rows: list[step.Metrics] = []
    self._seen = 0

  def add(self, metrics: step.Metrics) -> None:
    self._rows.append(metrics)

  def fresh(self) -> list[step.Metrics]:
    """Returns the metrics of the steps since the last call."""
    rows = jax.device_get(self._rows[self._seen :])
    self._seen = len(self._rows)
    return rows

  def discard_time(self) -> None:
    """Discards the time of this window, because other work took a part."""
    self._start = None

  def close(
    self, at: int
  ) -> tuple[list[step.Metrics], dict[str, float | None]]:
    """Returns the metrics of each step, and times; starts a new window.

    There are no times if they were discarded.
    """
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
    """Prepares a trace.

    Args:
      folder: the folder to write to.
      first: the number of steps before the trace, so that it has no
        compilation.
      steps: the number of steps to trace; 0: none.
    """
    self._folder = folder
    self._steps = range(first, first + steps)
    self._on = False

  def before(self, at: int) -> None:
    """Starts the trace if it begins after `at` steps."""
    if self._steps and at == self._steps[0]:
      jax.profiler.start_trace(str(self._folder))
      self._on = True

  def after(self, at: int, metrics: step.Metrics) -> bool:
    """Ends the trace after its last step; returns whether a step was traced."""
    if not self._on:
      return False
    if at == self._steps[-1] + 1:
      # JAX dispatches steps ahead, so the trace must wait for the step.
      jax.block_until_ready(metrics)
      self.close()
    return True

  def close(self) -> None:
    if self._on:
      jax.profiler.stop_trace()
      self._on = False


class Interruption:
  """Turns SIGTERM and the first Ctrl-C into a request to save and stop.

  A second Ctrl-C ends the run at once. A Ctrl-C before or after the steps does
  so too. The last checkpoint is not damaged.
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
      # Not `print`, because the signal may have interrupted another `print`.
      os.write(2, _STOPS)
    self.asked = True
