"""Locks on files, that the system takes back when their process is gone.

They are `flock`'s: a kill at any moment frees them, and no lock is ever stale.
NFS (version 4, or 3 with its lock daemon), GPFS, and Lustre that is mounted
with `flock`, keep them over machines; with `localflock` Lustre keeps them
within one. On a file system without locks a warning says that there is none.
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
"""In a folder that is one command's; it says whose."""
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}
_SHOWN = 120


@contextlib.contextmanager
def held(path: pathlib.Path, what: str) -> Iterator[None]:
  """Keeps other commands away for as long as the context lasts.

  Args:
    path: of the lock; folders that are missing are made, and are gone again if
      the context fails and has left nothing in them.
    what: is locked, for the sentence.

  Raises:
    UsageError: at once, if another has it, and says who; or if no file can be
      written there.
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
  """Whether a lock is this process's, for as long as the context lasts.

  Args:
    path: as of `held`. The file is gone when the context ends.

  Raises:
    OSError: if it cannot be written.
  """
  missing = [folder for folder in path.parents if not folder.exists()]
  with contextlib.ExitStack() as stack:
    stack.push(lambda kind, *_: kind and _remove_empty(missing))
    descriptor = _take_in_folder(path)
    if descriptor is None:
      yield False
      return
    stack.callback(os.close, descriptor)
    # Before it is let go: whoever opens the file now sees that it is gone.
    stack.callback(path.unlink, missing_ok=True)
    with contextlib.suppress(OSError):  # on a full disk nobody knows who
      os.ftruncate(descriptor, 0)
      os.write(descriptor, _whose().encode())
    yield True


def take(path: pathlib.Path) -> int | None:
  """The descriptor of a file that is locked until it is closed.

  Returns:
    None if another has it.

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
    # Its last holder may have removed the file after it was opened here.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(descriptor), path.stat()):
        return descriptor
    os.close(descriptor)


def _take_in_folder(path: pathlib.Path) -> int | None:
  while True:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another, that was refused, may have removed the folder in between.
    with contextlib.suppress(FileNotFoundError):
      return take(path)


def _remove_empty(folders: list[pathlib.Path]) -> None:
  """Removes folders, the innermost first, if nothing is in them."""
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
    # It has ended meanwhile, or is about to write who it is.
    return "another command"
