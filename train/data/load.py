"""The data of a run: training batches, and evaluations on each split."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
import pathlib
from typing import Any, Protocol

import grain
import numpy as np

from .. import checked
from ..errors import UsageError
from ..models import registry as families
from ..models.io import template as templates
from ..models.io import tokenizer
from ..models.load import Pretrained
from . import (
  chat,
  columns,
  images,
  instructions,
  label_words,
  objectives,
  packing,
  pipeline,
  regimes,
  shifts,
  tables,
)
from . import registry as tasks
from . import scores as evaluate
from .batching import Batch
from .objectives import Items, Objective
from .options import DataOptions, check
from .scores import Evaluation, Rows
from .task import STORED, Task, Text

_SPLITS = ("train", "validation", "test")
_MOST_NATS = 709  # `math.exp` of more overflows
# Most vision transformers are evaluated at this size. DINOv2 learned its
# positions at 518 pixels, where attention takes thirty times the memory.
_IMAGE_SIDE = 224

Predict = Callable[[Batch], Items]
Examples = pipeline.Examples | images.Images


@dataclasses.dataclass(frozen=True)
class Order:
  """How rows become batches.

  Attributes:
    batch_size: rows of a training batch.
    eval_batch_size: rows of an evaluation batch.
    epochs: passes over the training rows.
    seed: the seed of the draw of rows and of their order.
    group_by_length: how many batches of rows are sorted by length together; 0:
      rows are not sorted.
  """

  batch_size: int
  eval_batch_size: int
  epochs: int
  seed: int
  group_by_length: int = 0

  def part(self, part: tuple[int, int]) -> dict[str, int]:
    """Returns the options of training batches, for one part of each batch.

    Args:
      part: the number of the part, from 0, and the number of parts.
    """
    return {
      "batch_size": self.batch_size,
      "seed": self.seed,
      "epochs": self.epochs,
      "process_index": part[0],
      "process_count": part[1],
    }


class Data(Protocol):
  """The interface between the training loop and the data of a run.

  Attributes:
    task: what is learned.
    order: how rows become batches; its `batch_size` may be smaller than the one
      that the user asked for.
    objective: how a batch is learned.
    notes: sentences for the user on what was found and decided.
    metric: the name of the metric that selects a checkpoint.
    rows: the number of rows in each split.
    left_out: the number of rows in each split that were too long.
    lengths: the lengths, in tokens, that a batch may have; empty for images.
    steps_per_epoch: optimizer steps of an epoch, at least one.
  """

  @property
  def task(self) -> Task: ...

  @property
  def order(self) -> Order: ...

  @property
  def objective(self) -> Objective: ...

  @property
  def notes(self) -> Sequence[str]: ...

  @property
  def metric(self) -> str: ...

  @property
  def rows(self) -> dict[str, int]: ...

  @property
  def left_out(self) -> dict[str, int]: ...

  @property
  def lengths(self) -> Sequence[int]: ...

  @property
  def steps_per_epoch(self) -> int: ...

  def train_batches(
    self, part: tuple[int, int] = (0, 1)
  ) -> grain.DatasetIterator[Batch]:
    """Returns the training batches of all epochs.

    Args:
      part: which part of each batch to return, from 0, and the number of parts.
    """
    ...

  def evaluate(self, predict: Predict, split: str) -> Evaluation:
    """Evaluates a model on a split; `predict` gets whole batches."""
    ...

  def score(self, found: Evaluation) -> float:
    """Returns a number that is higher for a better model."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
  """How a model reads the rows of a labelled task.

  Attributes:
    examples: from rows of `pipeline.drawn` to tokenized texts, or images.
    ordered: from examples and the options of `Order.part` to training batches.
    whole: from examples and a batch size to batches that have each row once.
    objective: how a batch is learned.
  """

  examples: Callable[[Sequence[Mapping[str, Any]]], Examples]
  ordered: Callable[..., grain.DatasetIterator[Batch]]
  whole: Callable[..., grain.DatasetIterator[Batch]]
  objective: Objective


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
  """Texts or images with labels; implements `Data`.

  Attributes:
    examples: the rows of each split.
    reader: how the model reads the rows.
    shifted: returns the shifted test rows of `shifts.examples`.
  """

  task: Task
  order: Order
  examples: Mapping[str, Examples]
  reader: Reader
  notes: Sequence[str] = ()
  shifted: Callable[[], Mapping[str, Examples]] = dict

  @property
  def objective(self) -> Objective:
    return self.reader.objective

  @property
  def metric(self) -> str:
    return self.task.metrics[0]

  @property
  def rows(self) -> dict[str, int]:
    return {name: len(x) for name, x in self.examples.items()}

  @property
  def left_out(self) -> dict[str, int]:
    return {}

  @property
  def lengths(self) -> Sequence[int]:
    texts = (
      x for x in self.examples.values() if isinstance(x, pipeline.Examples)
    )
    return sorted({length for x in texts for length in pipeline.buckets_of(x)})

  @property
  def steps_per_epoch(self) -> int:
    return len(self.examples["train"]) // self.order.batch_size

  def train_batches(
    self, part: tuple[int, int] = (0, 1)
  ) -> grain.DatasetIterator[Batch]:
    return self.reader.ordered(
      self.examples["train"],
      group_by_length=self.order.group_by_length,
      **self.order.part(part),
    )

  def evaluate(self, predict: Predict, split: str) -> Evaluation:
    return evaluate.evaluate(predict, self._rows(split), self.task.metrics)

  def score(self, found: Evaluation) -> float:
    return evaluate.better(self.metric, found.metrics[self.metric])

  def baseline(self, features: Callable[[Batch], Any]) -> Evaluation:
    """Evaluates a linear model of frozen features, as `scores.baseline`.

    Args:
      features: from a batch to features, (B, D).
    """
    train, validation, test = map(self._rows, _SPLITS)
    return evaluate.baseline(
      features, train, validation, test, self.task.metrics
    )

  def batches(self, rows: Examples) -> grain.DatasetIterator[Batch]:
    """Returns evaluation batches that have each row once."""
    return self.reader.whole(rows, self.order.eval_batch_size)

  def _rows(self, split: str) -> Rows:
    rows = self.examples[split]
    return Rows(rows.labels, self.batches(rows))


