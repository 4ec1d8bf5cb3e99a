"""What cannot be written is called by its name, and the old file is whole."""

import errno
import resource
import signal

import numpy as np
import pytest

from train import files
from train.errors import UsageError


@pytest.fixture
def no_space():
  """Has files be of 1000 bytes at most, whichever language writes them."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, before)
  signal.signal(signal.SIGXFSZ, heard)


@pytest.mark.parametrize("kind", ["tensors", "json"])
def test_a_full_disk_leaves_the_old_file(tmp_path, no_space, kind):
  path = tmp_path / "file"
  path.write_text("old")
  with pytest.raises(OSError, match="File too large") as error:
    if kind == "tensors":
      files.save_tensors(path, {"x": np.zeros(1000)})
    else:
      files.write_json(path, {"x": [0] * 1000})
  assert error.value.errno == errno.EFBIG
  assert error.value.filename == str(path)
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]


def test_a_file_within_a_folder_is_called_by_the_folder_s_own_name(tmp_path):
  out, part = tmp_path / "out", tmp_path / ".out.part"
  with (
    pytest.raises(OSError, match="No such file") as error,
    files.naming(out, part),
  ):
    files.write_json(part / "config.json", {})
  assert error.value.filename == str(out / "config.json")
  # What is elsewhere keeps its name.
  with (
    pytest.raises(OSError, match="No such file") as error,
    files.naming(out, part),
  ):
    (tmp_path / "absent").read_text()
  assert error.value.filename == str(tmp_path / "absent")


@pytest.mark.parametrize(
  ("name", "part"),
  [
    ("", "must be a file; got"),
    ("no/x.json", "in a folder that does not exist"),
  ],
)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
  tmp_path, name, part
):
  with pytest.raises(UsageError, match=f"^--json .*{part}"):
    files.check_place("--json", tmp_path / name)
  files.check_place("--json", tmp_path / "x.json")
  assert not list(tmp_path.iterdir())
