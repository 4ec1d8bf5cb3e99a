"""What watches the steps: times and metrics of a window, and signals."""

import signal
import time

import jax

from train import step


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

  def spoil(self) -> None:
    """Leaves the time out: something else took some of it."""
    self._start = None

  def close(
    self, at: int
  ) -> tuple[list[step.Metrics], dict[str, float | None]]:
    """The metrics of each step, and times: none if the window is spoiled."""
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


class Interruption:
  """SIGTERM and the first Ctrl-C ask the loop to save and to stop."""

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
    del frame
    if self.asked and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.asked = True
