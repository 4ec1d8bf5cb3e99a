"""The names of the program, in the repository and when it is installed."""

from collections.abc import Iterator
import contextlib
import sys

# The wheel has this package under a name that no other package uses.
PACKAGE = __package__ or "train"
"""The name after `python -m`."""
NAME = "python -m train" if PACKAGE == "train" else "bilora"
"""The first words of a command line."""
RESUMES = (
  "the same command resumes from the last checkpoint, or starts again if "
  "there is none."
)
"""How a user continues a run, however it ended."""


@contextlib.contextmanager
def needing_the_extra() -> Iterator[None]:
  """Ends with a message and exit code 2 if a package is not installed."""
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
