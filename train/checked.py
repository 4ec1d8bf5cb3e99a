"""Reads and checks files that other people or programs may have written.

The program reads every file of JSON, text or bytes with these functions. A
function returns a value of the requested type, or raises a UsageError that
names the file.
"""

from collections.abc import Mapping
import errno
import json
import os
import pathlib
import stat
from typing import Any, BinaryIO

from . import options
from .errors import UsageError

_MOST = 2**28
_DEEPEST = 100
_LONGEST = 1000
_REQUIRED: Any = object()

Path = str | os.PathLike[str]


def open_file(path: Path) -> BinaryIO:
  """Opens a regular file for reading.

  Other kinds of files are refused: a FIFO would wait for a writer, and a device
  may have no end.

  Raises:
    UsageError: if the file does not exist, cannot be read, or is no regular
      file.
  """
  try:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except FileNotFoundError:
    raise UsageError(f"{_told(path)} is not there.") from None
  except OSError as error:
    if error.errno in (errno.ENXIO, errno.ENODEV):  # such as a socket
      raise UsageError(
        f"{_told(path)} is a pipe or a device; it must be a file."
      ) from error
    raise UsageError(
      f"{_told(path)} cannot be read: {error.strerror}."
    ) from error
  except ValueError as error:  # for a NUL, or half of a surrogate pair
    raise UsageError(f"{_told(path)} is not a valid path: {error}.") from error
  mode = os.fstat(descriptor).st_mode
  if not stat.S_ISREG(mode):
    os.close(descriptor)
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
    raise UsageError(f"{_told(path)} is {kind}; it must be a file.")
  return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, most: int = _MOST) -> bytes:
  """Returns the content of a file.

  Args:
    path: the path of the file.
    most: the largest allowed size, in bytes.

  Raises:
    UsageError: as in `open_file`, or if the file is larger.
  """
  try:
    with open_file(path) as file:
      content = file.read(most + 1)
  except OSError as error:
    raise UsageError(
      f"{_told(path)} cannot be read: {error.strerror}."
    ) from error
  if len(content) > most:
    raise UsageError(f"{_told(path)} has more than {most:,} bytes.")
  return content


def read_text(path: Path, most: int = _MOST) -> str:
  """Returns the text of a file in UTF-8, without a byte order mark.

  Args:
    path: the path of the file.
    most: the largest allowed size, in bytes.

  Raises:
    UsageError: as in `read_bytes`, or if the file is not UTF-8.
  """
  try:
    return read_bytes(path, most).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise UsageError(f"{_told(path)} is not UTF-8: {error}.") from error


def read_json(path: Path, kind: Any = dict) -> Any:
  """Returns the value in a JSON file.

  Args:
    path: the path of the file.
    kind: the type of the value, in the form that `options.fits` takes.

  Raises:
    UsageError: as in `read_bytes` and `parse_json`.
  """
  return parse_json(read_bytes(path), _told(path), kind)


def parse_json(text: str | bytes, where: str, kind: Any = object) -> Any:
  """Returns the value of a JSON text.

  NaN and infinities pass, because files that Python wrote may contain them.
  `field` does not accept them as numbers.

  Args:
    text: the JSON; bytes must be UTF-8, with or without a byte order mark.
    where: the place of the text, in words, for messages.
    kind: the type of the value, in the form that `options.fits` takes; any type
      by default.

  Raises:
    UsageError: if the text is not JSON; if a key occurs twice with different
      values, because readers differ in the value that they take; if it has half
      of a surrogate pair, which no file can hold; if values are nested more
      than 100 levels deep; or if the value has another type.
  """
  try:
    if isinstance(text, bytes):
      text = text.decode("utf-8-sig")
    value = json.loads(text, object_pairs_hook=_object)
    # To count brackets is fast. It nearly always shows that the value is not
    # nested too deeply.
    brackets = text.count("[") + text.count("{")
    if brackets > _DEEPEST and _deep(value):
      raise RecursionError
  except RecursionError as error:
    raise UsageError(
      f"{where} is nested more than {_DEEPEST} levels deep."
    ) from error
  except ValueError as error:
    raise UsageError(f"{where} is not JSON in UTF-8: {error}.") from error
  if r"\u" in text:
    _check_pairs(value, where)
  if not options.fits(value, kind):
    raise UsageError(
      f"{where} must hold {options.wanted(kind)}; got {options.shown(value)}."
    )
  return value


