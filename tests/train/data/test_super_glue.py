"""SuperGLUE's tasks, read from small files in the format of the originals."""

from typing import Any

import pytest
import super_glue_files

from train.data import pipeline
from train.data import registry as tasks

# What is read of a stored row: its text and label.
CASES = {
  "super_glue/boolq": (("is rain wet", "Rain -- it is wet."), 1),
  "super_glue/cb": (("It was. Was it?", "it was"), 2),
  "super_glue/copa": (
    (
      "My body cast a shadow. What was the cause?",
      "1: The sun was rising. 2: The grass was cut.",
    ),
    0,
  ),
  "super_glue/wic": (
    (
      "place: Do you want to come over to my place later?",
      "A political system with no place for the less known.",
    ),
    0,
  ),
}


def _files(name, **changed):
  _, row = super_glue_files.ROWS[name]
  row = row | changed
  return super_glue_files.files(name, [row] * 3, [row])


def test_every_task_of_super_glue_is_tried_here():
  names = {name for name in tasks.names() if name.startswith("super_glue/")}
  assert names == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_texts_and_labels_are_those_of_the_files(name, put):
  row = CASES[name]
  data_dir = put(name, _files(name))
  task = tasks.get(name)
  assert pipeline.load(task, "test", data_dir) == [row]
  # Rows with one text are all on one side, whichever it is.
  train = pipeline.load(task, "train", data_dir)
  validation = pipeline.load(task, "validation", data_dir)
  assert sorted([train, validation]) == [[], [row] * 3]
  source: Any = task.source.read("train", data_dir)
  names = source.dataset_info.features["label"].names
  assert tuple(names) == task.labels


def test_a_field_may_hold_braces(put):
  name = "super_glue/boolq"
  data_dir = put(name, _files(name, question="is {x} wet"))
  (row,) = pipeline.load(tasks.get("super_glue/boolq"), "test", data_dir)
  assert row.text[0] == "is {x} wet"


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{not json", "CB/train.jsonl, line 4, is not JSON in UTF-8"),
    ("[1]", "line 4, must hold an object"),
    ('{"premise": "a", "idx": 3, "label": "neutral"}', "hypothesis"),
    (
      '{"premise": "a", "hypothesis": "b", "idx": 3, "label": "maybe"}',
      "line 4 has the label 'maybe'; the labels are entailment, contra",
    ),
    (
      '{"premise": "a", "hypothesis": "b", "idx": 3, "label": 3}',
      "line 4 has the label 3; the labels are entailment, contra",
    ),
  ],
)
def test_a_bad_line_is_named(line, message, put):
  files = _files("super_glue/cb")
  files["CB/train.jsonl"] += line + "\n"
  data_dir = put("super_glue/cb", files)
  with pytest.raises(RuntimeError, match=message):
    pipeline.load(tasks.get("super_glue/cb"), "test", data_dir)


def test_a_failed_download_says_what_was_tried(tmp_path):
  with pytest.raises(RuntimeError, match=r"superglue/data/v2/WiC\.zip failed"):
    pipeline.load(tasks.get("super_glue/wic"), "test", tmp_path)
