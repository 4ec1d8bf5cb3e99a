"""Files that become far more than they are: refused while they are read."""

import gzip
import json

import pyarrow as pa
from pyarrow import ipc, parquet
import pytest

from train import bounds
from train.data import tables
from train.errors import UsageError


@pytest.fixture(autouse=True)
def little(monkeypatch):
  """A free megabyte in place of 256, so that the bombs are small."""
  monkeypatch.setattr(bounds, "_FREE", 2**20)


def _refused(path):
  with pytest.raises(UsageError) as caught:
    tables.read(path)
  message = str(caught.value)
  assert str(path) in message and "and more than" in message
  assert "\n" not in message


@pytest.mark.parametrize("name", ["a.csv.gz", "a.tsv.gz", "a.jsonl.gz"])
def test_a_gzipped_bomb_is_refused(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(gzip.compress(b"text,label\n" + b"a" * 20_000_000))
  _refused(path)


def test_a_table_of_one_long_text_over_and_over_is_refused(tmp_path):
  path = tmp_path / "a.parquet"
  texts = pa.array(["a" * 10_000] * 5000).dictionary_encode()
  parquet.write_table(pa.table({"text": texts.cast(pa.string())}), path)
  _refused(path)


def test_a_table_of_very_many_empty_rows_is_refused(tmp_path):
  path = tmp_path / "a.parquet"
  parquet.write_table(pa.table({"text": pa.nulls(2_000_000)}), path)
  _refused(path)


def test_a_saved_dataset_that_is_a_bomb_is_refused(tmp_path):
  table = pa.table({"text": ["a" * 100_000] * 300})
  options = ipc.IpcWriteOptions(compression="zstd")
  with ipc.new_stream(tmp_path / "a.arrow", table.schema, options=options) as x:
    x.write_table(table)
  state = {"_data_files": [{"filename": "a.arrow"}]}
  (tmp_path / "state.json").write_text(json.dumps(state))
  with pytest.raises(UsageError, match=r"a\.arrow has .* and more than"):
    tables.read(tmp_path)


def test_data_that_repeat_themselves_are_read(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  row = json.dumps({"text": "the same text in each row", "label": 1}).encode()
  lines = [row[:-1] + b', "id": %d}' % i for i in range(20_000)]
  path.write_bytes(gzip.compress(b"\n".join(lines)))
  assert path.stat().st_size < 2**20 < sum(map(len, lines))
  assert len(tables.read(path)["train"].rows) == 20_000


@pytest.mark.parametrize("rows", [1, 5000])
def test_a_parquet_file_is_read_in_order_with_its_types(tmp_path, rows):
  table = pa.table(
    {
      "text": [f"text {i}" for i in range(rows)],
      "label": pa.array(["a", "b"] * rows)[:rows].dictionary_encode(),
      "more": [[i, None] for i in range(rows)],
    },
    metadata={b"huggingface": b'{"info": {"features": null}}'},
  )
  # Names of folders are no columns.
  (tmp_path / "year=1").mkdir()
  path = tmp_path / "year=1" / "a.parquet"
  parquet.write_table(table, path, row_group_size=700)
  found = tables.read(path)["train"]
  assert found.columns == ("text", "label", "more")
  assert list(found.rows) == parquet.read_table(path).to_pylist()
