"""Ctrl-C, at any time: a line, and the code 130.

What is imported here is what Python has imported anyway.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import sys
from typing import Any, NoReturn

CODE = 130
"""As of a shell: 128 and the signal."""
_TOLD = "interrupted."


@contextlib.contextmanager
def leaving(within: bool = False) -> Iterator[None]:
  """Has Ctrl-C end the program at once, while it imports modules.

  What is raised then is printed by some of them, dropped by others, and
  remembered by Python, which ends by the signal afterwards.

  Args:
    within: only in `interruptible`: whoever calls the program as a function is
      not to be ended.
  """
  with _handler(lambda number, frame: leave(told=False), within):
    yield


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Ends with a line, and code 130, at a Ctrl-C; at a second one at once.

  A library may turn the first into an error of its own, or swallow it: it ends
  the context all the same. One that came within a destructor, where Python
  drops what is raised, comes again.
  """
  asked, dropped, drop = False, False, sys.unraisablehook

  def ask(number: int, frame: Any) -> None:
    nonlocal asked, dropped
    if asked and not dropped:
      leave(told=False)
    asked, dropped = True, False
    raise KeyboardInterrupt

  def unraisable(found: Any) -> None:
    nonlocal dropped
    if not issubclass(found.exc_type, KeyboardInterrupt):
      drop(found)
    elif asked and not dropped:
      dropped = True
      # Not here, where it would be dropped again; and to this thread, which may
      # be waiting for something.
      import threading

      again = [threading.main_thread().ident, signal.SIGINT]
      threading.Timer(0.1, signal.pthread_kill, again).start()

  sys.unraisablehook = unraisable
  try:
    with _handler(ask, within=False):
      yield
  except BaseException as error:
    if not asked and not isinstance(error, KeyboardInterrupt):
      raise
    asked = True
  finally:
    sys.unraisablehook = drop
  if asked:
    print(_TOLD, file=sys.stderr)
    raise SystemExit(CODE)


def leave(told: bool) -> NoReturn:
  """Ends this process after a Ctrl-C, and waits for no thread of a library.

  Args:
    told: whether the line is written.
  """
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(RuntimeError):  # the signal came as it was written
      stream.flush()
  if not told:
    os.write(2, f"{_TOLD}\n".encode())
  os._exit(CODE)


@contextlib.contextmanager
def _handler(
  handler: Callable[[int, Any], None], within: bool
) -> Iterator[None]:
  # A shell has its background jobs ignore it.
  before = signal.getsignal(signal.SIGINT)
  heard = getattr(before, "__module__", "") == __name__ or (
    before is signal.default_int_handler and not within
  )
  if heard:
    signal.signal(signal.SIGINT, handler)
  try:
    yield
  finally:
    if heard:
      signal.signal(signal.SIGINT, before)
