"""Small files in the format of SuperGLUE's originals: member -> its text."""

from collections.abc import Iterable, Mapping
import json
from typing import Any

# task: its folder, and a stored row.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
  "super_glue/boolq": (
    "BoolQ",
    {"question": "is rain wet", "passage": "Rain -- it is wet.", "label": True},
  ),
  "super_glue/cb": (
    "CB",
    {"premise": "It was. Was it?", "hypothesis": "it was", "label": "neutral"},
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
  ),
}
_LABELS = {
  "super_glue/boolq": (True, False),
  "super_glue/cb": ("entailment", "contradiction", "neutral"),
  "super_glue/copa": (0, 1),
  "super_glue/wic": (True, False),
}
_NUMBERED = ("question", "premise", "sentence1")


def files(
  name: str,
  train: Iterable[Mapping[str, Any]],
  validation: Iterable[Mapping[str, Any]],
) -> dict[str, str]:
  """A task's files, of these rows and one without a label to test."""
  folder, row = ROWS[name]
  unlabelled = {key: value for key, value in row.items() if key != "label"}
  return {
    f"{folder}/train.jsonl": _lines(train),
    f"{folder}/val.jsonl": _lines(validation),
    f"{folder}/test.jsonl": _lines([unlabelled]),
  }


def numbered(name: str, count: int) -> list[dict[str, Any]]:
  """Rows whose texts differ by their numbers, their labels in turns."""
  _, row = ROWS[name]
  labels = _LABELS[name]
  # COPA's question is one of two words.
  field = next(key for key in reversed(_NUMBERED) if key in row)
  return [
    row | {field: f"{row[field]} {i}", "label": labels[i % len(labels)]}
    for i in range(count)
  ]


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
  return "".join(
    json.dumps({**row, "idx": i}) + "\n" for i, row in enumerate(rows)
  )
