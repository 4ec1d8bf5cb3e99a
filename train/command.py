"""What the program is called: in the repository, and where it is installed."""

from collections.abc import Iterator
import contextlib
import sys

# The wheel carries this package by another name, which is nobody else's.
PACKAGE = __package__ or "train"
"""What `python -m` takes."""
NAME = "python -m train" if PACKAGE == "train" else "bilora"
"""What a command line starts with."""
RESUMES = (
  "the same command resumes from the last checkpoint, or starts again if "
  "there is none."
)
"""What is true of a run however it was ended."""


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
