"""Records of tasks: where rows come from, and what is learned from them."""

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
    read: (stored split, folder of prepared datasets or None) -> the rows of the
      split, with random access. Each row is a mapping from fields to values.
    originals: (file name, URL) of each file that must be fetched first.
    where: (stored split, row) -> the row's place in words, for errors.
    number: (stored split, row) -> the number by which the row is drawn. The
      number of a row does not change when other rows are held out.
  """

  read: Callable[[str, str | None], Sequence[Mapping[str, Any]]]
  originals: tuple[tuple[str, str], ...] = ()
  where: Callable[[str, int], str] = _place
  number: Callable[[str, int], int] = _same


class Split(NamedTuple):
  """A split of a task, made from a split that its source stores.

  Attributes:
    name: `train`, `validation`, `test`, or the name of a shifted test.
    stored: the source's split that holds its rows.
    part: `all` takes all rows of the stored split. Two splits of a task can
      share a stored split: a hash of the text decides whether a row belongs to
      the `kept` or to the `held_out` part.
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
"""The splits of a task whose published test split has no labels.

The published validation split is the task's `test`. A fixed part of the
published training split is its `validation`.
"""


@dataclasses.dataclass(frozen=True)
class Task:
  """What is learned from rows.

  Attributes:
    name: what `--task` takes.
    kind: `classification`, `regression` or `conversations`.
    source: where the rows come from; None if `--data` names them.
    texts: one or two texts. Each is a `str.format` template over the row's
      fields, or a tuple of fields, which are joined by newlines.
    image: the field of the image, if rows have images in place of texts. Its
      value is uint8 (height, width) or (height, width, 3), a file's path, or
      the bytes of a file.
    side: the side, in pixels, of the square image that the model gets; 0 until
      the model is known.
    label: the field of the label, which is the number of a class, or a float
      for a regression.
    labels: the classes' names; a label is an index into them.
    votes: the field that holds one label from each rater, if rows have it.
    metrics: the names of the reported metrics. The first one selects the
      checkpoint.
    splits: the labelled splits. Splits other than `train`, `validation` and
      `test` are tests on shifted data, such as another domain.
    held_out: the share of the stored training rows that is held out.
    prompt: the instruction for a model that answers in words.
    words: the answers of such a model, in the order of the labels; empty if the
      answers are the labels' names.
    centre: for a regression, the value that is subtracted from each label.
    spread: for a regression, the value that the difference is divided by.
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
    """The fields of a row that its texts contain, in order of use."""
    found: list[str] = []
    for text in self.texts:
      if isinstance(text, tuple):
        found += text
      else:
        found += [field for _, field, _, _ in _parse(text) if field]
    return tuple(dict.fromkeys(found))

  @property
  def outputs(self) -> int:
    """How many numbers a new head returns for a row."""
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
    """What new rows need of the task, as JSON; see `from_description`."""
    return {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name not in _NOT_DESCRIBED
    }

  @classmethod
  def from_description(cls, where: str, found: Mapping[str, Any]) -> "Task":
    """Returns a task without a source, for new rows.

    Args:
      where: where the description is, in words, for error messages.
      found: the description.

    Raises:
      UsageError: if `found` is not a result of `description`.
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
  """Refuses a task that no run can have.

  Raises:
    UsageError: if an attribute is impossible; the message names it.
  """
  faults = {
    "texts": len(task.texts) > 2 or not all(map(_is_template, task.texts)),
    "side": task.side < 0,
    "labels": (task.kind == "classification") is not (len(task.labels) > 1),
    "metrics": not task.metrics,
    "words": len(task.words) not in (0, len(task.labels)),
    "spread": task.spread <= 0,
    # Conversations need neither, as their columns have fixed names.
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
  """Whether a text has fields, each of which is a plain name."""
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
