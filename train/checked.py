"""Reads files that anyone may have written: what they hold, or a sentence.

Every file of JSON, text or bytes that the program reads goes through here. A
reader ends with a value of the type that was asked for, or with a UsageError
that names the file.
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
  """A regular file, open at its first byte.

  A FIFO would wait for a writer, and a device may have no end.

  Raises:
    UsageError: if it is not there, may not be read, or is no regular file.
  """
  try:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except FileNotFoundError:
    raise UsageError(f"{_told(path)} is not there.") from None
  except OSError as error:
    if error.errno in (errno.ENXIO, errno.ENODEV):  # of a socket, say
      raise UsageError(
        f"{_told(path)} is a pipe or a device; it must be a file."
      ) from error
    raise UsageError(
      f"{_told(path)} cannot be read: {error.strerror}."
    ) from error
  except ValueError as error:  # a NUL, or half of a surrogate pair
    raise UsageError(f"{_told(path)} is not a valid path: {error}.") from error
  mode = os.fstat(descriptor).st_mode
  if not stat.S_ISREG(mode):
    os.close(descriptor)
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
    raise UsageError(f"{_told(path)} is {kind}; it must be a file.")
  return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, most: int = _MOST) -> bytes:
  """What is in a file of at most so many bytes.

  Raises:
    UsageError: as `open_file`, or if there is more.
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
  """The text of a file of at most so many bytes, in UTF-8, without its mark.

  Raises:
    UsageError: as `read_bytes`, or if it is not UTF-8.
  """
  try:
    return read_bytes(path, most).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise UsageError(f"{_told(path)} is not UTF-8: {error}.") from error


def read_json(path: Path, kind: Any = dict) -> Any:
  """The value in a JSON file.

  Args:
    path: of the file.
    kind: the type of the value, as `options.fits` takes it.

  Raises:
    UsageError: as `read_bytes` and `parse_json`.
  """
  return parse_json(read_bytes(path), _told(path), kind)


def parse_json(text: str | bytes, where: str, kind: Any = object) -> Any:
  """The value that a text is in JSON.

  NaN and infinities pass, as in files that Python wrote; `field` does not take
  them for numbers.

  Args:
    text: the JSON; if bytes, in UTF-8, with a byte order mark or not.
    where: it is, in words, for a message.
    kind: the type of the value, as `options.fits` takes it; any by default.

  Raises:
    UsageError: if it is no JSON; has a key twice with two values, of which
      readers take one or the other; half of a surrogate pair, which no file
      can hold; more than 100 values in each other; or is of another type.
  """
  try:
    if isinstance(text, bytes):
      text = text.decode("utf-8-sig")
    value = json.loads(text, object_pairs_hook=_object)
    # Counting is quick, and nearly always enough.
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
  """A value of a JSON object, of its type.

  Args:
    where: the object is, in words, for a message.
    table: the object.
    name: its key.
    kind: the type, as `options.fits` takes it; a number is finite.
    default: what a missing key stands for; without it the key is required.

  Raises:
    UsageError: if it is missing, or of another type.
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
  """Refuses a JSON object that lacks a key, or has another type at one.

  Args:
    where: the object is, in words, for a message.
    table: the object; other keys than these are not looked at.
    required: the types of keys that must be there.
    optional: the types of keys that may be.

  Raises:
    UsageError: as `field`.
  """
  for name, kind in required.items():
    field(where, table, name, kind)
  for name, kind in (optional or {}).items():
    field(where, table, name, kind, None)


def truth(table: Mapping[str, Any], name: str, default: bool) -> bool:
  """A flag in other people's config.json, where null says nothing.

  Raises:
    UsageError: if it is neither true nor false.
  """
  value = table.get(name)
  if not options.fits(value, bool | None):
    raise UsageError(
      f"{name} must be true or false, got {options.shown(value)}."
    )
  return default if value is None else value


def is_file(path: Path) -> bool:
  """Whether there is anything at a path, which has to be a file if so.

  Raises:
    UsageError: if it is something else, or cannot be looked at.
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
  """Whether there is a folder at a path that a user gave.

  Raises:
    UsageError: if it cannot be looked at.
  """
  try:
    return pathlib.Path(path).is_dir()
  except (OSError, ValueError) as error:
    raise UsageError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: OSError | ValueError) -> str:
  """What is said of a path that cannot be looked at; a NUL is a ValueError."""
  said = error.strerror if isinstance(error, OSError) else error
  return f"{_told(path)} cannot be read: {said}."


def _told(path: Path) -> str:
  """A path in a sentence: whole, unless it is of no use."""
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
  """Whether more values are in each other than the most there may be."""
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
