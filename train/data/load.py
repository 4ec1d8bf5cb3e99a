"""The data of a run: batches to train on, and what a split says of a model."""

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
_MOST_NATS = 709  # e to more is no float
# As vision transformers are mostly tested; those of DINOv2 learned their
# positions at 518, where attention takes thirty times the memory.
_IMAGE_SIDE = 224

Predict = Callable[[Batch], Items]
Examples = pipeline.Examples | images.Images


@dataclasses.dataclass(frozen=True)
class Order:
  """How rows become batches.

  Attributes:
    batch_size: rows of a training batch.
    eval_batch_size: rows of a batch to evaluate.
    epochs: passes over the training rows.
    seed: of the rows that are drawn, and of their order.
    group_by_length: batches' worth of rows to sort by length; 0: none.
  """

  batch_size: int
  eval_batch_size: int
  epochs: int
  seed: int
  group_by_length: int = 0

  def part(self, part: tuple[int, int]) -> dict[str, int]:
    """The options of training batches, of a part of each."""
    return {
      "batch_size": self.batch_size,
      "seed": self.seed,
      "epochs": self.epochs,
      "process_index": part[0],
      "process_count": part[1],
    }


class Data(Protocol):
  """What the loop knows of the data that a run trains on.

  Attributes:
    task: what is learned.
    order: how rows become batches; its `batch_size` may be less than was asked
      for.
    objective: what is learned from a batch.
    notes: sentences for the user, of what was found and decided.
    metric: the name of the metric to select a checkpoint by.
    rows: in each split.
    left_out: rows that were too long, in each split.
    lengths: tokens that the rows of a batch may have; none of images.
    steps_per_epoch: optimizer steps, at least one.
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
    """Batches of all epochs; of a part of their rows, of how many parts."""
    ...

  def evaluate(self, predict: Predict, split: str) -> Evaluation:
    """What a split's rows say of a model; `predict` is given whole batches."""
    ...

  def score(self, found: Evaluation) -> float:
    """What is higher for a better model."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
  """How a model reads the rows of a labelled task.

  Attributes:
    examples: from rows, as `pipeline.drawn` gives them, to texts in tokens, or
      images.
    ordered: from examples and `Order.part` to batches to train on.
    whole: from examples and a batch size to batches that have each row once.
    objective: what is learned from a batch.
  """

  examples: Callable[[Sequence[Mapping[str, Any]]], Examples]
  ordered: Callable[..., grain.DatasetIterator[Batch]]
  whole: Callable[..., grain.DatasetIterator[Batch]]
  objective: Objective


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
  """Texts or images with labels, as `Data` has them.

  Attributes:
    examples: the rows of each split.
    reader: how the model reads them.
    shifted: reads `shifts.examples` of the test rows.
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
    """A linear model of frozen features, (B, D) of a batch."""
    train, validation, test = map(self._rows, _SPLITS)
    return evaluate.baseline(
      features, train, validation, test, self.task.metrics
    )

  def batches(self, rows: Examples) -> grain.DatasetIterator[Batch]:
    """Batches to evaluate, that have each row once."""
    return self.reader.whole(rows, self.order.eval_batch_size)

  def _rows(self, split: str) -> Rows:
    rows = self.examples[split]
    return Rows(rows.labels, self.batches(rows))


@dataclasses.dataclass(frozen=True, eq=False)
class Conversations:
  """Prompts with responses, of which the responses are learned, as `Data`.

  Attributes:
    packed: the rows of each split.
    pad_id: the token id of padding.
    template: of the conversations.
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
  """Rows for a run that is finished: to label, or to evaluate it on.

  Attributes:
    task: of the run.
    rows: as they came, with all their columns.
    places: where each is, in words.
    examples: as the model reads them; rows without labels have the label 0.
    reader: how it does.
  """

  task: Task
  rows: Sequence[Mapping[str, Any]]
  places: Sequence[str]
  examples: Examples
  reader: Reader

  def batches(self, batch_size: int) -> grain.DatasetIterator[Batch]:
    """Each row once, the longest first: `index` is its place in `rows`."""
    return self.reader.whole(self.examples, batch_size)

  def answers(
    self, answer: Callable[[Batch], Any], batch_size: int
  ) -> np.ndarray:
    """What a model answers, in the rows' order.

    Args:
      answer: a batch to `objective.answers` of its logits.
      batch_size: rows of a batch.

    Returns:
      [rows, labels] probabilities, or [rows] values.
    """
    found: dict[int, Any] = {}
    for batch in self.batches(batch_size):
      found |= zip(batch["index"].tolist(), np.asarray(answer(batch)))
    return np.stack([found[i] for i in range(len(self.rows))])

  def evaluate(self, predict: Predict, batch_size: int) -> Evaluation:
    """What the rows, which have labels, say of a model."""
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
    batch_size: rows of a training batch. If there are fewer, it is the largest
      multiple that there is, which the notes say.
    eval_batch_size: rows of a batch to evaluate; 0: those of a training batch.
    epochs: passes over the training rows.
    seed: of the rows that are drawn, and of their order.
    multiple: a batch's rows stay a multiple of it, for what shares them.

  Raises:
    ValueError: if the model or the options are not for such data, or the data
      are not as they must be.
    RuntimeError: if they cannot be had.
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
    task: of the run, with its columns and labels; it needs no source.
    data: a path, as `tables.read` takes it (of several splits, the test), or
      texts, or pairs of them; or, of a task of images, their paths.
    pretrained: the run's model.
    max_length: the run's.
    labelled: whether the rows have labels, which are then the task's.
    data_dir: the folder of prepared datasets; the user's cache if None.

  Raises:
    ValueError: if the rows are not as they must be.
    RuntimeError: if they cannot be read.
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
  """A row of one text, or of a pair."""
  texts = (text,) if isinstance(text, str) else text
  if len(texts) != len(task.texts):
    raise UsageError(
      f"{task.name} has {len(task.texts)} text(s) in a row; got {len(texts)}: "
      f"{text!r:.100}."
    )
  return dict(zip(_NAMES, texts))


def _sized(task: Task, size: int, pretrained: Pretrained) -> Task:
  """The task with the size of its images, if it is of images without one.

  Raises:
    UsageError: if the model cannot be given images of the size asked for.
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
  """Returns how a model reads a labelled task, and learns it.

  Raises:
    ValueError: if it does not.
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
  """The template of a file, with the special tokens of another.

  Raises:
    UsageError: if it cannot be read, or is no template.
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
  """The conversations of each split, of the task's source or of --data."""
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
  """A sentence, if fewer rows are there than the options allow."""
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
  """The order with batches that there are rows for, and what is said of it."""
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
