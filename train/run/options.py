"""Options of evaluation and of what a run writes."""

import dataclasses

from ..errors import UsageError
from ..options import listed, option, shown

AFTER = ("calibration", "last", "shifted", "quantised", "pruned")


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
  """Validation, and the test at the end."""

  eval_every: int = option(0, least=0)
  """Number of steps between validations. A validation uses the primary adapter
  alone. 0 means one validation an epoch."""
  eval_batch_size: int = option(0, least=0, below=2**20)
  """Number of rows that are evaluated together. 0 means --batch-size divided by
  --accumulate."""
  patience: int = option(0, least=0)
  """Stop the run after this many validations without a better result. 0 means
  that the run never stops early."""
  samples: int = option(0, least=0, below=2**20)
  """Number of validation prompts that the model answers at each validation,
  from the first prompt on. An answer has at most 64 tokens. 0 means none (for
  instructions)."""
  eval_first: bool = option(False)
  """Also validate before the first step."""
  after: str = option("")
  """More tests at the end of the run, separated by commas. calibration: the
  calibration of the probabilities on the test rows. last: the weights of the
  last step, beside the best weights. shifted: rows with errors in them, and
  rows of other domains. quantised: the merged model in int8, NF4 and 3 bits.
  pruned: the merged model without the smallest 30 and 50% of its weights. Empty
  means none (for classification, on one device, with a base that is not
  quantised)."""
  baseline: bool = option(True)
  """Also fit a logistic regression on the frozen features, for comparison (with
  a base that is not quantised)."""


@dataclasses.dataclass(frozen=True)
class OutputOptions:
  """The run's folder, and what is written into it."""

  run_dir: str = option("")
  """Folder of the run. Empty means runs/TASK-METHOD-seedN."""
  loggers: str = option("")
  """More loggers, separated by commas: wandb and mlflow, if they are installed,
  and loggers that --plugins add. JSONL, TensorBoard and the terminal are always
  used."""
  log_every: int = option(10, least=1)
  """Number of steps between lines of metrics."""
  checkpoint_every: int = option(50, least=1)
  """Number of steps between checkpoints. The same command resumes from the last
  checkpoint."""
  accept_changes: bool = option(False)
  """Resume the run although rows, weights, tokenizer, template or plugins have
  changed since it began. Without this option the program refuses to resume
  it."""
  diagnose_every: int = option(0, least=0)
  """Number of steps between diagnoses of the auxiliary adapter: its cosine with
  the gradient, its overlap with the gradient's top directions and with the
  primary adapter, and its turnover. A diagnosis takes as long as about three
  steps. 0 means none (for methods with an auxiliary adapter, with a base that
  is not quantised)."""
  profile: int = option(0, least=0)
  """Number of steps to trace with JAX's profiler, after the first logged steps.
  The trace is written into the run's folder. 0 means no trace."""


def after(evaluation: EvaluationOptions) -> tuple[str, ...]:
  """What `--after` names.

  Raises:
    UsageError: if it names what there is not.
  """
  names = [x.strip() for x in evaluation.after.split(",") if x.strip()]
  for name in names:
    if name not in AFTER:
      raise UsageError(
        f"--after must be some of {listed(AFTER)}, separated by commas; got "
        f"{shown(name)}."
      )
  return tuple(dict.fromkeys(names))
