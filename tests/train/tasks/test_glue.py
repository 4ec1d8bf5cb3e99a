"""GLUE's tasks, prepared by TFDS's own builder from small original files."""

import http.client
import io
from typing import Any
import urllib.request

import pytest

from train import tasks
from train.tasks import hashing, pipeline, prepare

ROWS = 40


def _tsv(header: str, *rows: str) -> str:
  lines = [header, *rows] if header else list(rows)
  return "".join(line.replace("|", "\t") + "\n" for line in lines)


def _numbered(template: str) -> list[str]:
  return [template.format(i=i, bit=i % 2) for i in range(ROWS)]


_COLA = {
  "CoLA/train.tsv": _tsv("", *_numbered("gj04|{bit}||Train {i}.")),
  "CoLA/dev.tsv": _tsv("", "gj04|1||Dev one.", "gj04|0|*|Dev them is."),
  "CoLA/test.tsv": _tsv("index|sentence", "0|Test one."),
}
_SST2 = {
  "SST-2/train.tsv": _tsv("sentence|label", *_numbered("film {i} |{bit}")),
  "SST-2/dev.tsv": _tsv("sentence|label", "dev film |1", "dev bore |0"),
  "SST-2/test.tsv": _tsv("index|sentence", "0|test film"),
}
_QNLI_LABELS = ("entailment", "not_entailment")
_QNLI = {
  "QNLI/train.tsv": _tsv(
    "index|question|sentence|label",
    *(f"{i}|Why {i}?|As {i}.|{_QNLI_LABELS[i % 2]}" for i in range(ROWS)),
  ),
  "QNLI/dev.tsv": _tsv(
    "index|question|sentence|label", "0|Who?|Me.|not_entailment"
  ),
  "QNLI/test.tsv": _tsv("index|question|sentence", "0|What?|That."),
}
_RTE = {
  "RTE/train.tsv": _tsv(
    "index|sentence1|sentence2|label",
    *(f"{i}|Rain {i}.|Wet {i}.|{_QNLI_LABELS[i % 2]}" for i in range(ROWS)),
  ),
  "RTE/dev.tsv": _tsv("index|sentence1|sentence2|label", "0|A.|B.|entailment"),
  "RTE/test.tsv": _tsv("index|sentence1|sentence2", "0|C.|D."),
}
_MNLI_HEADER = (
  "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse"
  "|sentence1_parse|sentence2_parse|sentence1|sentence2"
)
_MNLI_LABELS = ("entailment", "neutral", "contradiction")
_MNLI = {
  "MNLI/train.tsv": _tsv(
    _MNLI_HEADER + "|label1|gold_label",
    *(
      f"{i}|1|1n|fiction|(a)|(b)|(A)|(B)|Premise {i}.|Hypothesis {i}."
      f"|{_MNLI_LABELS[i % 3]}|{_MNLI_LABELS[i % 3]}"
      for i in range(ROWS)
    ),
  ),
  **{
    f"MNLI/dev_{kind}.tsv": _tsv(
      _MNLI_HEADER + "|label1|label2|label3|label4|label5|gold_label",
      f"0|1|1n|slate|(a)|(b)|(A)|(B)|It is {kind}.|It is.|"
      + "neutral|" * 5
      + "neutral",
    )
    for kind in ("matched", "mismatched")
  },
  **{
    f"MNLI/test_{kind}.tsv": _tsv(
      _MNLI_HEADER, "0|1|1n|slate|(a)|(b)|(A)|(B)|T.|H."
    )
    for kind in ("matched", "mismatched")
  },
}
_MRPC_HEADER = "Quality|#1 ID|#2 ID|#1 String|#2 String"
_MRPC = {
  "data_mrpc_dev_ids.tsv": _tsv("", "100|200", "101|201"),
  # The true file begins with a byte order mark.
  "msr_paraphrase_train.txt": "\ufeff"
  + _tsv(
    _MRPC_HEADER,
    *(
      f'{i % 2}|{100 + i}|{200 + i}|He said "{i}".|"{i}", he said.'
      for i in range(ROWS)
    ),
  ),
  "msr_paraphrase_test.txt": "\ufeff" + _tsv(_MRPC_HEADER, "1|1|2|E.|F."),
}

# name: files, all texts of `test`, one row of train or validation
CASES = {
  "glue/cola": (_COLA, ("Dev one.", "Dev them is."), ("Train 7.", 1)),
  "glue/sst2": (_SST2, ("dev film ", "dev bore "), ("film 7 ", 1)),
  "glue/qnli": (_QNLI, (("Who?", "Me."),), (("Why 7?", "As 7."), 1)),
  "glue/rte": (_RTE, (("A.", "B."),), (("Rain 7.", "Wet 7."), 1)),
  "glue/mnli": (
    _MNLI,
    (("It is matched.", "It is."),),
    (("Premise 7.", "Hypothesis 7."), 1),
  ),
  "glue/mrpc": (
    _MRPC,
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
  source: Any = prepare.open_stored(task, "train", data_dir)
  names = source.dataset_info.features["label"].names
  assert tuple(names) == task.labels


def test_mnli_has_both_of_its_labelled_validation_splits(put):
  data_dir = put("glue/mnli", _MNLI)
  rows = pipeline.load(tasks.get("glue/mnli"), "test_mismatched", data_dir)
  assert rows == [(("It is mismatched.", "It is."), 1)]


def test_validation_is_a_part_of_train_fixed_by_the_text(put):
  data_dir = put("glue/cola", _COLA)
  task = tasks.get("glue/cola")
  train, validation = (
    {row.text for row in pipeline.load(task, split, data_dir)}
    for split in ("train", "validation")
  )
  expected = {f"Train {i}." for i in range(ROWS)}
  assert train | validation == expected
  assert not train & validation
  assert validation == {
    text
    for text in expected
    if hashing.share(hashing.normalise(text)) < task.held_out
  }


def test_a_limit_counts_rows_that_are_not_held_out(put):
  data_dir = put("glue/cola", _COLA)
  task = tasks.get("glue/cola")
  validation = pipeline.load(task, "validation", data_dir)
  train = pipeline.load(task, "train", data_dir, limit=30)
  assert len(train) == 30
  assert not set(train) & set(validation)


def test_the_share_held_out_is_the_share_asked_for():
  held_out = sum(hashing.share(str(i)) < 0.1 for i in range(10_000))
  assert abs(held_out - 1_000) < 90  # three standard deviations


def test_metrics_are_accuracy_and_for_cola_matthews_correlation_first():
  for name in tasks.names():
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
  data_dir = put("glue/cola", _COLA)
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
  put("glue/cola", _COLA)
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
