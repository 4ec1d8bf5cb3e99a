"""What a trained model is good for: shifted rows, few bits, trusted odds.

All is measured at the end of a run, on the plain model that the adapters are
merged into, by one compiled function.
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
  """The compiled functions of what is measured.

  Attributes:
    answers: `(variables, batch)` of the plain model to the probabilities of
      the labels, (B, labels).
    changes: from variables to those in fewer bits and the like, by names.
  """

  answers: Callable[[Any, Batch], jax.Array]
  changes: Mapping[str, Callable[[Any], Any]]


Shifted = Mapping[str, data_lib.Examples]
"""Test sets by their names."""


def make(prepared: Prepared) -> Programs:
  """Returns the functions, which all runs of a model share."""
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
  """Returns `calibration.scores` by the names of what they are of.

  `test` is always there: the test rows, by the best weights.

  Args:
    prepared: of the run.
    best: what is evaluated, of the step that did best on validation rows.
    last: the same, of the last step.
    programs: of `make`.
    shifted: of `Labelled.shifted`.
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
