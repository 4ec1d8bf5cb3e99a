"""The rows of a study's finished runs, and the claims of running ones."""

from collections.abc import Mapping
import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from typing import Any

from .. import checked, jsonl, locks, options
from ..errors import UsageError

RUNS = "runs.jsonl"
RUNNING = "running"
"""The folder of the files of runs that are not finished."""
_LOCKS = "locks"


# The fields of all rows of runs.jsonl; then those of runs that did not break
# off.
_ROW = {
  "key": str,
  "label": str,
  "task": str,
  "stage": str,
  "seed": int,
  "point": dict,
  "config": dict,
  "sharpness_options": dict | None,
  "failed": str | bool | None,
  "score": float | None,
}
_FINISHED = {
  "metric": str,
  "machine": str,
  "jax": str,
  "date": str,
  "curves": dict,
}
_LANDSCAPE = {"key": str}
_DRAWN = {
  "line": tuple[float | None, ...],
  "plane": tuple[tuple[float | None, ...], ...],
  "steps": tuple[float, ...],
}


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the rows of a JSONL file, without a last line that a kill has cut.

  Raises:
    UsageError: if another line is not JSON, or is not a row of a study.
  """
  return Rows(path).new()


class Rows:
  """A reader of a JSONL file to which workers add rows; reads each row once."""

  def __init__(self, path: pathlib.Path):
    self._path, self._log = path, jsonl.Log(path)

  def new(self) -> list[dict[str, Any]]:
    """Returns the rows since the last call; the errors are those of `read`."""
    rows = self._log.new()
    for row in rows:
      if self._path.name == RUNS:
        _check_run(str(self._path), row)
      else:
        checked.fields(str(self._path), row, _LANDSCAPE, _DRAWN)
    return rows


def _check_run(where: str, row: Mapping[str, Any]) -> None:
  checked.fields(where, row, _ROW)
  where += f", the row {row['key']},"
  if row["failed"]:
    return
  checked.fields(where, row, _FINISHED)
  for name, points in row["curves"].items():
    kind = tuple[tuple[float | None, ...], ...]
    checked.field(f"{where} curves,", row["curves"], name, kind)
    if not all(len(point) == 2 and point[0] is not None for point in points):
      raise UsageError(
        f"{where} curves, {name}: a point must be a step and a value; got "
        f"{options.shown(points)}."
      )


def append(path: pathlib.Path, row: Mapping[str, Any]) -> None:
  """Adds a row; it is whole and on the disk when this returns.

  Several processes may call this at once. If a kill has cut the last line, this
  line is removed.

  Raises:
    OSError: if it cannot be written.
  """
  line = json.dumps(row, allow_nan=False).encode() + b"\n"
  with path.open("a+b") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    end = file.seek(0, os.SEEK_END)
    whole = _whole(file, end)
    if whole < end:
      file.truncate(whole)
    file.write(line)
    file.flush()
    os.fsync(file.fileno())


def _whole(file: Any, end: int) -> int:
  """Returns the place after the last whole line."""
  step = 4096
  for start in range(max(end - step, 0), -step, -step):
    file.seek(max(start, 0))
    found = file.read(min(step, end)).rfind(b"\n")
    if found >= 0:
      return max(start, 0) + found + 1
  return 0


def claimed(
  folder: pathlib.Path, key: str
) -> contextlib.AbstractContextManager[bool]:
  """Returns a context whose value is whether this process has claimed a run.

  The claim lasts as long as the context. A claim is never stale, because its
  lock ends with its process in any case.

  Args:
    folder: the folder of the study.
    key: the key of the run.
  """
  return locks.taken(folder / _LOCKS / f"{key}.lock")


def sweep(folder: pathlib.Path) -> None:
  """Removes the files that killed processes have left."""
  left = [path.name for path in (folder / RUNNING).glob("*")]
  left += [path.stem for path in (folder / _LOCKS).glob("*.lock")]
  for key in left:
    with claimed(folder, key) as mine:
      if mine:
        shutil.rmtree(folder / RUNNING / key, ignore_errors=True)
