"""The logger of TensorBoard's event files."""

from collections.abc import Mapping
import contextlib
import time
from typing import Any

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from .logger import Logger, Opened

# protobuf makes this module's classes on import, so pyright cannot see them.
_events: Any = event_pb2


class Board(Logger):
  """Writes an event file.

  When a run resumes, TensorBoard hides the later steps of earlier files.

  tensorboardX's SummaryWriter is not used. It writes in a thread, which dies if
  the disk is full. Then its queue fills, and the run hangs.
  """

  def __init__(self, opened: Opened):
    folder, first = opened.folder / "tensorboard", opened.step + 1
    folder.mkdir(exist_ok=True)
    self._writer = event_file_writer.EventsWriter(
      str(folder / "events"), f".{first}"
    )
    start = _events.SessionLog(status=_events.SessionLog.START)
    self._add(step=first, session_log=start)

  def log(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._add(step=step, summary=summary.scalar(name, value))
    self._writer.flush()

  def close(self) -> None:
    with contextlib.suppress(OSError):
      self._writer.close()

  def _add(self, **fields: Any) -> None:
    self._writer.write_event(_events.Event(wall_time=time.time(), **fields))
