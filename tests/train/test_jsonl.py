"""One reader of JSONL: users' rows whole, logs without what a kill has cut."""

import gzip

import pytest

from train import jsonl
from train.errors import UsageError


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_values_come_with_their_lines(name, tmp_path):
  path = tmp_path / name
  data = '{"a": "é"}\n\n[1]'.encode()
  path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
  found = list(jsonl.read(path))
  assert found == [(f"{path}, line 1", {"a": "é"}), (f"{path}, line 3", [1])]


def test_a_log_is_read_to_its_last_whole_line(tmp_path):
  path = tmp_path / "log.jsonl"
  assert jsonl.read_log(path) == []
  path.write_text('{"a": 1}\n{"a": 2')
  assert jsonl.read_log(path) == [{"a": 1}]
  with pytest.raises(UsageError, match="line 2, is not JSON"):
    list(jsonl.read(path))
