"""Files that are written whole or not at all, and JSON that all can read."""

from collections.abc import Iterator, Mapping
import contextlib
import glob
import json
import math
import os
import pathlib
import re
import time
from typing import Any

import numpy as np
import safetensors.numpy

from . import locks
from .errors import UsageError

# As safetensors, which is in Rust, ends what it says.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A file to write, which takes the place of another when it is whole.

  It is locked meanwhile: what kills have left of others, which no process
  holds, is removed first.
  """
  for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
    with contextlib.suppress(OSError):
      _remove_unheld(left)
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  with naming(path, part), contextlib.ExitStack() as stack:
    stack.callback(part.unlink, missing_ok=True)
    # Another may be looking whether it is to be removed.
    while (descriptor := locks.take(part)) is None:
      time.sleep(0.01)
    stack.callback(os.close, descriptor)
    yield part
    os.replace(part, path)


@contextlib.contextmanager
def naming(path: pathlib.Path, part: pathlib.Path) -> Iterator[None]:
  """Has what cannot be written be called by its own name, and not its part's.

  Python gives an error in the middle of a file no name at all.

  Args:
    path: of a file, or of a folder.
    part: where it is while it is written.
  """
  try:
    yield
  except OSError as error:
    name = str(error.filename or part)
    if error.strerror and name.startswith(str(part)):
      error.filename = f"{path}{name.removeprefix(str(part))}"
      error.filename2 = None
    raise


def check_place(flag: str, path: pathlib.Path) -> None:
  """Refuses a file that could not be written, before there is work for it.

  Raises:
    UsageError: that names the option.
  """
  if path.is_dir():
    raise UsageError(f"{flag} must be a file; got {path}, which is a folder.")
  if not path.parent.is_dir():
    raise UsageError(f"{flag} {path} is in a folder that does not exist.")
  if not os.access(path.parent, os.W_OK):
    raise UsageError(
      f"{flag} {path} is in a folder that the program cannot write to."
    )


def _remove_unheld(path: pathlib.Path) -> None:
  descriptor = locks.take(path)
  if descriptor is not None:
    path.unlink(missing_ok=True)
    os.close(descriptor)


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Replaces a file whole, or not at all.

  Raises:
    OSError: if it cannot be written; the old file is then as it was.
  """
  with replacing(path) as part, part.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def save_tensors(
  path: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  metadata: dict[str, str] | None = None,
) -> None:
  """Replaces a safetensors file whole, or not at all.

  Raises:
    OSError: if it cannot be written; the old file is then as it was.
  """
  with replacing(path) as part:
    try:
      safetensors.numpy.save_file(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()},
        part,
        metadata,
      )
    except safetensors.SafetensorError as error:
      number = _OS_ERROR.search(str(error))
      if number is None:
        raise
      number = int(number[1])
      raise OSError(number, os.strerror(number), str(part)) from error


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
