"""A process that waits, and runs a training step on each request.

This module needs only the standard library, because the two sides of a
comparison run it in different Python environments.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any


def serve(start: Callable[[], tuple[Callable[[], float], dict]]) -> None:
  """Answers requests on the standard streams until the input ends.

  Args:
    start: returns a function that runs a step and returns its loss, and a
      description of it.
  """
  # Standard output goes to standard error, because `Worker` would take the
  # prints of libraries for answers.
  answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  step, about = start()
  print(json.dumps(about), file=answers, flush=True)
  for _ in sys.stdin:
    print(json.dumps(step()), file=answers, flush=True)


class Worker:
  """The client of a process that runs `serve`."""

  def __init__(
    self,
    python: str,
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
  ):
    """Starts `python -m module` in the repository's root, and waits for it."""
    self._process = subprocess.Popen(
      [python, "-m", module, *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      cwd=pathlib.Path(__file__).parents[1],
      env=os.environ | environment,
    )
    self._name = f"{python} -m {module}"
    self.about: dict[str, Any] = self._answer()

  def step(self) -> float:
    """Runs one step.

    Returns:
      The loss of the step.

    Raises:
      RuntimeError: if the process has ended.
    """
    assert self._process.stdin
    # `_answer` explains the end of the process better than this error.
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write("step\n")
      self._process.stdin.flush()
    return self._answer()

  def close(self) -> None:
    """Ends the process."""
    self._process.communicate()

  def _answer(self) -> Any:
    assert self._process.stdout
    line = self._process.stdout.readline()
    if not line:
      self.close()
      raise RuntimeError(
        f"{self._name} ended with status {self._process.returncode}; what it "
        "wrote stands above."
      )
    return json.loads(line)
