"""GLUE's tasks, prepared by TFDS's own builder from small original files."""

import http.client
import io
from typing import Any
import urllib.request
import zipfile

import glue_files
import pytest

from train import bounds
from train.data import hashing, pipeline
from train.data import registry as tasks
from train.errors import UsageError

# name: files, all texts of `test`, one row of train or validation
CASES = {
  "glue/cola": (glue_files.COLA, ("Dev one.", "Dev them is."), ("Train 7.", 1)),
  "glue/sst2": (glue_files.SST2, ("dev film ", "dev bore "), ("film 7 ", 1)),
  "glue/qnli": (glue_files.QNLI, (("Who?", "Me."),), (("Why 7?", "As 7."), 1)),
  "glue/rte": (glue_files.RTE, (("A.", "B."),), (("Rain 7.", "Wet 7."), 1)),
  "glue/mnli": (
    glue_files.MNLI,
    (("It is matched.", "It is."),),
    (("Premise 7.", "Hypothesis 7."), 1),
  ),
  "glue/mrpc": (
    glue_files.MRPC,
    (('He said "0".', '"0", he said.'), ('He said "1".', '"1", he said.')),
    (('He said "7".', '"7", he said.'), 1),
  ),
}


def test_every_task_of_glue_is_tried_here():
  glue = {name for name in tasks.names() if name.startswith("glue/")}
  assert glue == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_texts_and_labels_are_those_of_the_files(name, put):
  files, test_texts, row = CASES[name]
  data_dir = put(name, files)
  task = tasks.get(name)
  splits = {
    split.name: pipeline.load(task, split.name, data_dir)
    for split in task.splits
  }
  assert {r.text for r in splits["test"]} == set(test_texts)
  assert row in splits["train"] + splits["validation"]
  assert all(0 <= r.label < len(task.labels) for r in splits["train"])
  source: Any = task.source.read("train", data_dir)
  names = source.dataset_info.features["label"].names
  assert tuple(names) == task.labels


def test_validation_is_a_part_of_train_fixed_by_the_text(put):
  data_dir = put("glue/cola", glue_files.COLA)
  task = tasks.get("glue/cola")
  train, validation = (
    {row.text for row in pipeline.load(task, split, data_dir)}
    for split in ("train", "validation")
  )
  expected = {f"Train {i}." for i in range(glue_files.ROWS)}
  assert train | validation == expected
  assert not train & validation
  assert validation == {
    text
    for text in expected
    if hashing.share(hashing.normalise(text)) < task.held_out
  }


def test_a_limit_counts_rows_that_are_not_held_out(put):
  data_dir = put("glue/cola", glue_files.COLA)
  task = tasks.get("glue/cola")
  validation = pipeline.load(task, "validation", data_dir)
  train = pipeline.load(task, "train", data_dir, limit=30)
  assert len(train) == 30
  assert not set(train) & set(validation)


def test_the_share_held_out_is_the_share_asked_for():
  held_out = sum(hashing.share(str(i)) < 0.1 for i in range(10_000))
  assert abs(held_out - 1_000) < 90  # three standard deviations


def test_metrics_are_accuracy_and_for_cola_matthews_correlation_first():
  for name in sorted(CASES):
    expected = ("accuracy",)
    if name == "glue/cola":
      expected = ("matthews_correlation", "accuracy")
    assert tasks.get(name).metrics == expected


def test_a_failed_download_says_what_was_tried_and_what_to_do(tmp_path):
  with pytest.raises(RuntimeError) as error:
    pipeline.load(tasks.get("glue/cola"), "train", tmp_path)
  message = str(error.value)
  assert "downloading https://dl.fbaipublicfiles.com/glue/data/CoLA" in message
  assert f"put it at {tmp_path / 'originals' / 'CoLA.zip'}" in message
  assert "--data-dir" in message