@dataclasses.dataclass(frozen=True, eq=False)
class Conversations:
  """Conversations whose responses are learned; implements `Data`.

  Attributes:
    packed: the rows of each split.
    pad_id: the token id of padding.
    template: the chat template of the conversations.
  """

  task: Task
  order: Order
  packed: Mapping[str, packing.Packed]
  pad_id: int
  template: templates.Template
  notes: Sequence[str] = ()
  objective: Objective = objectives.NEXT_TOKEN

  @property
  def metric(self) -> str:
    return self.task.metrics[0]

  @property
  def rows(self) -> dict[str, int]:
    return {name: len(x.sequences) for name, x in self.packed.items()}

  @property
  def left_out(self) -> dict[str, int]:
    found = {name: x.sequences.skipped for name, x in self.packed.items()}
    return {name: count for name, count in found.items() if count}

  @property
  def lengths(self) -> Sequence[int]:
    return sorted({x for split in self.packed.values() for x in split.buckets})

  @property
  def steps_per_epoch(self) -> int:
    return len(self.packed["train"]) // self.order.batch_size

  def train_batches(
    self, part: tuple[int, int] = (0, 1)
  ) -> grain.DatasetIterator[Batch]:
    return packing.train_batches(
      self.packed["train"],
      pad_id=self.pad_id,
      group_by_length=self.order.group_by_length,
      **self.order.part(part),
    )

  def evaluate(self, predict: Predict, split: str) -> Evaluation:
    loss, right, count = 0.0, 0, 0
    for batch in packing.eval_batches(
      self.packed[split], self.order.eval_batch_size, pad_id=self.pad_id
    ):
      found = predict(batch)
      learned = batch["weights"] > 0
      loss += float(np.asarray(found.losses)[learned].sum(dtype=np.float64))
      right += int(np.asarray(found.right)[learned].sum())
      count += int(learned.sum())
    loss /= count
    return Evaluation(
      metrics={
        "perplexity": math.inf if loss > _MOST_NATS else math.exp(loss),
        "accuracy": right / count,
      },
      loss=loss,
      correct=right,
      rows=count,
      unit="tokens",
    )

  def score(self, found: Evaluation) -> float:
    return -found.loss


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
  """Rows that a finished run labels, or is evaluated on.

  Attributes:
    task: the task of the run.
    rows: the original rows, with all their columns.
    places: each row's place, in words.
    examples: the rows as the model reads them; unlabelled rows have the label
      0.
    reader: how the model reads rows.
  """

  task: Task
  rows: Sequence[Mapping[str, Any]]
  places: Sequence[str]
  examples: Examples
  reader: Reader

  def batches(self, batch_size: int) -> grain.DatasetIterator[Batch]:
    """Returns batches that have each row once, the longest rows first.

    A batch's `index` has each row's place in `rows`.
    """
    return self.reader.whole(self.examples, batch_size)

  def answers(
    self, answer: Callable[[Batch], Any], batch_size: int
  ) -> np.ndarray:
    """Returns a model's answers, in the order of the rows.

    Args:
      answer: from a batch to the `objective.answers` of the model's outputs.
      batch_size: rows of a batch.

    Returns:
      [rows, labels] probabilities, or [rows] values.
    """
    found: dict[int, Any] = {}
    for batch in self.batches(batch_size):
      found |= zip(batch["index"].tolist(), np.asarray(answer(batch)))
    return np.stack([found[i] for i in range(len(self.rows))])

  def evaluate(self, predict: Predict, batch_size: int) -> Evaluation:
    """Evaluates a model on the rows, which must have labels."""
    rows = Rows(self.examples.labels, self.batches(batch_size))
    return evaluate.evaluate(predict, rows, self.task.metrics)


