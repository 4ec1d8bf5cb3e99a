"""Ends the program after Ctrl-C, at any time, with a line and exit code 130.

This module imports only modules that Python has imported already, so that it
works from the first moment.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import sys
from typing import Any, NoReturn

CODE = 130
"""The exit code of shells: 128 plus the number of the signal."""
_TOLD = "interrupted."


@contextlib.contextmanager
def leaving(within: bool = False) -> Iterator[None]:
  """Lets Ctrl-C end the program at once, while it imports modules.

  A KeyboardInterrupt is not enough there. Some modules print it and others drop
  it. Python also remembers it, and ends by the signal afterwards.

  Args:
    within: whether this applies only inside of `interruptible`. Then a caller
      that uses the program as a function is not ended.
  """
  with _handler(lambda number, frame: leave(told=False), within):
    yield


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Ends with a line and code 130 after Ctrl-C; after a second one, at once.

  A library may replace the KeyboardInterrupt by an error of its own, or drop
  it. The context ends with code 130 in these cases, too. Python drops an error
  in a destructor, so the signal is sent again after a Ctrl-C there.
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
      # Not raised here, because Python would drop it again. The signal goes to
      # the main thread itself, to wake it if it waits for something.
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
  """Ends this process after Ctrl-C, without waiting for libraries' threads.

  Args:
    told: whether the line "interrupted." has been written already.
  """
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(RuntimeError):  # interrupted during a write
      stream.flush()
  if not told:
    os.write(2, f"{_TOLD}\n".encode())
  os._exit(CODE)


@contextlib.contextmanager
def _handler(
  handler: Callable[[int, Any], None], within: bool
) -> Iterator[None]:
  # A shell makes its background jobs ignore the signal. That handler stays.
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
