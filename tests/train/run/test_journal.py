"""What a run writes down: whole lines, once, or a sentence."""

import json
import os
import pathlib
import stat
import struct

from outcomes import rows
import pytest
from tensorboardX.proto import event_pb2

from train import files as files_lib
from train.errors import RunError, UsageError
from train.run import journal as journal_lib
from train.run.loggers import jsonl
from train.run.loggers.logger import Opened

FULL = pathlib.Path("/dev/full")


def _journal(folder, step=0):
  return journal_lib.make(Opened(folder, step, 100, {}))


def _write(folder, step, *steps):
  journal = _journal(folder, step)
  for at in steps:
    journal.log(at, loss=at / 10, accuracy=None)
  journal.close()


def _events(folder):
  """The events of TensorBoard's files: length, CRC, an event, CRC."""
  found = []
  for path in sorted((folder / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack("<Q", data[:8])
      found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
      data = data[12 + size + 4 :]
  return found


def test_scalars_are_in_both_files_and_none_is_left_out(tmp_path):
  _write(tmp_path, 0, 10, 20)
  assert rows(tmp_path) == [
    {"step": 10, "loss": 1.0},
    {"step": 20, "loss": 2.0},
  ]
  scalars = [
    (event.step, value.tag, value.simple_value)
    for event in _events(tmp_path)
    for value in event.summary.value
  ]
  assert scalars == [(10, "loss", 1.0), (20, "loss", 2.0)]


def test_lines_are_on_disk_at_once(tmp_path):
  journal = _journal(tmp_path)
  journal.log(1, loss=0.5)
  assert rows(tmp_path) == [{"step": 1, "loss": 0.5}]
  assert [e.step for e in _events(tmp_path) if e.summary.value] == [1]
  journal.close()


def test_what_came_after_the_step_of_a_resume_is_dropped(tmp_path):
  _write(tmp_path, 0, 10, 20, 30)
  _write(tmp_path, 15, 20)
  assert [row["step"] for row in rows(tmp_path)] == [10, 20]
  starts = [
    event.step
    for event in _events(tmp_path)
    if event.session_log.status == event_pb2.SessionLog.START
  ]
  # TensorBoard forgets what other files have from these steps on.
  assert starts == [1, 16]


def test_a_last_line_cut_by_a_kill_is_left_out(tmp_path):
  _write(tmp_path, 0, 10, 20)
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text()[:-5])
  assert [row["step"] for row in jsonl.read(tmp_path)] == [10]
  _write(tmp_path, 10, 20)
  assert [row["step"] for row in rows(tmp_path)] == [10, 20]


def test_another_line_that_is_cut_is_named(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(UsageError, match=r"metrics\.jsonl, line 2, is not JSON"):
    jsonl.read(tmp_path)


def test_a_folder_without_metrics_has_no_rows(tmp_path):
  assert jsonl.read(tmp_path) == []


@pytest.mark.skipif(not FULL.exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize("which", ["metrics", "tensorboard"])
def test_a_full_disk_is_a_sentence_and_no_hang(tmp_path, which):
  journal = _journal(tmp_path)
  board = journal._loggers[1]
  if which == "metrics":
    journal._loggers[0]._file.close()
    journal._loggers[0]._file = FULL.open("w", buffering=1)
  else:
    writer = board._writer._py_recordio_writer
    writer._writer.close()
    writer._writer = FULL.open("wb", buffering=0)
  # tensorboardX's own writer would block at its eleventh value.
  for step in range(20):
    with pytest.raises(RunError, match=f"step {step} .*No space left") as error:
      journal.log(step, loss=1.0)
    assert str(tmp_path) in str(error.value)
  journal.close()
  board._writer._py_recordio_writer.close()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "results.json"
  files_lib.write_json(path, {"accuracy": 0.5})

  def fail(descriptor):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(OSError, match="No space left"):
    files_lib.write_json(path, {"accuracy": 0.75})
  assert json.loads(path.read_text()) == {"accuracy": 0.5}
  assert list(tmp_path.iterdir()) == [path]


def test_files_have_the_permissions_of_any_other(tmp_path):
  before = os.umask(0o027)
  try:
    files_lib.write_atomically(tmp_path / "a", "text")
    _write(tmp_path, 0, 1)
  finally:
    os.umask(before)
  for name in ("a", "metrics.jsonl"):
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_a_line_is_said_as_it_is(tmp_path, capsys):
  journal = _journal(tmp_path)
  journal.say("a folder [bold]/x[/bold] :smile:" + " long" * 40)
  journal.close()
  shown = capsys.readouterr().out
  assert shown == "a folder [bold]/x[/bold] :smile:" + " long" * 40 + "\n"