def load(
  options: DataOptions,
  pretrained: Pretrained,
  *,
  batch_size: int,
  eval_batch_size: int = 0,
  epochs: int,
  seed: int,
  multiple: int = 1,
) -> Data:
  """Reads the data of a run, and tokenizes texts.

  Args:
    options: what to read.
    pretrained: the model that reads it.
    batch_size: rows of a training batch. If there are fewer training rows, a
      batch has the largest `multiple` of rows, and the notes say so.
    eval_batch_size: rows of an evaluation batch; 0: as of a training batch.
    epochs: passes over the training rows.
    seed: the seed of the draw of rows and of their order.
    multiple: the rows of a batch are a multiple of this number, so that devices
      and accumulation steps can share them.

  Raises:
    ValueError: if the model or the options do not fit the data, or the data are
      invalid.
    RuntimeError: if the data cannot be read or downloaded.
  """
  check(options)
  task = tasks.get(options.task)
  order = Order(
    batch_size,
    eval_batch_size or batch_size,
    epochs,
    seed,
    options.group_by_length,
  )
  if task.kind == "conversations":
    return _conversations(options, task, pretrained, order, multiple)
  notes: list[str] = []
  if task.source is None:
    task, notes = columns.fit(task, options)
  task = _sized(task, options.image_size, pretrained)
  found = reader(task, pretrained, options.max_length)
  examples = {}
  for split in _SPLITS:
    rows, said = regimes.rows(task, split, options, seed)
    notes += said
    if not rows:
      raise UsageError(
        f"{task.name} has no rows in {split}; at least one is needed."
      )
    if not (split == "train" and options.imbalance):
      notes += _capped(options, split, len(rows))
    examples[split] = found.examples(rows)
  order, said = _fitted(order, len(examples["train"]), multiple, "rows")
  shifted = functools.partial(
    shifts.examples, task, options, seed, found.examples
  )
  return Labelled(task, order, examples, found, notes + said, shifted)


