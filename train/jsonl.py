"""Reads JSONL files, with one JSON value a line: users' data, and logs."""

from collections.abc import Iterator
import contextlib
import gzip
import os
import pathlib
from typing import Any
import zlib

from . import checked, options
from .errors import UsageError


def read(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
  """Yields the place of each value, in words for messages, and the value.

  Blank lines are skipped. Only one line is in memory at a time.

  Args:
    path: the path of the file; a file whose name ends in .gz is unpacked.

  Raises:
    UsageError: if the file cannot be read, or a line is not JSON; the message
      names the line.
  """
  name = os.fspath(path)
  try:
    with contextlib.ExitStack() as stack:
      file: Any = stack.enter_context(checked.open_file(path))
      if pathlib.Path(path).suffix == ".gz":
        file = stack.enter_context(gzip.GzipFile(fileobj=file))
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        where = f"{name}, line {number},"
        value = checked.parse_json(line, where)
        yield where.removesuffix(","), value
  except (OSError, EOFError, zlib.error) as error:
    raise UsageError(f"{name} cannot be read: {error}.") from error


def read_log(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the objects in a log of the program; none if there is no file.

  Raises:
    UsageError: if the file cannot be read, or a line is not a JSON object.
  """
  return Log(path).new()


class Log:
  """A log that the program adds lines to; each line is read once."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._end = self._lines = 0

  def new(self) -> list[dict[str, Any]]:
    """Returns the objects of the complete lines since the last call.

    Raises:
      UsageError: if the file cannot be read, or a line is not a JSON object.
    """
    rows: list[dict[str, Any]] = []
    if not checked.is_file(self._path):
      return rows
    with checked.open_file(self._path) as file:
      file.seek(self._end)
      for line in file:
        if not line.endswith(b"\n"):
          break  # incomplete: cut by a kill, or still being written
        self._end += len(line)
        self._lines += 1
        if not line.strip():
          continue
        where = f"{self._path}, line {self._lines},"
        row = checked.parse_json(line, where)
        if not options.fits(row, dict):
          raise UsageError(
            f"{where} must be {options.wanted(dict)}; got {options.shown(row)}."
          )
        rows.append(row)
    return rows
