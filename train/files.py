"""Files that are written whole or not at all, and JSON that all can read."""

from collections.abc import Iterator, Mapping
import contextlib
import json
import math
import os
import pathlib
from typing import Any


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A file to write, which takes the place of another when it is whole."""
  part = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    yield part
    os.replace(part, path)
  except BaseException:
    part.unlink(missing_ok=True)
    raise


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Replaces a file whole, or not at all.

  Raises:
    OSError: if it cannot be written; the old file is then as it was.
  """
  with replacing(path) as part, part.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Replaces a JSON file whole, or not at all; see `finite`."""
  write_atomically(path, json.dumps(finite(value), indent=2) + "\n")


def finite(value: Any) -> Any:
  """The value with None for each number that JSON has not: NaN and infinity."""
  match value:
    case float():
      return value if math.isfinite(value) else None
    case dict():
      return {key: finite(x) for key, x in value.items()}
    case list() | tuple():
      return [finite(x) for x in value]
  return value
