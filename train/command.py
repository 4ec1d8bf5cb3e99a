"""What the program is called, and what ends it before it has begun."""

from collections.abc import Iterator
import contextlib
import os
import signal
import sys
import threading
from typing import Any, NoReturn

# The wheel carries this package by another name, which is nobody else's.
PACKAGE = __package__ or "train"
"""What `python -m` takes."""
NAME = "python -m train" if PACKAGE == "train" else "bilora"
"""What a command line starts with."""
RESUMES = (
  "the same command resumes from the last checkpoint, or begins anew where "
  "there is none."
)
"""What is true of a run however it was ended."""
INTERRUPTED = 130
"""The exit code after a Ctrl-C, as of a shell: 128 and the signal."""


@contextlib.contextmanager
def needing_the_extra() -> Iterator[None]:
  """Ends with a sentence, and code 2, where a package is not installed."""
  try:
    yield
  except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing in ("", PACKAGE):
      raise
    print(
      f"error: {NAME} needs {missing}, which is not installed: "
      "pip install 'bilora_jax[train]'.",
      file=sys.stderr,
    )
    raise SystemExit(2) from None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Ends with a line, and code 130, at a Ctrl-C; at a second one at once.

  A library may turn the first into an error of its own, or swallow it: it ends
  the context all the same. One that came within a destructor, where Python
  drops what is raised, comes again.
  """
  asked, drop = False, sys.unraisablehook

  def ask(number: int, frame: Any) -> None:
    nonlocal asked
    if asked:
      print("interrupted.", file=sys.stderr)
      leave()
    asked = True
    raise KeyboardInterrupt

  def unraisable(found: Any) -> None:
    nonlocal asked
    if not issubclass(found.exc_type, KeyboardInterrupt):
      drop(found)
    elif asked:
      asked = False
      # Not here, where it would be dropped again.
      threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()

  # A shell has its background jobs ignore it.
  heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
  if heard:
    signal.signal(signal.SIGINT, ask)
  sys.unraisablehook = unraisable
  try:
    yield
  except BaseException as error:
    if not asked and not isinstance(error, KeyboardInterrupt):
      raise
    asked = True
  finally:
    sys.unraisablehook = drop
    if heard:
      signal.signal(signal.SIGINT, signal.default_int_handler)
  if asked:
    print("interrupted.", file=sys.stderr)
    raise SystemExit(INTERRUPTED)


def leave() -> NoReturn:
  """Ends this process after a Ctrl-C, and waits for no thread of a library."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(INTERRUPTED)
