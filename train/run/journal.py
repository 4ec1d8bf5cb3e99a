"""What a run writes down as it goes: JSONL, TensorBoard, and the terminal."""

from collections.abc import Mapping
import contextlib
import json
import os
import pathlib
import sys
import time
from typing import Any

from rich import console as rich_console
from rich import progress as rich_progress
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from .. import jsonl
from ..errors import RunError

# Its classes are made as it is imported.
_events: Any = event_pb2


class Journal:
  """Metrics of a run: `metrics.jsonl`, `tensorboard/`, and a progress bar.

  A run that resumes at a step first drops what was written after it, so that
  no step stands in the files twice.
  """

  def __init__(self, folder: pathlib.Path, step: int, total: int):
    self._folder = folder
    path = folder / "metrics.jsonl"
    kept = [row for row in read(folder) if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
    self._file = path.open("a", buffering=1)
    self._board = _Board(folder / "tensorboard", step + 1)
    self._console = rich_console.Console(stderr=False)
    self._bar = None
    if sys.stdout.isatty():
      self._bar = rich_progress.Progress(
        rich_progress.TextColumn("step"),
        rich_progress.MofNCompleteColumn(),
        rich_progress.BarColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[text]}"),
        console=self._console,
      )
      self._task = self._bar.add_task("", total=total, completed=step, text="")
      self._bar.start()

  def log(self, step: int, **values: float | None) -> None:
    """Writes scalars of a step; those that are None are left out.

    Raises:
      RunError: if they cannot be written.
    """
    known = {k: v for k, v in values.items() if v is not None}
    try:
      self._file.write(json.dumps({"step": step, **known}) + "\n")
      self._board.write(step, known)
    except OSError as error:
      raise RunError(
        f"the metrics of step {step} could not be written to {self._folder}: "
        f"{error.strerror}. The same command resumes."
      ) from error
    text = "  ".join(f"{name} {value:.4g}" for name, value in known.items())
    if self._bar is not None and "validation_loss" not in known:
      self._bar.update(self._task, text=text)
    else:
      self.say(f"step {step:>6}  {text}")

  def advance(self, step: int) -> None:
    """Moves the progress bar."""
    if self._bar is not None:
      self._bar.update(self._task, completed=step)

  def say(self, sentence: str) -> None:
    """Prints a line above the progress bar."""
    self._console.print(
      sentence, markup=False, emoji=False, highlight=False, soft_wrap=True
    )

  def close(self) -> None:
    """Closes the files and ends the progress bar."""
    if self._bar is not None:
      self._bar.stop()
    # Each line went out as it came; what is left is one that `log` refused.
    for file in (self._file, self._board):
      with contextlib.suppress(OSError):
        file.close()


class Silence:
  """The journal of a process that writes nothing."""

  def log(self, step: int, **values: float | None) -> None:
    """As `Journal.log`."""

  def advance(self, step: int) -> None:
    """As `Journal.advance`."""

  def say(self, sentence: str) -> None:
    """As `Journal.say`."""

  def close(self) -> None:
    """As `Journal.close`."""


class _Board:
  """An event file of TensorBoard, that forgets what others have from a step on.

  tensorboardX's own SummaryWriter writes in a thread, which dies of a full
  disk; then its queue fills up, and the run hangs.
  """

  def __init__(self, folder: pathlib.Path, step: int):
    folder.mkdir(exist_ok=True)
    self._writer = event_file_writer.EventsWriter(
      str(folder / "events"), f".{step}"
    )
    start = _events.SessionLog(status=_events.SessionLog.START)
    self._add(step=step, session_log=start)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._add(step=step, summary=summary.scalar(name, value))
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()

  def _add(self, **fields: Any) -> None:
    self._writer.write_event(_events.Event(wall_time=time.time(), **fields))


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a run's `metrics.jsonl`; a last line cut by a kill is left out.

  Raises:
    UsageError: if another line than the last is no JSON.
  """
  return jsonl.read_log(folder / "metrics.jsonl")


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Replaces a file whole, or not at all.

  Raises:
    OSError: if it cannot be written; the old file is then as it was.
  """
  part = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    with part.open("w") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    part.replace(path)
  except BaseException:
    part.unlink(missing_ok=True)
    raise


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Replaces a JSON file whole, or not at all."""
  write_atomically(path, json.dumps(value, indent=2) + "\n")
