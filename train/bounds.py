"""What a packed file may become: a few kilobytes can be all memory there is."""

import gzip
import os
import pathlib
import zlib

from .errors import UsageError

_FREE = 2**28
_RATIO = 100
"""Of usual data it is three to ten, and of what repeats itself some dozens."""
_CHUNK = 2**20


def check(path: str | os.PathLike[str], size: int) -> None:
  """Refuses what a file becomes, or has become so far.

  Args:
    path: of the file, packed.
    size: of what is in it, in bytes.

  Raises:
    UsageError: if it is above 256 MiB and a hundred times the file.
  """
  stored = os.path.getsize(path)
  if size > max(_FREE, _RATIO * stored):
    raise UsageError(
      f"{os.fspath(path)} has {stored:,} bytes, and more than "
      f"{max(_FREE, _RATIO * stored):,} after unpacking, which no file of "
      "data has; it is not read."
    )


def check_gzip(path: str | os.PathLike[str]) -> None:
  """Refuses a gzipped file that becomes too much, by reading it once.

  What is damaged is left to who reads it, and so is a file of another kind.

  Raises:
    UsageError: as `check`.
  """
  path = pathlib.Path(path)
  if path.suffix != ".gz" or not path.is_file():
    return
  size = 0
  try:
    with gzip.open(path, "rb") as file:
      while part := file.read(_CHUNK):
        size += len(part)
        check(path, size)
  except (OSError, EOFError, zlib.error):
    return
