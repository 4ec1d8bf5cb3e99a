"""Renders chat templates in a process of `renderer.py`, which is kept.

To start a process for each text would take a hundred times as long as to render
the text. A kept process takes a tenth of a second to start, once. After that,
each conversation only goes through two pipes.
"""

import atexit
from collections.abc import Mapping, Sequence
import json
import signal
import subprocess
import sys
import threading
from typing import Any

from . import renderer

# The script is named by its path, which does not depend on the package's name.
# -P keeps its folder out of the module path, because the folder has modules
# such as `tokenizer.py`.
_COMMAND = [sys.executable, "-P", renderer.__file__]


class _Renderer:
  """A process of `renderer.py`, which starts at the first request."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._process: subprocess.Popen[bytes] | None = None

  def render(
    self, source: str, variables: Sequence[Mapping[str, Any]]
  ) -> tuple[list[str], str]:
    """Renders a template once for each set of variables.

    Returns:
      the texts before the first failure, and the error of this failure, which
      is "" if all texts are rendered.
    """
    with self._lock:
      process = self._started()
      try:
        return self._asked(process, source, variables)
      except BaseException:
        # An unread answer would become the answer of the next request.
        self.close()
        raise

  def close(self) -> None:
    """Ends the process, if it runs."""
    if self._process is not None:
      self._process.kill()
      self._process.communicate()

  def _started(self) -> subprocess.Popen[bytes]:
    if self._process is None or self._process.poll() is not None:
      self.close()
      self._process = subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Ctrl-C must reach only the main program.
        start_new_session=True,
      )
    return self._process

  def _asked(
    self,
    process: subprocess.Popen[bytes],
    source: str,
    variables: Sequence[Mapping[str, Any]],
  ) -> tuple[list[str], str]:
    assert process.stdin is not None and process.stdout is not None
    texts: list[str] = []
    try:
      # A row of Parquet may hold a date, which JSON does not support.
      request = json.dumps((source, variables), default=str)
      process.stdin.write(request.encode() + b"\n")
      process.stdin.flush()
    except BrokenPipeError:
      pass  # `wait` below returns how the process ended
    for _ in variables:
      line = process.stdout.readline()
      if not line.endswith(b"\n"):
        code = process.wait()
        if code == -signal.SIGPROF:
          return texts, f"it takes more than {renderer.SECONDS} seconds"
        return texts, f"the process that renders it ended with {code}"
      answer = json.loads(line)
      if "error" in answer:
        return texts, answer["error"]
      texts.append(answer["text"])
    return texts, ""


_renderer = _Renderer()
atexit.register(_renderer.close)
render = _renderer.render
