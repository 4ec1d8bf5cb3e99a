"""Limits the size of unpacked files.

A packed file of a few kilobytes can fill the whole memory when it is unpacked.
"""

import gzip
import os
import pathlib
import zlib

from .errors import UsageError

_FREE = 2**28
_RATIO = 100
"""The largest allowed ratio of the unpacked size to the packed size.

Usual data have a ratio of 3 to 10. Data with many repetitions have a ratio of
some dozens.
"""
_CHUNK = 2**20


def check(path: str | os.PathLike[str], size: int) -> None:
  """Refuses a packed file whose content is too large.

  Args:
    path: the path of the packed file.
    size: the size of the unpacked content, or of its part so far, in bytes.

  Raises:
    UsageError: if the size is above 256 MiB, and also above a hundred times the
      size of the file.
  """
  stored = os.path.getsize(path)
  if size > max(_FREE, _RATIO * stored):
    raise UsageError(
      f"{os.fspath(path)} has {stored:,} bytes, and more than "
      f"{max(_FREE, _RATIO * stored):,} after unpacking, which no file of "
      "data has; it is not read."
    )


def check_gzip(path: str | os.PathLike[str]) -> None:
  """Refuses a gzipped file whose content is too large, by reading it once.

  Damaged files and files of other kinds pass: the reader of the file refuses
  them.

  Raises:
    UsageError: as in `check`.
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