def rows_for(
  task: Task,
  data: str | Sequence[Text],
  pretrained: Pretrained,
  *,
  max_length: int,
  labelled: bool = False,
  data_dir: str | None = None,
) -> Given:
  """Reads rows for a finished run.

  Args:
    task: the task of the run, with its columns and labels; it needs no source.
    data: a path that `tables.read` takes, whose `test` split is read if it has
      several; or texts, or pairs of texts; or paths of images.
    pretrained: the run's model.
    max_length: the run's `max_length`.
    labelled: whether the rows have labels, which must be labels of the task.
    data_dir: the folder of prepared datasets; the user's cache if None.

  Raises:
    ValueError: if the rows are invalid.
    RuntimeError: if the rows cannot be read.
  """
  if isinstance(data, str):
    table = tables.one(data, "test", data_dir)
    task = columns.refit(task, table)
    part = columns.rows(task, table, labelled)
    whole, rows, places = table.rows, part.rows, part.places
  elif task.image:
    whole = rows = [{task.image: path} for path in data]
    places = [str(path) for path in data]
  else:
    task = dataclasses.replace(
      task, texts=tuple((name,) for name in _NAMES[: len(task.texts)])
    )
    whole = rows = [_named(task, text) for text in data]
    places = [f"text {i}" for i in range(1, len(rows) + 1)]
  found = reader(task, pretrained, max_length)
  return Given(task, whole, places, found.examples(rows), found)


_NAMES = ("text", "text_pair")


def _named(task: Task, text: Text) -> dict[str, str]:
  """Returns a row of one text, or of a pair."""
  texts = (text,) if isinstance(text, str) else text
  if len(texts) != len(task.texts):
    raise UsageError(
      f"{task.name} has {len(task.texts)} text(s) in a row; got {len(texts)}: "
      f"{text!r:.100}."
    )
  return dict(zip(_NAMES, texts))


