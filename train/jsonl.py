"""Reads JSONL, one JSON value a line: users' data, and the program's logs."""

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
  """Yields where each value is, in words, and the value; blank lines are none.

  A line is in memory at a time.

  Args:
    path: of the file, gzipped if its name ends so.

  Raises:
    UsageError: if the file cannot be read, or a line is no JSON; the sentence
      names it.
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
  """The objects in a log of the program's own; none if there is no file.

  Raises:
    UsageError: as `read`, or if a line is another value.
  """
  return Log(path).new()


class Log:
  """A log that the program adds lines to, of which each is read once."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._end = self._lines = 0

  def new(self) -> list[dict[str, Any]]:
    """The objects of the whole lines since the last call.

    Raises:
      UsageError: as `read`, or if a line is another value.
    """
    rows: list[dict[str, Any]] = []
    if not checked.is_file(self._path):
      return rows
    with checked.open_file(self._path) as file:
      file.seek(self._end)
      for line in file:
        if not line.endswith(b"\n"):
          break  # cut by a kill, or not yet whole
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
