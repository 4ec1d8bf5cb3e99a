"""Writes files atomically, and writes JSON that every reader accepts."""

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

# safetensors is written in Rust, and ends its messages in this way.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path to write; replaces `path` with it at the end.

  The temporary file is locked while it is written. Temporary files that no
  process has locked are left over from killed processes, and are removed first.
  """
  for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
    with contextlib.suppress(OSError):
      _remove_unheld(left)
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  with naming(path, part), contextlib.ExitStack() as stack:
    stack.callback(part.unlink, missing_ok=True)
    # Another process may hold the lock for a moment, to see whether the file
    # is left over.
    while (descriptor := locks.take(part)) is None:
      time.sleep(0.01)
    stack.callback(os.close, descriptor)
    yield part
    os.replace(part, path)


@contextlib.contextmanager
def naming(path: pathlib.Path, part: pathlib.Path) -> Iterator[None]:
  """Puts the final name of a file into errors, not its temporary name.

  If an error comes in the middle of a file, Python's error has no name at all.

  Args:
    path: the final path of a file or folder.
    part: the temporary path, at which it is written.
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
  """Refuses a path that cannot be written, before any work for it starts.

  Args:
    flag: the option that gave the path, for messages.
    path: the path of the file.

  Raises:
    UsageError: if the path cannot be written; the message names the option.
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
  """Replaces a file atomically.

  Raises:
    OSError: if the file cannot be written; the old file is then unchanged.
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
  """Replaces a safetensors file atomically.

  Raises:
    OSError: if the file cannot be written; the old file is then unchanged.
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
  """Replaces a JSON file atomically; `finite` says how numbers are written."""
  write_atomically(path, json.dumps(finite(value), indent=2) + "\n")


def finite(value: Any) -> Any:
  """Returns the value, with None for NaN and infinity, which JSON lacks."""
  match value:
    case float():
      return value if math.isfinite(value) else None
    case dict():
      return {key: finite(x) for key, x in value.items()}
    case list() | tuple():
      return [finite(x) for x in value]
  return value
