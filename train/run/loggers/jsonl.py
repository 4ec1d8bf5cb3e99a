"""The logger of `metrics.jsonl`, which has a line for each logged step."""

from collections.abc import Mapping
import contextlib
import json
import pathlib
from typing import Any

from ... import checked, files, jsonl
from .logger import Logger, Opened

FILE = "metrics.jsonl"


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the rows of a run's metrics, without a last line cut by a kill.

  Raises:
    UsageError: if another line is not JSON, or does not have a step and
      numbers.
  """
  path = folder / FILE
  rows = jsonl.read_log(path)
  for row in rows:
    checked.field(str(path), row, "step", int)
    for name in row:
      checked.field(f"{path}, step {row['step']}", row, name, float | None)
  # Older runs wrote NaN.
  return rows


class Rows(Logger):
  """Writes each step's scalars as a line of JSON, at once.

  When a run resumes, the lines of later steps are removed, so that no step is
  in the file twice.
  """

  def __init__(self, opened: Opened):
    path = opened.folder / FILE
    kept = [row for row in read(opened.folder) if row["step"] <= opened.step]
    files.write_atomically(path, "".join(map(_line, kept)))
    self._file = path.open("a", buffering=1)

  def log(self, step: int, values: Mapping[str, float]) -> None:
    self._file.write(_line({"step": step, **values}))

  def close(self) -> None:
    # All lines are already written, except one for which `log` raised an error.
    with contextlib.suppress(OSError):
      self._file.close()


def _line(row: Mapping[str, Any]) -> str:
  return json.dumps(files.finite(row)) + "\n"
