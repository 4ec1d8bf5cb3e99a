"""What a text classification task is: texts, labels, metrics and splits."""

from collections.abc import Mapping
import dataclasses
import string
from typing import Any, Literal

Text = str | tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Split:
  """A split of a task, in terms of the splits its dataset is stored in.

  Attributes:
    name: `train`, `validation`, `test`, or a further test split.
    stored: the split of the TFDS dataset that holds its rows.
    part: `all` rows, or, where one stored split serves twice, the rows that
      a hash of their text `keeps` or sets aside (`held_out`).
  """

  name: str
  stored: str
  part: Literal["all", "kept", "held_out"] = "all"


@dataclasses.dataclass(frozen=True)
class Task:
  """A classification task over one text, or a pair, as an encoder reads it.

  Where the published test split has no labels (GLUE, SuperGLUE), the published
  validation split is this task's `test`, and a fixed part of the published
  training split, chosen by a hash of the text, is its `validation`.

  Attributes:
    name: what `--task` takes.
    builder: the TFDS builder, as `module:Class`.
    config: the builder's configuration, or None if it has none.
    texts: one or two `str.format` templates over the row's fields.
    labels: the classes' names; a label is an index into them.
    metrics: what is reported, the one to select by first.
    splits: the labelled splits.
    held_out: the share of the stored training rows that is set aside.
    originals: (file name, URL) of each file the dataset is prepared from;
      empty if it comes with this repository.
  """

  name: str
  builder: str
  config: str | None
  texts: tuple[str] | tuple[str, str]
  labels: tuple[str, ...]
  splits: tuple[Split, ...]
  metrics: tuple[str, ...] = ("accuracy",)
  held_out: float = 0.0
  originals: tuple[tuple[str, str], ...] = ()

  @property
  def fields(self) -> tuple[str, ...]:
    """The fields of a row that its texts are made of, in order of use."""
    parsed = [part for text in self.texts for part in _parse(text)]
    return tuple(dict.fromkeys(field for _, field, _, _ in parsed if field))

  def text(self, row: Mapping[str, Any]) -> Text:
    """Returns the row's text, or its pair of texts.

    Args:
      row: field name -> str, or UTF-8 bytes as TFDS stores them.
    """
    fields = {name: _decode(row[name]) for name in self.fields}
    texts = tuple(text.format_map(fields) for text in self.texts)
    return texts[0] if len(texts) == 1 else (texts[0], texts[1])

  def split(self, name: str) -> Split:
    """Returns the split of that name.

    Raises:
      ValueError: if the task has none.
    """
    for split in self.splits:
      if split.name == name:
        return split
    allowed = ", ".join(split.name for split in self.splits)
    raise ValueError(f"{self.name} has no split {name!r}; it has {allowed}.")


_parse = string.Formatter().parse


def _decode(value: str | bytes) -> str:
  return value.decode() if isinstance(value, bytes) else value
