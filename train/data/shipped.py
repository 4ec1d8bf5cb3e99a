"""Reads the repository's own data files: gzipped, with columns between tabs."""

from collections.abc import Iterator, Sequence
import gzip
import pathlib
import zlib

from .. import checked

FOLDER = pathlib.Path(__file__).parent / "files"


def lines(
  path: pathlib.Path, what: str, columns: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
  """Yields each line's place, in words, and its columns.

  Args:
    path: the file.
    what: what the file holds, for error messages.
    columns: the names of the columns.

  Raises:
    ValueError: if the file is missing or is not gzip, or if a line is not UTF-8
      or has the wrong number of columns. The message names the file and the
      line.
  """
  if not path.exists():
    raise ValueError(
      f"{path} is not there: {what} are in the repository, and not in the "
      "installed package. Choose another data set with --task, or your own "
      "rows with --data."
    )
  try:
    found = gzip.decompress(checked.read_bytes(path)).splitlines()
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ValueError(f"{path} is not a whole gzip file: {error}.") from error
  for number, line in enumerate(found, 1):
    where = f"{path}, line {number}"
    try:
      values = line.decode().split("\t")
    except UnicodeDecodeError as error:
      raise ValueError(f"{where} is not UTF-8: {error}.") from error
    if len(values) != len(columns):
      raise ValueError(
        f"{where} has {len(values)} columns; it must have {len(columns)},"
        f" separated by tabs: {', '.join(columns)}."
      )
    yield where, values
