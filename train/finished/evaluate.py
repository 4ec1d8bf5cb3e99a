"""`python -m train evaluate`: tests a finished run on labelled rows."""

import pathlib
from typing import Any

from .. import files
from ..data import load as data_lib
from ..data.scores import Evaluation
from ..errors import UsageError
from ..run import assemble
from ..run import config as config_lib
from . import predict
from .finished import Finished, open_run, reading
from .options import Columns, Evaluate


def main(options: Evaluate) -> int:
  """Evaluates a run and prints the numbers. Returns 0.

  Raises:
    ValueError: if the run or the rows are invalid.
    OSError: if the file cannot be written.
  """
  out = pathlib.Path(options.json).expanduser()
  if options.json and out.exists() and not options.overwrite:
    raise UsageError(f"--json {out} exists; --overwrite replaces it.")
  if options.json:
    files.check_place("--json", out)
  finished = open_run(options.run, accept_changes=options.accept_changes)
  found = _evaluation(options, finished)
  print("\n".join(_lines(found)))
  if options.json:
    files.write_json(out, found.to_json())
  return 0


def _evaluation(options: Evaluate, finished: Finished) -> Evaluation:
  size = options.batch_size or finished.batch_size
  if finished.task.kind != "conversations" and options.data:
    rows = predict.read(finished, options.data, options.columns, labelled=True)
    return rows.evaluate(finished.items(), size)
  if options.columns != Columns():
    raise UsageError(
      "options for columns are only for a --data with labels; leave them out."
    )
  data = _own(options, finished, size)
  return data.evaluate(finished.items(), "test")


def _own(options: Evaluate, finished: Finished, size: int) -> data_lib.Data:
  """Returns the run's data; with --data, every split has these rows."""
  changes: dict[str, Any] = {"eval_batch_size": size}
  if options.data:
    changes |= dict.fromkeys(("data", "validation", "test"), options.data)
    changes |= {"held_out": 0.0, "train_rows": 0, "eval_rows": 0}
  config = config_lib.replace(finished.config, **changes)
  with reading():
    return assemble.load_data(config, finished.pretrained)


def _lines(found: Evaluation) -> list[str]:
  lines = [f"{name} {value:.4f}" for name, value in found.metrics.items()]
  interval = found.interval()
  if interval is not None:
    low, high = interval
    lines[0] += f" (95% {low:.4f} to {high:.4f})"
  return [*lines, f"loss {found.loss:.4f}", f"{found.rows} {found.unit}"]