def _sized(task: Task, size: int, pretrained: Pretrained) -> Task:
  """Returns the task with a size of its images, if it needs one.

  Raises:
    UsageError: if the model or the task does not allow `size`.
  """
  family = pretrained.family
  if not task.image or family.reads != "images" or task.side:
    if size:
      raise UsageError(
        f"--image-size is only for tasks with images of any size; got {size} "
        f"with --task {task.name} and a model that reads {family.reads}."
      )
    return task
  patch, grid = pretrained.config.patch_size, pretrained.config.grid
  named = pretrained.config.side or patch * min(grid, _IMAGE_SIDE // patch)
  side = size or named
  if side % patch:
    raise UsageError(
      f"--image-size must be a multiple of {patch}, the pixels along a patch "
      f"of {pretrained.path}; got {size}."
    )
  return dataclasses.replace(task, side=side)


def reader(task: Task, pretrained: Pretrained, max_length: int) -> Reader:
  """Returns how a model reads and learns the rows of a labelled task.

  Raises:
    ValueError: if the model cannot learn the task.
  """
  family = pretrained.family
  if task.kind == "regression":
    if not family.has_new_head:
      raise UsageError(
        f"--task {task.name} needs an encoder with a new head; "
        f"{pretrained.path} answers in words, and there is not a word for "
        "every number."
      )
    objective = objectives.regression(task.centre, task.spread)
  else:
    objective = objectives.CLASSIFICATION
  if task.image:
    if family.reads != "images":
      raise UsageError(
        f"--task {task.name} has images, and needs a --model that reads "
        f"images; got {pretrained.path}, which reads {family.reads}."
      )
    return Reader(
      examples=functools.partial(images.decoded, task, side=task.side),
      ordered=images.train_batches,
      whole=images.eval_batches,
      objective=objectives.images(
        task.side,
        objective,
        pretrained.config.mean,
        pretrained.config.deviation,
      ),
    )
  text_tokenizer = pretrained.tokenizer
  encode: pipeline.Encode
  if family.has_new_head:
    encode = functools.partial(tokenizer.encode, text_tokenizer)
  else:
    encode = functools.partial(label_words.encode, text_tokenizer, task)
  if family.answers == "words":
    answers = label_words.answers(pretrained, task)
    assert not isinstance(answers, int)
    objective = objectives.words(answers)
  padded = {"pad_id": pretrained.pad_id}
  return Reader(
    examples=lambda rows: pipeline.tokenize(
      pipeline.labelled(task, rows), encode, max_length
    ),
    ordered=functools.partial(pipeline.train_batches, **padded),
    whole=functools.partial(pipeline.eval_batches, **padded),
    objective=objective,
  )


def _conversations(
  options: DataOptions,
  task: Task,
  pretrained: Pretrained,
  order: Order,
  multiple: int,
) -> Conversations:
  template = pretrained.template
  if template is None:
    able = families.names(x for x in families.families() if x.converses)
    raise UsageError(
      f"--task {task.name} is for a model that holds conversations ({able});"
      f" got {pretrained.path}, a {pretrained.family.name}."
    )
  if options.chat_template:
    template = read_template(options.chat_template, template)
  found, notes = _splits(options, task)
  packed = {}
  for split in _SPLITS:
    limit = options.limit(split)
    rows = instructions.drawn(found[split], limit or None, order.seed)
    notes += _capped(options, split, len(rows))
    sequences = chat.tokenize(
      rows,
      pretrained.tokenizer,
      template,
      options.max_length,
      eos=pretrained.eos_id,
      on_long=options.on_long,
    )
    of = packing.pack if options.pack else packing.unpacked
    packed[split] = of(sequences, options.max_length)
  what = "packed rows" if options.pack else "rows"
  order, said = _fitted(order, len(packed["train"]), multiple, what)
  return Conversations(
    task, order, packed, pretrained.pad_id, template, notes + said
  )


def read_template(path: str, old: templates.Template) -> templates.Template:
  """Returns the chat template of a file.

  Args:
    path: the file.
    old: the template whose special tokens are kept.

  Raises:
    UsageError: if the file cannot be read, or is not a template.
  """
  try:
    source = checked.read_text(pathlib.Path(path).expanduser())
    return dataclasses.replace(old, source=source)
  except ValueError as error:
    raise UsageError(
      f"--chat-template {path} cannot be read: {error}"
    ) from error


def _splits(
  options: DataOptions, task: Task
) -> tuple[dict[str, list[instructions.Numbered]], list[str]]:
  """Returns each split's conversations, from the task's source or --data."""
  if task.source is None:
    return instructions.splits(
      options.path,
      held_out=options.held_out,
      validation=options.validation,
      test=options.test,
      data_dir=options.data_dir or None,
    )
  found = {}
  for name, stored, _ in STORED:
    rows = task.source.read(stored, options.data_dir or None)
    found[name] = [
      (i, instructions.conversation(row, task.source.where(stored, i)))
      for i, row in enumerate(rows)
    ]
  return found, []


def _capped(options: DataOptions, split: str, count: int) -> list[str]:
  """Returns a note if a split has fewer rows than the options allow."""
  limit = options.limit(split)
  if count >= limit:
    return []
  flag = "--train-rows" if split == "train" else "--eval-rows"
  return [
    f"{flag} is {limit:,}; {split} has only {count:,} rows, and all of "
    "them are used."
  ]


def _fitted(
  order: Order, rows: int, multiple: int, what: str
) -> tuple[Order, list[str]]:
  """Returns the order, with a smaller batch if rows are few, and notes."""
  if rows >= order.batch_size:
    return order, []
  size = rows // multiple * multiple
  if not size:
    raise UsageError(
      f"There are {rows} {what} to train on, and a batch must be a multiple of"
      f" {multiple} (--accumulate, times the devices of --mesh that share its"
      " rows); give more rows."
    )
  note = (
    f"--batch-size is {order.batch_size}, but there are only {rows} {what} to "
    f"train on, so a batch has {size}."
  )
  return dataclasses.replace(order, batch_size=size), [note]
