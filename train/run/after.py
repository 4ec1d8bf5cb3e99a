"""Tests after training: shifted rows, compressed weights, calibration.

The tests run at the end of a run, on the plain model with merged adapters. They
all use one compiled function.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from ..data import calibration
from ..data import load as data_lib
from ..data.objectives import Batch
from . import compress, options
from .assemble import Prepared


class Programs(NamedTuple):
  """The compiled functions of the tests.

  Attributes:
    answers: from the plain model's `(variables, batch)` to the probabilities of
      the labels, (B, labels).
    changes: by name, functions from variables to compressed variables.
  """

  answers: Callable[[Any, Batch], jax.Array]
  changes: Mapping[str, Callable[[Any], Any]]


Shifted = Mapping[str, data_lib.Examples]
"""Test sets by name."""


def make(prepared: Prepared) -> Programs:
  """Returns the compiled functions, which all runs of a model share."""
  model, objective = prepared.model, prepared.data.objective

  @jax.jit
  def answers(variables, batch):
    return objective.answers(model.apply(variables, *objective.inputs(batch)))

  kinds = options.after(prepared.config.evaluation)
  compressed = tuple(x for x in kinds if x in ("quantised", "pruned"))
  if not compressed:
    return Programs(answers, {})
  inputs = objective.inputs(next(prepared.data.train_batches()))
  return Programs(answers, compress.changes(model, inputs, compressed))


def evaluations(
  prepared: Prepared,
  best: Any,
  last: Any,
  programs: Programs,
  shifted: Callable[[], Shifted],
) -> dict[str, dict[str, float]]:
  """Returns the `calibration.scores` of each test, by name.

  `test` is always there: the best weights on the test rows.

  Args:
    prepared: the prepared run.
    best: the evaluated weights of the step with the best validation score.
    last: the evaluated weights of the last step.
    programs: from `make`.
    shifted: the function `Labelled.shifted`.
  """
  data, kinds = prepared.data, options.after(prepared.config.evaluation)
  assert isinstance(data, data_lib.Labelled)

  def scored(variables, examples):
    found = np.empty((len(examples), len(data.task.labels)), np.float32)
    for batch in data.batches(examples):
      real = batch["weights"] > 0
      found[batch["index"][real]] = np.asarray(
        programs.answers(variables, batch)
      )[real]
    return calibration.scores(found, examples.labels)

  on_test = functools.partial(scored, examples=data.examples["test"])
  merged = prepared.method.merged(prepared.variables, best)
  found = {"test": on_test(merged)}
  if "last" in kinds:
    found["last step"] = on_test(
      prepared.method.merged(prepared.variables, last)
    )
  if "shifted" in kinds:
    for name, examples in shifted().items():
      found[name] = scored(merged, examples)
  for name, change in programs.changes.items():
    found[name] = on_test(change(merged))
  return found