def field(
  where: str,
  table: Mapping[str, Any],
  name: str,
  kind: Any,
  default: Any = _REQUIRED,
) -> Any:
  """Returns a value of a JSON object, after a check of its type.

  Args:
    where: the place of the object, in words, for messages.
    table: the object.
    name: the key of the value.
    kind: the type, in the form that `options.fits` takes; a number must be
      finite.
    default: the result if the key is missing; without it, the key is required.

  Raises:
    UsageError: if a required key is missing, or the value has another type.
  """
  if name in table:
    return options.checked(where, name, table[name], kind)
  if default is _REQUIRED:
    raise UsageError(
      f"{where} lacks {name}, which must be {options.wanted(kind)}."
    )
  return default


def fields(
  where: str,
  table: Mapping[str, Any],
  required: Mapping[str, Any],
  optional: Mapping[str, Any] | None = None,
) -> None:
  """Refuses a JSON object with a missing key, or a value of a wrong type.

  Args:
    where: the place of the object, in words, for messages.
    table: the object; its other keys are not checked.
    required: the types of the keys that must exist.
    optional: the types of the keys that may exist.

  Raises:
    UsageError: as in `field`.
  """
  for name, kind in required.items():
    field(where, table, name, kind)
  for name, kind in (optional or {}).items():
    field(where, table, name, kind, None)


def truth(table: Mapping[str, Any], name: str, default: bool) -> bool:
  """Returns a flag of a model's config.json, or the default if it is null.

  Raises:
    UsageError: if the value is not true, false or null.
  """
  value = table.get(name)
  if not options.fits(value, bool | None):
    raise UsageError(
      f"{name} must be true or false, got {options.shown(value)}."
    )
  return default if value is None else value


def is_file(path: Path) -> bool:
  """Returns whether a file exists.

  Raises:
    UsageError: if the path is something else, such as a folder, or cannot be
      examined.
  """
  try:
    mode = os.stat(path).st_mode
  except (FileNotFoundError, NotADirectoryError):
    return False
  except (OSError, ValueError) as error:
    raise UsageError(_unreadable(path, error)) from error
  if not stat.S_ISREG(mode):
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
    raise UsageError(f"{_told(path)} is {kind}; it must be a file.")
  return True


def is_folder(path: Path) -> bool:
  """Returns whether a path that a user gave is a folder.

  Raises:
    UsageError: if the path cannot be examined.
  """
  try:
    return pathlib.Path(path).is_dir()
  except (OSError, ValueError) as error:
    raise UsageError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: OSError | ValueError) -> str:
  """Returns the message for an unreadable path; a NUL is a ValueError."""
  said = error.strerror if isinstance(error, OSError) else error
  return f"{_told(path)} cannot be read: {said}."


def _told(path: Path) -> str:
  """Returns a path for a message; shortens very long or invalid paths."""
  text = os.fspath(path)
  if len(text) > _LONGEST or not options.is_text(text):
    return options.shown(text)
  return text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    for name, value in pairs:
      if found[name] != value:
        raise ValueError(f"the key {options.shown(name)} occurs twice")
  return found


def _deep(value: Any) -> bool:
  """Returns whether values are nested more than `_DEEPEST` levels deep."""
  level = [value]
  for _ in range(_DEEPEST + 1):
    inner = [
      x.values() if isinstance(x, dict) else x
      for x in level
      if isinstance(x, dict | list)
    ]
    level = [item for items in inner for item in items]
    if not level:
      return False
  return True


def _check_pairs(value: Any, where: str) -> None:
  try:
    json.dumps(value, ensure_ascii=False).encode()
  except UnicodeEncodeError as error:
    raise UsageError(
      f"{where} has {error.object[error.start]!r}, half of a surrogate pair, "
      "which is no character."
    ) from error