def test_a_download_is_kept_and_prepared(put, monkeypatch):
  data_dir = put("glue/cola", glue_files.COLA)
  original = data_dir / "originals" / "CoLA.zip"
  content = original.read_bytes()
  original.unlink()
  monkeypatch.setattr(
    urllib.request, "urlopen", lambda url, timeout: io.BytesIO(content)
  )
  assert len(pipeline.load(tasks.get("glue/cola"), "test", data_dir)) == 2
  assert original.read_bytes() == content
  assert list(original.parent.iterdir()) == [original]


def test_a_download_cut_off_leaves_nothing_behind(tmp_path, monkeypatch):
  class Cut(io.BytesIO):
    def read(self, size=None):
      raise http.client.IncompleteRead(b"")

  monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Cut())
  with pytest.raises(RuntimeError, match=r"CoLA\.zip failed: IncompleteRead"):
    pipeline.load(tasks.get("glue/cola"), "test", tmp_path)
  assert not list((tmp_path / "originals").iterdir())


def test_a_file_with_another_checksum_is_refused(tmp_path, put, monkeypatch):
  put("glue/cola", glue_files.COLA)
  monkeypatch.undo()  # TFDS knows the true file's checksum again
  with pytest.raises(RuntimeError, match=r"cola cannot be .*wrong checksum"):
    pipeline.load(tasks.get("glue/cola"), "train", tmp_path)


def test_a_file_that_is_no_zip_is_refused(tmp_path):
  (tmp_path / "originals").mkdir()
  (tmp_path / "originals" / "CoLA.zip").write_text("<html>not found</html>")
  with pytest.raises(RuntimeError, match=r"CoLA\.zip is not a zip file"):
    pipeline.load(tasks.get("glue/cola"), "train", tmp_path)


def test_a_zip_without_the_tables_is_refused(put):
  data_dir = put("glue/rte", {"RTE/readme.txt": ""})
  with pytest.raises(RuntimeError, match=r"glue/rte cannot be .*train\.tsv"):
    pipeline.load(tasks.get("glue/rte"), "train", data_dir)


def _zip(path, *members):
  path.parent.mkdir(parents=True, exist_ok=True)
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, content, mode in members:
      info = zipfile.ZipInfo(name)
      info.compress_type = zipfile.ZIP_DEFLATED
      info.external_attr = mode << 16
      archive.writestr(info, content)


@pytest.mark.parametrize(
  ("member", "fault"),
  [
    (("../../evil.tsv", b"", 0o100644), "leads out of the folder"),
    (("/tmp/evil.tsv", b"", 0o100644), "leads out of the folder"),
    (("..\\evil.tsv", b"", 0o100644), "leads out of the folder"),
    (("CoLA/link", b"/etc", 0o120777), "is neither a file nor a folder"),
    (("CoLA/bomb", bytes(2**22), 0o100644), "and more than"),
  ],
)
def test_a_zip_is_checked_before_any_of_it_is_unpacked(
  tmp_path, monkeypatch, member, fault
):
  monkeypatch.setattr(bounds, "_FREE", 2**20)
  path = tmp_path / "originals" / "CoLA.zip"
  _zip(path, ("CoLA/train.tsv", b"", 0), member)
  with pytest.raises((RuntimeError, UsageError), match=fault) as caught:
    pipeline.load(tasks.get("glue/cola"), "train", tmp_path)
  assert str(path) in str(caught.value)
  assert [x.name for x in tmp_path.iterdir()] == ["originals"]


def test_a_zip_of_which_a_file_is_damaged_is_refused(tmp_path):
  path = tmp_path / "originals" / "CoLA.zip"
  _zip(path, ("CoLA/train.tsv", bytes(range(256)) * 9, 0))
  blob = bytearray(path.read_bytes())
  blob[60] ^= 255
  path.write_bytes(blob)
  with pytest.raises(RuntimeError, match=r"CoLA\.zip is not a zip file"):
    pipeline.load(tasks.get("glue/cola"), "train", tmp_path)
