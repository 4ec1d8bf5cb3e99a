"""Locks on files, which the system frees when their process ends.

The locks are those of `flock`. A kill at any moment frees them, so no lock is
ever stale. They work across machines on NFS (version 4, or 3 with its lock
daemon), on GPFS, and on Lustre that is mounted with `flock`. On Lustre that is
mounted with `localflock`, they work only within one machine. On a file system
without locks, the program prints a warning and continues.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shlex
import socket
import sys
import textwrap
import time

from . import command
from .errors import UsageError

FILE = ".lock"
"""The lock file of a folder; its text names the command that holds it."""
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}
_SHOWN = 120


@contextlib.contextmanager
def held(path: pathlib.Path, what: str) -> Iterator[None]:
  """Holds a lock until the end of the context, or refuses at once.

  Args:
    path: the path of the lock file. Missing folders are made. If the context
      fails and leaves them empty, they are removed again.
    what: a name of the locked thing, for messages.

  Raises:
    UsageError: if another command holds the lock, which the message names; or
      if the lock file cannot be written.
  """
  with contextlib.ExitStack() as stack:
    try:
      mine = stack.enter_context(taken(path))
    except OSError as error:
      raise UsageError(
        f"{what} cannot be written: {error.strerror}."
      ) from error
    if not mine:
      raise UsageError(
        f"{what} is in use by {_holder(path)}. Wait until it ends, or give "
        "another folder."
      )
    yield


@contextlib.contextmanager
def taken(path: pathlib.Path) -> Iterator[bool]:
  """Yields whether this process got a lock, which it holds in the context.

  Args:
    path: the path of the lock file, as in `held`. The file is removed when the
      context ends.

  Raises:
    OSError: if the lock file cannot be written.
  """
  missing = [folder for folder in path.parents if not folder.exists()]
  with contextlib.ExitStack() as stack:
    stack.push(lambda kind, *_: kind and _remove_empty(missing))
    descriptor = _take_in_folder(path)
    if descriptor is None:
      yield False
      return
    stack.callback(os.close, descriptor)
    # The file is removed before its lock is freed. `take` in another process
    # notices a removed file, and tries again.
    stack.callback(path.unlink, missing_ok=True)
    with contextlib.suppress(OSError):  # a full disk: the lock has no text
      os.ftruncate(descriptor, 0)
      os.write(descriptor, _whose().encode())
    yield True


def take(path: pathlib.Path) -> int | None:
  """Locks a file.

  Returns:
    The descriptor of the file, which is locked until the descriptor is closed;
    None if another process holds the lock.

  Raises:
    OSError: if the file cannot be made.
  """
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(descriptor)
      return None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        os.close(descriptor)
        raise
      print(
        f"warning: {path.parent} is on a file system without locks "
        f"({error.strerror}); make sure that no other command writes there.",
        file=sys.stderr,
      )
    # The last holder may have removed the file after it was opened here. Then
    # the lock is on a file without a name, and excludes nobody.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(descriptor), path.stat()):
        return descriptor
    os.close(descriptor)


def _take_in_folder(path: pathlib.Path) -> int | None:
  while True:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may have removed the empty folder in between.
    with contextlib.suppress(FileNotFoundError):
      return take(path)


def _remove_empty(folders: list[pathlib.Path]) -> None:
  """Removes the folders that are empty; the innermost is the first."""
  for folder in folders:
    with contextlib.suppress(OSError):
      folder.rmdir()


def _whose() -> str:
  return json.dumps(
    {
      "process": os.getpid(),
      "host": socket.gethostname(),
      "since": time.strftime("%Y-%m-%d %H:%M:%S"),
      "command": textwrap.shorten(
        f"{command.NAME} {shlex.join(sys.argv[1:])}", _SHOWN, placeholder=" ..."
      ),
    }
  )


def _holder(path: pathlib.Path) -> str:
  try:
    found = json.loads(path.read_text())
    return (
      f"process {found['process']} on {found['host']}, since {found['since']}: "
      f"{found['command']}"
    )
  except (OSError, ValueError, LookupError, TypeError):
    # The holder has just ended, or has not written its text yet.
    return "another command"
