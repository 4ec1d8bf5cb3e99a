"""What a run writes down as it goes: JSONL, TensorBoard, and the terminal."""

from collections.abc import Mapping
import json
import os
import pathlib
import sys
from typing import Any

from rich import console as rich_console
from rich import progress as rich_progress
import tensorboardX


class Journal:
  """Metrics of a run: `metrics.jsonl`, `tensorboard/`, and a progress bar.

  A run that resumes at a step first drops what was written after it, so that
  no step stands in the files twice.
  """

  def __init__(self, folder: pathlib.Path, step: int, total: int):
    path = folder / "metrics.jsonl"
    kept = [row for row in read(folder) if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
    self._file = path.open("a", buffering=1)
    self._board = tensorboardX.SummaryWriter(
      str(folder / "tensorboard"), purge_step=step + 1
    )
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
    """Writes scalars of a step; those that are None are left out."""
    known = {k: v for k, v in values.items() if v is not None}
    self._file.write(json.dumps({"step": step, **known}) + "\n")
    for name, value in known.items():
      self._board.add_scalar(name, value, step)
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
    self._console.print(sentence, highlight=False, soft_wrap=True)

  def close(self) -> None:
    """Flushes the files and ends the progress bar."""
    if self._bar is not None:
      self._bar.stop()
    self._file.close()
    self._board.close()


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a run's `metrics.jsonl`; a last line cut by a kill is left out.

  Raises:
    ValueError: if another line than the last is no JSON.
  """
  path = folder / "metrics.jsonl"
  if not path.exists():
    return []
  lines = path.read_text().splitlines()
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      rows.append(json.loads(line))
    except ValueError as error:
      if number < len(lines):
        raise ValueError(f"{path}, line {number}, is no JSON.") from error
  return rows


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
