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


def read(
  path: str | os.PathLike[str], *, log: bool = False
) -> Iterator[tuple[str, Any]]:
  """Yields where each value is, in words, and the value; blank lines are none.

  A line is in memory at a time.

  Args:
    path: of the file, gzipped if its name ends so.
    log: whether the file is one that the program adds lines to: what follows
      the last end of a line was cut by a kill, and is left out.

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
        if not line.strip() or (log and not line.endswith(b"\n")):
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
  if not checked.is_file(path):
    return []
  rows = []
  for where, row in read(path, log=True):
    if not options.fits(row, dict):
      raise UsageError(
        f"{where}, must be {options.wanted(dict)}; got {options.shown(row)}."
      )
    rows.append(row)
  return rows
