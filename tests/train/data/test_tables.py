"""Tables: the same rows from every form of file, and errors with a place."""

import csv
import gzip
import io
import json

import numpy as np
import PIL.Image
import pyarrow as pa
from pyarrow import ipc, parquet
import pytest
import tensorflow_datasets as tfds

from train.data import tables

ROWS = [
  {"text": 'She said "no",\nthen left.', "label": "sad"},
  {"text": "Schön, isn't it?", "label": "glad"},
  {"text": " 007 ", "label": "1.50"},
]


def _delimited(path, delimiter, rows=ROWS, encoding="utf-8", **options):
  text = io.StringIO()
  writer = csv.DictWriter(text, [*rows[0]], delimiter=delimiter, **options)
  writer.writeheader()
  writer.writerows(rows)
  data = text.getvalue().encode(encoding)
  path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_saved(folder, splits, features=None):
  """A folder as `datasets.DatasetDict.save_to_disk` writes it."""
  for split, rows in splits.items():
    where = folder / split if len(splits) > 1 else folder
    where.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    files = []
    for i in range(2):  # of two shards
      half = table.slice(i * (len(rows) // 2), None if i else len(rows) // 2)
      files.append({"filename": f"data-{i:05}-of-00002.arrow"})
      with ipc.new_stream(where / files[-1]["filename"], table.schema) as out:
        out.write_table(half)
    state = {"_data_files": files, "_fingerprint": "1", "_split": split}
    (where / "state.json").write_text(json.dumps(state))
    info = {"features": features or {}, "citation": ""}
    (where / "dataset_info.json").write_text(json.dumps(info))
  if len(splits) > 1:
    names = json.dumps({"splits": [*splits]})
    (folder / "dataset_dict.json").write_text(names)
  return folder


def _write(folder, kind):
  path = folder / f"rows.{kind}"
  if kind.startswith("csv"):
    # As spreadsheets write it.
    _delimited(path, ",", encoding="utf-8-sig", lineterminator="\r\n")
  elif kind.startswith("tsv"):
    _delimited(path, "\t")
  elif kind.startswith("jsonl"):
    data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
  elif kind == "parquet":
    parquet.write_table(pa.Table.from_pylist(ROWS), path)
  else:
    write_saved(path, {"train": ROWS})
  return path


@pytest.mark.parametrize(
  "kind",
  ["csv", "csv.gz", "tsv", "tsv.gz", "jsonl", "jsonl.gz", "parquet", "saved"],
)
def test_every_form_has_the_same_rows(kind, tmp_path):
  (split,) = found = tables.read(_write(tmp_path, kind))
  assert split == "train"
  assert found[split].columns == ("text", "label")
  assert list(found[split].rows) == ROWS


@pytest.mark.parametrize(
  ("kind", "place"),
  [
    ("csv", "rows.csv, line 4"),  # the first text has two lines
    ("jsonl", "rows.jsonl, line 2"),
    ("parquet", "rows.parquet, row 2"),
  ],
)
def test_a_row_has_a_place(kind, place, tmp_path):
  table = tables.one(_write(tmp_path, kind))
  assert table.where(1) == f"{tmp_path}/{place}"


def test_a_tsv_may_have_quotes_that_mean_nothing(tmp_path):
  path = tmp_path / "rows.tsv"
  path.write_text('text\tlabel\n"Well" he said\ta\n6" tall\tb\n"So\tb\n')
  texts = [row["text"] for row in tables.one(path).rows]
  assert texts == ['"Well" he said', '6" tall', '"So']


def test_saved_splits_and_the_names_of_classes_are_read(tmp_path):
  rows = [{"text": f"t{i}", "label": i % 2} for i in range(4)]
  feature = {"names": ["no", "yes"], "_type": "ClassLabel"}
  path = write_saved(
    tmp_path / "saved",
    {"train": rows, "valid": rows[:2], "other": rows},
    {"text": {"dtype": "string", "_type": "Value"}, "label": feature},
  )
  found = tables.read(path)
  assert {name: len(table.rows) for name, table in found.items()} == {
    "train": 4,
    "validation": 2,
  }
  assert found["train"].names == {"label": ("no", "yes")}
  # In a Parquet file, they are in the schema.
  table = pa.Table.from_pylist(rows)
  info = json.dumps({"info": {"features": {"label": feature}}})
  parquet.write_table(
    table.replace_schema_metadata({"huggingface": info}),
    tmp_path / "rows.parquet",
  )
  assert tables.one(tmp_path / "rows.parquet").names == {"label": ("no", "yes")}


def _images(folder, classes=("cat", "dog"), count=2):
  for i, name in enumerate(classes):
    (folder / name).mkdir(parents=True)
    for n in range(count):
      pixels = np.full((4, 5 + n, 3), 20 * i + n, np.uint8)
      PIL.Image.fromarray(pixels).save(folder / name / f"{n}.png")


def test_images_are_of_their_folders_classes(tmp_path):
  _images(tmp_path / "flat")
  (tmp_path / "flat" / "cat" / "notes.txt").write_text("left alone")
  table = tables.one(tmp_path / "flat")
  assert [row["label"] for row in table.rows] == ["cat", "cat", "dog", "dog"]
  assert table.rows[3]["image"] == str(tmp_path / "flat" / "dog" / "1.png")
  for split in ("train", "val", "test"):
    _images(tmp_path / "split" / split)
  found = tables.read(tmp_path / "split")
  assert sorted(found) == ["test", "train", "validation"]
  assert found["validation"].rows[0]["label"] == "cat"


def test_a_prepared_tfds_dataset_has_its_splits_and_names(tmp_path):
  class TinyMoods(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      names = tfds.features.ClassLabel(names=["no", "yes"])
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
          {"sentence": tfds.features.Text(), "label": names}
        ),
      )

    def _split_generators(self, dl_manager):
      return {x: self._generate_examples() for x in ("train", "test")}

    def _generate_examples(self):
      for i in range(4):
        yield i, {"sentence": f"é{i}", "label": i % 2}

  TinyMoods(
    data_dir=tmp_path, file_format="array_record"
  ).download_and_prepare()
  found = tables.read("tfds:tiny_moods", tmp_path)
  assert sorted(found) == ["test", "train"]
  assert found["test"].names == {"label": ("no", "yes")}
  assert sorted(row["sentence"] for row in found["test"].rows) == [
    f"é{i}" for i in range(4)
  ]
  assert type(found["test"].rows[0]["label"]) is int


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("a.csv", "text,label\n", r"a\.csv has no rows"),
    ("a.csv", "", r"a\.csv has no rows"),
    (
      "a.csv",
      "a,b\n1,2\n1,2,3\n",
      "line 3, has 3 columns; the first line name",
    ),
    ("a.csv", 'a,b\n"1,2\n', r"a\.csv, line 2, cannot be read: unexpected end"),
    ("a.csv", "a,a\n1,2\n", "line 1, names a column twice: a, a"),
    ("a.csv", b"a,b\n\xff,2\n", "cannot be read: .*utf-8"),
    ("a.jsonl", '{"a": 1}\n{"a"\n', "line 2, is not JSON in UTF-8"),
    ("a.jsonl", "[1]\n", "line 1, is not an object"),
    ("a.parquet", "PAR2", r"a\.parquet cannot be read"),
    (
      "a.xlsx",
      "",
      r"is not a file of rows; rows must be a \.csv, .* or tfds:NAME",
    ),
  ],
)
def test_what_is_no_table_is_named(name, text, message, tmp_path):
  path = tmp_path / name
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(ValueError, match=message):
    tables.read(path)


def test_semicolons_separate_where_no_comma_does(tmp_path):
  path = tmp_path / "a.csv"
  path.write_text('text;label\n"good; and, well";1\n')
  (row,) = tables.one(path).rows
  assert row == {"text": "good; and, well", "label": "1"}


def test_what_cannot_be_read_is_named(tmp_path):
  with pytest.raises(
    ValueError, match=r"none\.csv is not there; rows must be a"
  ):
    tables.read(tmp_path / "none.csv")
  path = _write(tmp_path, "csv.gz")
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(ValueError, match=r"rows\.csv\.gz, line .* cannot be rea"):
    tables.read(path)
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="empty has no images"):
    tables.read(tmp_path / "empty")
