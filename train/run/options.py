"""Options of evaluation and of what a run writes."""

import dataclasses

from ..errors import UsageError
from ..options import listed, option, shown

AFTER = ("calibration", "last", "shifted", "quantised", "pruned")


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
  """Validation, and the test at the end."""

  eval_every: int = option(0, least=0)
  """Steps between validations, on the primary alone; 0: one an epoch."""
  eval_batch_size: int = option(0, least=0, below=2**20)
  """Rows that are evaluated together; 0: those of a part of a training batch
  (--batch-size over --accumulate)."""
  patience: int = option(0, least=0)
  """Validations without a better one after which the run stops; 0: it never
  stops early."""
  samples: int = option(0, least=0, below=2**20)
  """Answers that a model of conversations generates at each validation, to the
  first validation prompts, of at most 64 tokens; 0: none."""
  eval_first: bool = option(False)
  """Also validate before the first step."""
  after: str = option("")
  """More tests at the end, with commas (tasks of classes, on one device and a
  base of floats): calibration, of the test's probabilities; last, the weights
  of the last step beside the best; shifted, rows with errors in them and of
  other domains; quantised, the merged model in int8, NF4 and 3 bits; pruned,
  without the smallest 30 and 50% of its weights."""
  baseline: bool = option(True)
  """Also fit a logistic regression on the frozen features, to compare with (not
  on a quantised base)."""


@dataclasses.dataclass(frozen=True)
class OutputOptions:
  """The run's folder, and what is written into it."""

  run_dir: str = option("")
  """Folder of the run; empty: runs/TASK-METHOD-seedN."""
  loggers: str = option("")
  """More loggers beside JSONL, TensorBoard and the terminal, with commas: wandb
  and mlflow, where they are installed, and those that --plugins add."""
  log_every: int = option(10, least=1)
  """Steps between lines of metrics."""
  checkpoint_every: int = option(50, least=1)
  """Steps between checkpoints, from which the same command resumes."""
  accept_changes: bool = option(False)
  """Resume though rows, weights, tokenizer, template or plugins are not those
  that the run was begun with, which is refused otherwise."""
  diagnose_every: int = option(0, least=0)
  """Steps between diagnoses of the auxiliary: its cosine with the gradient, its
  overlap with the gradient's top directions and with the primary, its turnover;
  each costs about three steps; 0: none (methods with an auxiliary; float
  bases)."""
  profile: int = option(0, least=0)
  """Steps to trace with JAX's profiler, after the first logged ones, into the
  run's folder."""


def after(evaluation: EvaluationOptions) -> tuple[str, ...]:
  """What `--after` names.

  Raises:
    UsageError: if it names what there is not.
  """
  names = [x.strip() for x in evaluation.after.split(",") if x.strip()]
  for name in names:
    if name not in AFTER:
      raise UsageError(
        f"--after is some of {listed(AFTER)}, with commas; got {shown(name)}."
      )
  return tuple(dict.fromkeys(names))
