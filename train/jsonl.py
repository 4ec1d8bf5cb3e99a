"""Reads JSONL, one JSON value a line: users' data, and the program's logs."""

from collections.abc import Iterator
import gzip
import json
import os
import pathlib
from typing import Any
import zlib

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
    UsageError: if a line is no JSON; the sentence names it.
    RuntimeError: if the file cannot be read.
  """
  opener = gzip.open if pathlib.Path(path).suffix == ".gz" else open
  try:
    with opener(path, "rb") as file:
      for number, line in enumerate(file, 1):
        if not line.strip() or (log and not line.endswith(b"\n")):
          continue
        where = f"{os.fspath(path)}, line {number}"
        try:
          value = json.loads(line.decode())
        # What is not UTF-8 is a ValueError, too.
        except (ValueError, RecursionError) as error:
          raise UsageError(f"{where}, is no JSON in UTF-8: {error}.") from error
        yield where, value
  except (OSError, EOFError, zlib.error) as error:
    raise RuntimeError(f"{os.fspath(path)} cannot be read: {error}.") from error


def read_log(path: pathlib.Path) -> list[Any]:
  """The values of a log of the program's own; none if there is no file."""
  return [value for _, value in read(path, log=True)] if path.exists() else []
