"""Has chat templates rendered by `renderer.py`, in a process that is kept.

A process for each text would take a hundred times as long as the text does. One
that is kept costs a tenth of a second when the first text is asked for, and a
trip through two pipes for each conversation.
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

# By its path, which holds whatever the package is called; without its folder
# among those of modules, as there is a `tokenizer.py` in it.
_COMMAND = [sys.executable, "-P", renderer.__file__]


class _Renderer:
  """A process of `renderer.py`, which is started when it is asked."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._process: subprocess.Popen[bytes] | None = None

  def render(
    self, source: str, variables: Sequence[Mapping[str, Any]]
  ) -> tuple[list[str], str]:
    """Renders a template once for each of some variables.

    Returns:
      the texts before the first that fails, and what is wrong with that one;
      "" if none fails.
    """
    with self._lock:
      process = self._started()
      try:
        return self._asked(process, source, variables)
      except BaseException:
        # An answer that nobody reads would be taken for the next one's.
        self.close()
        raise

  def close(self) -> None:
    """Ends the process, if there is one."""
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
        # Ctrl-C is for the program alone.
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
      # A row of Parquet may hold a date, which JSON has not.
      request = json.dumps((source, variables), default=str)
      process.stdin.write(request.encode() + b"\n")
      process.stdin.flush()
    except BrokenPipeError:
      pass  # it says below how it ended
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
