"""SuperGLUE's tasks, read from small files in the format of the originals."""

import json
from typing import Any

import pytest

from train import tasks
from train.tasks import pipeline, prepare

# name: folder, a stored row, its text and label
CASES = {
  "super_glue/boolq": (
    "BoolQ",
    {"question": "is rain wet", "passage": "Rain -- it is wet.", "label": True},
    (("is rain wet", "Rain -- it is wet."), 1),
  ),
  "super_glue/cb": (
    "CB",
    {"premise": "It was. Was it?", "hypothesis": "it was", "label": "neutral"},
    (("It was. Was it?", "it was"), 2),
  ),
  "super_glue/copa": (
    "COPA",
    {
      "premise": "My body cast a shadow.",
      "choice1": "The sun was rising.",
      "choice2": "The grass was cut.",
      "question": "cause",
      "label": 0,
    },
    (
      (
        "My body cast a shadow. What was the cause?",
        "1: The sun was rising. 2: The grass was cut.",
      ),
      0,
    ),
  ),
  "super_glue/wic": (
    "WiC",
    {
      "word": "place",
      "sentence1": "Do you want to come over to my place later?",
      "sentence2": "A political system with no place for the less known.",
      "start1": 31,
      "end1": 36,
      "start2": 27,
      "end2": 32,
      "version": 1.1,
      "label": False,
    },
    (
      (
        "place: Do you want to come over to my place later?",
        "A political system with no place for the less known.",
      ),
      0,
    ),
  ),
}


def _files(folder, row):
  unlabelled = {key: value for key, value in row.items() if key != "label"}

  def lines(row, count):
    return "".join(json.dumps({**row, "idx": i}) + "\n" for i in range(count))

  return {
    f"{folder}/train.jsonl": lines(row, 3),
    f"{folder}/val.jsonl": lines(row, 1),
    f"{folder}/test.jsonl": lines(unlabelled, 1),
  }


def test_every_task_of_super_glue_is_tried_here():
  names = {name for name in tasks.names() if name.startswith("super_glue/")}
  assert names == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_texts_and_labels_are_those_of_the_files(name, put):
  folder, stored, row = CASES[name]
  data_dir = put(name, _files(folder, stored))
  task = tasks.get(name)
  assert pipeline.load(task, "test", data_dir) == [row]
  # Rows with one text are all on one side, whichever it is.
  train = pipeline.load(task, "train", data_dir)
  validation = pipeline.load(task, "validation", data_dir)
  assert sorted([train, validation]) == [[], [row] * 3]
  source: Any = prepare.open_stored(task, "train", data_dir)
  names = source.dataset_info.features["label"].names
  assert tuple(names) == task.labels


def test_a_field_may_hold_braces(put):
  _, stored, _ = CASES["super_glue/boolq"]
  stored = {**stored, "question": "is {x} wet"}
  data_dir = put("super_glue/boolq", _files("BoolQ", stored))
  (row,) = pipeline.load(tasks.get("super_glue/boolq"), "test", data_dir)
  assert row.text[0] == "is {x} wet"


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{not json", "CB/train.jsonl, line 4 must be a JSON object"),
    ("[1]", "line 4 must be a JSON object"),
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
  folder, stored, _ = CASES["super_glue/cb"]
  files = _files(folder, stored)
  files["CB/train.jsonl"] += line + "\n"
  data_dir = put("super_glue/cb", files)
  with pytest.raises(RuntimeError, match=message):
    pipeline.load(tasks.get("super_glue/cb"), "test", data_dir)


def test_a_failed_download_says_what_was_tried(tmp_path):
  with pytest.raises(RuntimeError, match=r"superglue/data/v2/WiC\.zip failed"):
    pipeline.load(tasks.get("super_glue/wic"), "test", tmp_path)
