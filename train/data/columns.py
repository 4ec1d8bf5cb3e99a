"""Makes a task from a user's tables: its columns, labels and splits."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import os
import statistics
from typing import Any, NamedTuple

import numpy as np

from .. import checked
from .. import options as options_lib
from ..errors import UsageError
from . import divide, hashing, tables
from .options import DataOptions
from .tables import Table
from .task import Source, Task

HELD_OUT = 0.1
TEXTS = (
  *("text", "sentence", "review", "content", "comment", "document", "tweet"),
  *("message", "body", "question", "title", "input", "prompt"),
)
PAIRS = (
  ("sentence1", "sentence2"),
  ("premise", "hypothesis"),
  ("question1", "question2"),
  ("question", "sentence"),
  ("question", "passage"),
  ("question", "context"),
  ("question", "answer"),
  ("query", "passage"),
  ("text1", "text2"),
  ("text_a", "text_b"),
)
LABELS = (
  *("label", "labels", "class", "category", "target", "sentiment"),
  *("score", "rating", "stars", "value", "y"),
)
_IMAGES = (tables.IMAGE, "img", "picture")
_SPLITS = ("train", "validation", "test")


class Part(NamedTuple):
  """Rows of a split of a task.

  Attributes:
    rows: the rows as the task reads them.
    places: each row's place, in words.
    numbers: each row's number in its table.
  """

  rows: list[dict[str, Any]]
  places: list[str]
  numbers: list[int]

  def take(self, rows: Sequence[int]) -> "Part":
    """Returns the rows of these numbers, in this order."""
    return Part(
      [self.rows[i] for i in rows],
      [self.places[i] for i in rows],
      [self.numbers[i] for i in rows],
    )


def fit(task: Task, options: DataOptions) -> tuple[Task, list[str]]:
  """Returns a task with the columns, labels and splits of a user's tables.

  Args:
    task: `classification` or `regression`, without a source.
    options: the tables, and the columns that are not obvious.

  Returns:
    the task, and sentences for the user on what was found.

  Raises:
    UsageError: if a column is missing or not obvious, or a row is invalid. The
      message names the file, and the line of a row.
    RuntimeError: if a table cannot be read.
  """
  data_dir = options.data_dir or None
  found = tables.read(options.path, data_dir)
  for split in _SPLITS[1:]:
    if getattr(options, split):
      found[split] = tables.one(getattr(options, split), split, data_dir)
  task = _columns(task, options, found["train"])
  notes = [_reads(task, found["train"])]
  for split in _SPLITS[1:]:
    if split in found and _unlabelled(task, found[split]):
      notes.append(f"The rows of {split} have no labels and are left out.")
      del found[split]
  task = _labels(task, found["train"])
  parts = {
    split: rows(task, table, labelled=True) for split, table in found.items()
  }
  if task.kind == "regression":
    values = [row[task.label] for row in parts["train"].rows]
    try:
      spread = statistics.pstdev(values)
    except OverflowError as error:
      raise UsageError(
        f"{found['train'].path} has labels in {task.label} that are too "
        "large: their squares are not finite."
      ) from error
    if not spread:
      raise UsageError(
        f"{found['train'].path} has the one label {values[0]:g} in all rows; "
        "a regression needs at least two different labels."
      )
    task = dataclasses.replace(
      task, centre=statistics.fmean(values), spread=spread
    )
  parts, said = _divided(task, options, parts)
  notes += said
  source = Source(
    read=lambda split, _: parts[split].rows,
    where=lambda split, i: parts[split].places[i],
    number=lambda split, i: parts[split].numbers[i],
  )
  return dataclasses.replace(task, source=source), notes


def rows(task: Task, table: Table, labelled: bool) -> Part:
  """Returns a table's rows as a task reads them.

  Args:
    task: a task with columns and labels.
    table: the table to read.
    labelled: whether the rows have labels.

  Raises:
    UsageError: if the table lacks a column, a row lacks a value, or a label is
      not one of the task's.
  """
  wanted = [task.image] if task.image else list(task.fields)
  for name in wanted + [task.label] * labelled:
    _has(table, name)
  made, places = [], []
  for i, row in enumerate(table.rows):
    where = table.where(i)
    if task.image:
      image = _image(row.get(task.image), table, where)
      found: dict[str, Any] = {task.image: image}
      if found[task.image] is None:
        raise UsageError(
          f"{where}: {task.image} is empty; it must be an image."
        )
    else:
      found = {name: _text(row.get(name), name, where) for name in wanted}
      for text in task.texts:
        if isinstance(text, tuple) and not any(found[x].strip() for x in text):
          raise UsageError(
            f"{where}: {' and '.join(text)} is empty; a text must have at least"
            " one character that is not white space."
          )
    if labelled:
      value = row.get(task.label)
      found[task.label] = _label(task, value, table, where)
    made.append(found)
    places.append(where)
  return Part(made, places, list(range(len(made))))


def _columns(task: Task, options: DataOptions, table: Table) -> Task:
  """Returns the task with the columns that are named or obvious."""
  label = options.label or _first(LABELS, table)
  if not label:
    raise UsageError(
      "--label must name the column of the labels, which is not obvious; "
      f"{table.path} has the columns {tables.shown(table.columns)}."
    )
  _has(table, label, "--label")
  task = dataclasses.replace(task, label=label)
  if options.text:
    texts = [tuple(name.strip() for name in options.text.split(","))]
    if options.text_pair:
      texts.append(tuple(x.strip() for x in options.text_pair.split(",")))
    for flag, names in zip(("--text", "--text-pair"), texts):
      for name in names:
        _has(table, name, flag)
    return dataclasses.replace(task, texts=tuple(texts))
  return _texts(task, table, label)


def _texts(task: Task, table: Table, label: str) -> Task:
  """Returns the task with the columns of texts or images that are obvious."""
  task = dataclasses.replace(task, texts=(), image="")
  for first, second in PAIRS:
    pair = _first([first], table), _first([second], table)
    if all(pair) and label not in pair:
      return dataclasses.replace(task, texts=((pair[0],), (pair[1],)))
  text = _first(TEXTS, table)
  if text and text != label:
    return dataclasses.replace(task, texts=((text,),))
  image = _first(_IMAGES, table)
  if image:
    return dataclasses.replace(task, image=image)
  others = [name for name in table.columns if name != label]
  if len(others) == 1:
    return dataclasses.replace(task, texts=((others[0],),))
  raise UsageError(
    "--text must name the column of the texts, which is not obvious; "
    f"{table.path} has the columns {tables.shown(table.columns)}."
  )


def refit(task: Task, table: Table) -> Task:
  """Returns a task that fits a new table, with obvious columns if needed.

  The columns change only if the table lacks the columns of the task.

  Raises:
    UsageError: if a column is missing, and no other is an obvious replacement.
  """
  wanted = [task.image] if task.image else task.fields
  missing = [name for name in wanted if name not in table.columns]
  label = task.label
  if label not in table.columns:
    label = _first(LABELS, table) or label
  if not missing:
    return dataclasses.replace(task, label=label)
  try:
    found = _texts(task, table, label)
  except UsageError:
    found = None
  alike = found and len(found.texts) == len(task.texts)
  if not found or not alike or bool(found.image) is not bool(task.image):
    raise UsageError(
      f"The run reads {tables.shown(wanted)}; {table.path} has the columns"
      f" {tables.shown(table.columns)}."
    )
  return dataclasses.replace(found, label=label)


def _first(names: Sequence[str], table: Table) -> str:
  lower = {column.lower(): column for column in reversed(table.columns)}
  return next((lower[name] for name in names if name in lower), "")


def _has(table: Table, name: str, flag: str = "") -> None:
  if name not in table.columns:
    asked = (
      f"{flag} is {name!r}; " if flag else f"There is no column {name!r}; "
    )
    raise UsageError(
      f"{asked}{table.path} has the columns {tables.shown(table.columns)}."
    )


def _reads(task: Task, table: Table) -> str:
  texts = [" and ".join(text) for text in task.texts if isinstance(text, tuple)]
  if task.image:
    what = f"images of {task.image}"
  elif len(texts) == 1:
    what = f"texts of {texts[0]}"
  else:
    what = f"pairs of {texts[0]} with {texts[1]}"
  return f"{table.path}: {what}, labels of {task.label}."


def _unlabelled(task: Task, table: Table) -> bool:
  """Whether no row has a label, as in the test rows of some datasets."""
  return all(row.get(task.label) in (None, -1, "") for row in table.rows)


def _labels(task: Task, table: Table) -> Task:
  """Returns the task with its classes.

  They are the names that the table stores, or the sorted labels of its rows.
  """
  if task.kind == "regression":
    return task
  labels = table.names.get(task.label)
  if labels is None:
    values = [
      _name(row.get(task.label), task.label, table.where(i))
      for i, row in enumerate(table.rows)
    ]
    different = set(values)
    whole = all(map(_is_whole, different))
    labels = tuple(sorted(different, key=int if whole else None))
    if len(labels) > max(10, len(values) // 2):
      raise UsageError(
        f"{table.path} has {len(labels)} different values of {task.label} in "
        f"{len(values)} rows, too many for classes ({tables.shown(labels)}); "
        "name another column with --label, or use --task regression for "
        "numbers."
      )
  if len(labels) < 2:
    raise UsageError(
      f"{table.path} has the one label {tables.shown(labels)} in {task.label};"
      " a classification needs at least two."
    )
  return dataclasses.replace(task, labels=labels)


def _is_whole(name: str) -> bool:
  # Python refuses to convert a text of several thousand digits.
  return name.removeprefix("-").isdecimal() and len(name) < 1000


def _name(value: Any, column: str, where: str) -> str:
  """Returns a label as a word; a whole number becomes its digits."""
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if isinstance(value, str | int) and str(value).strip():
    return str(value).strip()
  if value is None or value == "" or value != value:
    raise UsageError(f"{where}: {column} is empty; every row needs a label.")
  raise UsageError(
    f"{where}: {column} is {options_lib.shown(value)}; labels must be words "
    "or whole numbers (--task regression is for other numbers)."
  )


def _label(task: Task, value: Any, table: Table, where: str) -> int | float:
  if task.kind == "regression":
    try:
      number = float(value)
    except (TypeError, ValueError, OverflowError):
      number = math.nan
    if not math.isfinite(number):
      raise UsageError(
        f"{where}: {task.label} is {options_lib.shown(value)}; for a "
        "regression it must be a finite number."
      )
    return number
  names = table.names.get(task.label)
  if names and isinstance(value, int) and 0 <= value < len(names):
    name = names[value]
  else:
    name = _name(value, task.label, where)
  if name not in task.labels:
    raise UsageError(
      f"{where}: {task.label} is {name!r}; it must be one of the labels of "
      f"the training rows, {tables.shown(task.labels)}."
    )
  return task.labels.index(name)


def _text(value: Any, name: str, where: str) -> str:
  if value is None or value != value:
    return ""
  if isinstance(value, bool) or not isinstance(value, str | int | float):
    raise UsageError(
      f"{where}: {name} is of the type {type(value).__name__}; it must be a"
      " text."
    )
  return str(value)


def _image(value: Any, table: Table, where: str) -> Any:
  """Returns an image as an array, as bytes, or as a path.

  Hugging Face datasets store a mapping with bytes or a path.
  """
  if isinstance(value, Mapping):
    value = value.get("bytes") or value.get("path")
  if isinstance(value, str):
    # `exists` is False, and raises nothing, for a text that cannot be a path.
    return value if os.path.exists(value) else str(table.folder / value)
  if value is None or isinstance(value, bytes | np.ndarray):
    return value
  raise UsageError(
    f"{where}: an image must be the path of a file, or the content of one; "
    f"got {options_lib.shown(value)}."
  )


def key(task: Task, row: Mapping[str, Any]) -> str:
  """Returns a key that equal rows share.

  Texts are equal if they differ only in case, punctuation and white space.
  Images are equal if their bytes are.
  """
  if task.image:
    image = row[task.image]
    if isinstance(image, str):
      image = checked.read_bytes(image)
    elif not isinstance(image, bytes):
      image = image.tobytes()
    return hashing.digest(image)
  text = task.text(row)
  texts = (text,) if isinstance(text, str) else text
  # A text of signs only, such as :-), is empty when it is normalised.
  return hashing.joined(texts).strip() or "\n".join(texts)


def _divided(
  task: Task, options: DataOptions, parts: Mapping[str, Part]
) -> tuple[dict[str, Part], list[str]]:
  """Returns all splits and notes; a missing split is held out of `train`."""
  train = parts["train"]
  keys = [key(task, row) for row in train.rows]
  share = options.held_out or HELD_OUT
  missing = {name: share for name in _SPLITS[1:] if name not in parts}
  notes, seen = [], set(keys)
  for name, part in parts.items():
    if name != "train":
      again = sum(key(task, row) in seen for row in part.rows)
      if again:
        notes.append(
          f"{again} of the {len(part.rows)} rows of {name} are also in train."
        )
  if not missing:
    return dict(parts), notes
  stratified = task.kind == "classification"
  labels = [row[task.label] if stratified else 0 for row in train.rows]
  chosen = divide.divide(keys, labels, missing, options.path)
  divided = {name: train.take(rows) for name, rows in chosen.items()}
  how = "by label and " if stratified else ""
  hashed = "the image" if task.image else "the text"
  notes.append(divide.note(len(train.rows), chosen, hashed, how))
  return {**parts, **divided}, notes
