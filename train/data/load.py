"""The data of a run: batches to train on, and what a split says of a model."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from ..models import registry
from ..models.io import tokenizer
from ..models.load import Pretrained
from . import (
  chat,
  images,
  instructions,
  label_words,
  objectives,
  packing,
  pipeline,
)
from . import registry as tasks
from . import scores as evaluate
from .objectives import Items, Objective
from .options import DataOptions
from .scores import Evaluation, Rows

_SPLITS = ("train", "validation", "test")

Predict = Callable[[pipeline.Batch], Items]


class Config(NamedTuple):
  """What the reading of data depends on."""

  options: DataOptions
  batch_size: int
  epochs: int
  seed: int
  eval_batch_size: int = 0

  def __getattr__(self, name: str) -> Any:
    return getattr(self.options, name)


class Data(Protocol):
  """What the loop knows of the data that a run trains on.

  Attributes:
    objective: what is learned from a batch.
    metric: the name of the metric to select a checkpoint by.
    rows: in each split.
    left_out: rows that were too long, in each split.
    steps_per_epoch: optimizer steps.
  """

  @property
  def objective(self) -> Objective: ...

  @property
  def metric(self) -> str: ...

  @property
  def rows(self) -> dict[str, int]: ...

  @property
  def left_out(self) -> dict[str, int]: ...

  @property
  def steps_per_epoch(self) -> int: ...

  def train_batches(
    self, part: tuple[int, int] = (0, 1)
  ) -> grain.DatasetIterator[pipeline.Batch]:
    """Batches of all epochs; of a part of their rows, of how many parts."""
    ...

  def evaluate(self, predict: Predict, split: str) -> Evaluation:
    """What a split's rows say of a model; `predict` is given whole batches."""
    ...

  def score(self, found: Evaluation) -> float:
    """What is higher for a better model."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
  """Texts or images with labels.

  Attributes:
    examples: the rows of each split.
    ordered: from rows and their `_order` to batches to train on.
    whole: from rows and a batch size to batches that have each row once.
    pad_id: token id of padding, of texts.
  """

  config: Config
  task: tasks.Task | images.ImageTask
  examples: Mapping[str, pipeline.Examples | images.Images]
  ordered: Callable[..., grain.DatasetIterator[pipeline.Batch]]
  whole: Callable[..., grain.DatasetIterator[pipeline.Batch]]
  objective: Objective
  pad_id: int = 0

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
  def steps_per_epoch(self) -> int:
    return len(self.examples["train"]) // self.config.batch_size

  def train_batches(
    self, part: tuple[int, int] = (0, 1)
  ) -> grain.DatasetIterator[pipeline.Batch]:
    return self.ordered(self.examples["train"], **_order(self.config, part))

  def evaluate(self, predict: Predict, split: str) -> Evaluation:
    return evaluate.evaluate(predict, self._rows(split), self.task.metrics)

  def score(self, found: Evaluation) -> float:
    return found.metrics[self.metric]

  def baseline(self, features: Callable[[pipeline.Batch], Any]) -> Evaluation:
    """Logistic regression on frozen features, (B, D) of a batch."""
    train, validation, test = map(self._rows, _SPLITS)
    return evaluate.logistic_regression(
      features, train, validation, test, self.task.metrics
    )

  def _rows(self, split: str) -> Rows:
    rows = self.examples[split]
    return Rows(rows.labels, self.whole(rows, self.config.eval_batch_size))


@dataclasses.dataclass(frozen=True, eq=False)
class Conversations:
  """Prompts with responses, of which the responses are learned."""

  config: Config
  packed: Mapping[str, packing.Packed]
  pad_id: int
  objective: Objective = objectives.NEXT_TOKEN
  metric: str = "perplexity"

  @property
  def rows(self) -> dict[str, int]:
    return {name: len(x.sequences) for name, x in self.packed.items()}

  @property
  def left_out(self) -> dict[str, int]:
    found = {name: x.sequences.skipped for name, x in self.packed.items()}
    return {name: count for name, count in found.items() if count}

  @property
  def steps_per_epoch(self) -> int:
    return len(self.packed["train"]) // self.config.batch_size

  def train_batches(
    self, part: tuple[int, int] = (0, 1)
  ) -> grain.DatasetIterator[pipeline.Batch]:
    rows, options = self.packed["train"], _order(self.config, part)
    return packing.train_batches(
      rows,
      pad_id=self.pad_id,
      group_by_length=self.config.group_by_length,
      **options,
    )

  def evaluate(self, predict: Predict, split: str) -> Evaluation:
    loss, right, count = 0.0, 0, 0
    for batch in packing.eval_batches(
      self.packed[split], self.config.eval_batch_size, pad_id=self.pad_id
    ):
      found = predict(batch)
      learned = batch["weights"] > 0
      loss += float(np.asarray(found.losses)[learned].sum(dtype=np.float64))
      right += int(np.asarray(found.right)[learned].sum())
      count += int(learned.sum())
    loss /= count
    return Evaluation(
      metrics={"perplexity": math.exp(loss), "accuracy": right / count},
      loss=loss,
      correct=right,
      rows=count,
      unit="tokens",
    )

  def score(self, found: Evaluation) -> float:
    return -found.loss


def _order(config: Config, part: tuple[int, int]) -> dict[str, Any]:
  """In what order training rows come, and which of them are wanted."""
  index, count = part
  return {
    "batch_size": config.batch_size,
    "seed": config.seed,
    "epochs": config.epochs,
    "process_index": index,
    "process_count": count,
  }


def load(
  options: DataOptions,
  pretrained: Pretrained,
  *,
  batch_size: int,
  eval_batch_size: int,
  epochs: int,
  seed: int,
) -> Data:
  """Reads the data of a run, and tokenizes texts.

  Raises:
    ValueError: if the model or the options are not for such data, or the data
      are not as they must be.
    RuntimeError: if they cannot be had.
  """
  config = Config(options, batch_size, epochs, seed, eval_batch_size)
  if True:
    if config.task == "instructions":
      return _conversations(config, pretrained)
    if config.task in images.names():
      return _images(config, pretrained)
    return _labelled(config, pretrained)


def _labelled(config: Config, pretrained: Pretrained) -> Labelled:
  task = tasks.get(config.task)
  text_tokenizer = pretrained.tokenizer
  objective = objectives.CLASSIFICATION
  if pretrained.family.has_new_head:
    encode = functools.partial(tokenizer.encode, text_tokenizer)
  else:
    encode = functools.partial(label_words.encode, text_tokenizer, task)
  answers = label_words.answers(pretrained, task)
  if pretrained.family.answers == "words":
    assert not isinstance(answers, int)
    objective = objectives.words(answers)
  examples = {}
  for split in _SPLITS:
    limit = config.train_rows if split == "train" else config.eval_rows
    rows = pipeline.load(
      task, split, config.data_dir or None, limit or None, config.seed
    )
    examples[split] = pipeline.tokenize(rows, encode, config.max_length)
  return Labelled(
    config,
    task,
    examples,
    ordered=functools.partial(
      pipeline.train_batches,
      pad_id=pretrained.pad_id,
      group_by_length=config.group_by_length,
    ),
    whole=functools.partial(pipeline.eval_batches, pad_id=pretrained.pad_id),
    objective=objective,
    pad_id=pretrained.pad_id,
  )


def _images(config: Config, pretrained: Pretrained) -> Labelled:
  task = images.get(config.task)
  if pretrained.family.reads != "images":
    raise ValueError(
      f"--task {task.name} is of images, for a --model such as vit; got "
      f"a model that reads {pretrained.family.reads}."
    )
  examples = {}
  for split in _SPLITS:
    limit = config.train_rows if split == "train" else config.eval_rows
    examples[split] = images.load(task, split, limit or None, config.seed)
  return Labelled(
    config,
    task,
    examples,
    ordered=images.train_batches,
    whole=images.eval_batches,
    objective=objectives.images(task.side),
  )


def _conversations(config: Config, pretrained: Pretrained) -> Conversations:
  if pretrained.template is None:
    raise ValueError(
      "Instructions are for a model that holds conversations "
      f"({registry.names(x for x in registry.families() if x.converses)}); got "
      f"a {pretrained.family.name}."
    )
  packed = {}
  for split in _SPLITS:
    limit = config.train_rows if split == "train" else config.eval_rows
    rows = instructions.load(
      config.path,
      split,
      limit=limit or None,
      seed=config.seed,
      data_dir=config.data_dir or None,
    )
    sequences = chat.tokenize(
      rows,
      pretrained.tokenizer,
      pretrained.template,
      config.max_length,
      eos=pretrained.eos_id,
      on_long=config.on_long,
    )
    if config.pack:
      packed[split] = packing.pack(sequences, config.max_length)
    else:
      shorter = [n for n in pipeline.BUCKETS if n < config.max_length]
      packed[split] = packing.unpacked(sequences, (*shorter, config.max_length))
  if len(packed["train"]) < config.batch_size:
    raise ValueError(
      f"--batch-size is {config.batch_size}, and {config.path} makes "
      f"{len(packed['train'])} rows of {config.max_length} tokens to train on."
    )
  return Conversations(config, packed, pretrained.pad_id)
