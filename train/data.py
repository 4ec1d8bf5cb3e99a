"""The data of a run: batches to train on, and what a split says of a model."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Protocol

import grain

from train import evaluate, objectives, tasks
from train.config import Config
from train.evaluate import Evaluation
from train.objectives import Items, Objective
from train.tasks import pipeline

Predict = Callable[[pipeline.Batch], Items]


class Data(Protocol):
  """What the loop knows of the data that a run trains on.

  Attributes:
    objective: what is learned from a batch.
    metric: the name of the metric to select a checkpoint by.
    rows: in each split.
    steps_per_epoch: optimizer steps.
  """

  @property
  def objective(self) -> Objective: ...

  @property
  def metric(self) -> str: ...

  @property
  def rows(self) -> dict[str, int]: ...

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
  """Texts with labels."""

  config: Config
  task: tasks.Task
  examples: Mapping[str, pipeline.Examples]
  pad_id: int
  objective: Objective = objectives.CLASSIFICATION

  @property
  def metric(self) -> str:
    return self.task.metrics[0]

  @property
  def rows(self) -> dict[str, int]:
    return {name: len(x) for name, x in self.examples.items()}

  @property
  def steps_per_epoch(self) -> int:
    return len(self.examples["train"]) // self.config.batch_size

  def train_batches(
    self, part: tuple[int, int] = (0, 1)
  ) -> grain.DatasetIterator[pipeline.Batch]:
    return pipeline.train_batches(
      self.examples["train"],
      self.config.batch_size,
      self.config.seed,
      self.config.epochs,
      *part,
      pad_id=self.pad_id,
      group_by_length=self.config.group_by_length,
    )

  def evaluate(self, predict: Predict, split: str) -> Evaluation:
    return evaluate.evaluate(
      predict,
      self.examples[split],
      self.config.batch_size,
      self.task.metrics,
      self.pad_id,
    )

  def score(self, found: Evaluation) -> float:
    return found.metrics[self.metric]

  def baseline(self, features: Callable[[pipeline.Batch], Any]) -> Evaluation:
    """Logistic regression on frozen features, (B, D) of a batch."""
    return evaluate.logistic_regression(
      features,
      self.examples["train"],
      self.examples["validation"],
      self.examples["test"],
      self.config.batch_size,
      self.task.metrics,
      self.pad_id,
    )
