"""The records of data: where rows come from, and what is learned from them."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import string
from typing import Any, Literal, NamedTuple

from .. import checked, options
from ..errors import UsageError

Text = str | tuple[str, str]
Kind = Literal["classification", "regression", "conversations"]


def _place(split: str, row: int) -> str:
  return f"{split}, row {row}"


def _same(split: str, row: int) -> int:
  del split
  return row


@dataclasses.dataclass(frozen=True)
class Source:
  """Where rows come from.

  Attributes:
    read: (stored split, folder of prepared datasets or None) -> its rows, each
      a mapping from fields to values, at random access.
    originals: (file name, URL) of each file that must be fetched first.
    where: (stored split, row) -> the row's place in words, for errors.
    number: (stored split, row) -> the number that the row is drawn by; it
      stays as it is when rows around it are held out.
  """

  read: Callable[[str, str | None], Sequence[Mapping[str, Any]]]
  originals: tuple[tuple[str, str], ...] = ()
  where: Callable[[str, int], str] = _place
  number: Callable[[str, int], int] = _same


class Split(NamedTuple):
  """A split of a task, in terms of the splits that its source stores.

  Attributes:
    name: `train`, `validation`, `test`, or that of a shifted test.
    stored: the source's split that holds its rows.
    part: `all` rows, or, where one stored split serves twice, the rows that
      a hash of their text `keeps` or sets aside (`held_out`).
  """

  name: str
  stored: str
  part: Literal["all", "kept", "held_out"] = "all"


STORED = tuple(Split(name, name) for name in ("train", "validation", "test"))
HELD_OUT = (
  Split("train", "train", "kept"),
  Split("validation", "train", "held_out"),
  Split("test", "validation"),
)
"""Where the published test split has no labels, the published validation split
is the task's `test`, and a fixed part of `train` its `validation`."""


@dataclasses.dataclass(frozen=True)
class Task:
  """What is learned from rows.

  Attributes:
    name: what `--task` takes.
    kind: `classification`, `regression` or `conversations`.
    source: of the rows; None for what `--data` names.
    texts: one or two texts: each a `str.format` template over the row's
      fields, or a tuple of fields, which are joined by newlines.
    image: in place of texts, the field that holds an image: uint8 (height,
      width) or (height, width, 3), a file's path, or its bytes.
    side: pixels along the side of the square that a model is given; 0 until
      the model is known.
    label: the field of the label: of a class, its number; of a regression, a
      float.
    labels: the classes' names; a label is an index into them.
    votes: the field of the labels that a row's raters gave it, if rows have
      any.
    metrics: what is reported, the one to select by first.
    splits: the labelled splits; those beside `train`, `validation` and `test`
      are tests of a shift, as of another domain.
    held_out: the share of the stored training rows that is set aside.
    prompt: what a model that answers in words is asked of the texts.
    words: what it answers, in the order of the labels; empty for their names.
    centre: of a regression, what is taken from labels before they are learned.
    spread: and what they are then divided by.
  """

  name: str
  kind: Kind = "classification"
  source: Source | None = None
  texts: tuple[str | tuple[str, ...], ...] = ()
  image: str = ""
  side: int = 0
  label: str = "label"
  labels: tuple[str, ...] = ()
  votes: str = ""
  metrics: tuple[str, ...] = ("accuracy",)
  splits: tuple[Split, ...] = STORED
  held_out: float = 0.0
  prompt: str = ""
  words: tuple[str, ...] = ()
  centre: float = 0.0
  spread: float = 1.0

  @property
  def fields(self) -> tuple[str, ...]:
    """The fields of a row that its texts are made of, in order of use."""
    found: list[str] = []
    for text in self.texts:
      if isinstance(text, tuple):
        found += text
      else:
        found += [field for _, field, _, _ in _parse(text) if field]
    return tuple(dict.fromkeys(found))

  @property
  def outputs(self) -> int:
    """Numbers that a new head gives for a row."""
    return 1 if self.kind == "regression" else len(self.labels)

  @property
  def instruction(self) -> str:
    """The prompt, or a general one if the task has none."""
    of = "text" if len(self.texts) == 1 else "two texts"
    return self.prompt or f"classify the {of}:"

  @property
  def answers(self) -> tuple[str, ...]:
    """The words, or the labels' names if the task has none."""
    return self.words or self.labels

  def text(self, row: Mapping[str, Any]) -> Text:
    """Returns the row's text, or its pair of texts.

    Args:
      row: field name -> str, or UTF-8 bytes as TFDS stores them.
    """
    fields = {name: _decode(row[name]) for name in self.fields}
    texts = [
      "\n".join(fields[name] for name in text)
      if isinstance(text, tuple)
      else text.format_map(fields)
      for text in self.texts
    ]
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

  def description(self) -> dict[str, Any]:
    """All that new rows need, as JSON has it: `from_description` reads it."""
    return {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name not in _NOT_DESCRIBED
    }

  @classmethod
  def from_description(cls, where: str, found: Mapping[str, Any]) -> "Task":
    """Returns a task without a source, for rows that are new.

    Args:
      where: its description is, in words, for a message.
      found: its description.

    Raises:
      UsageError: if it is not what `description` gives.
    """
    kinds = {
      field.name: field.type
      for field in dataclasses.fields(cls)
      if field.name not in _NOT_DESCRIBED
    }
    options.known(where, found, kinds)
    task = cls(
      **{
        name: _tuples(checked.field(where, found, name, kind))
        for name, kind in kinds.items()
      }
    )
    _check(where, task)
    return task


def _check(where: str, task: Task) -> None:
  """Refuses a task that no run could have had.

  Raises:
    UsageError: that names the key.
  """
  faults = {
    "texts": len(task.texts) > 2 or not all(map(_is_template, task.texts)),
    "side": task.side < 0,
    "labels": (task.kind == "classification") is not (len(task.labels) > 1),
    "metrics": not task.metrics,
    "words": len(task.words) not in (0, len(task.labels)),
    "spread": task.spread <= 0,
    # Of conversations, columns are known by their names.
    "image": task.kind != "conversations"
    and bool(task.image) is bool(task.texts),
  }
  for name, is_wrong in faults.items():
    if is_wrong:
      raise UsageError(
        f"{where}: {name} cannot be {options.shown(getattr(task, name))} of a "
        f"task of {task.kind}."
      )


def _is_template(text: str | tuple[str, ...]) -> bool:
  """Whether a text is made of fields of a row, and of nothing in these."""
  if isinstance(text, tuple):
    return bool(text)
  try:
    pieces = list(_parse(text))
  except ValueError:
    return False
  return any(field is not None for _, field, _, _ in pieces) and all(
    field is None or (field.isidentifier() and not form and not conversion)
    for _, field, form, conversion in pieces
  )


_NOT_DESCRIBED = {"source", "votes", "splits", "held_out"}
_parse = string.Formatter().parse


def _tuples(value: Any) -> Any:
  return (
    tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
  )


def _decode(value: str | bytes) -> str:
  return value.decode() if isinstance(value, bytes) else value
