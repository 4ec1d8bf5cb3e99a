"""`python -m train evaluate`: a finished run on labelled rows."""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

import tyro

from .. import command, files
from .. import options as options_lib
from ..data import load as data_lib
from ..data.scores import Evaluation
from ..errors import UsageError
from ..options import option
from ..run import assemble
from ..run import config as config_lib
from . import predict
from .finished import Finished, open_run, reading


@dataclasses.dataclass(frozen=True)
class Options:
  """Tests a finished run on labelled rows, or once more on its own test rows.

  For conversations the result is the perplexity of the responses.
  """

  run: str
  """The folder of a finished run."""
  data: str = ""
  """Rows with labels, in any format of predict --data, or conversations. Empty
  means the run's own test rows."""
  json: str = ""
  """File to which the numbers are also written. Empty means none."""
  overwrite: bool = False
  """Replace --json if the file exists."""
  batch_size: int = option(0, least=0, below=2**20)
  """Number of rows that are evaluated together. 0 means the number of the
  run."""
  accept_changes: bool = False
  """Go on although the model is not the one that the run was trained on."""
  columns: tyro.conf.OmitArgPrefixes[predict.Columns] = dataclasses.field(
    default_factory=predict.Columns
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Evaluates, and prints what was found. Returns 0.

  Raises:
    ValueError: if the run or the rows are not as they must be.
    OSError: if the file cannot be written.
  """
  options = tyro.cli(Options, args=argv, prog=f"{command.NAME} evaluate")
  options_lib.check(options)
  options_lib.check(options.columns)
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


def _evaluation(options: Options, finished: Finished) -> Evaluation:
  size = options.batch_size or finished.batch_size
  if finished.task.kind != "conversations" and options.data:
    rows = predict.read(finished, options.data, options.columns, labelled=True)
    return rows.evaluate(finished.items(), size)
  if options.columns != predict.Columns():
    raise UsageError(
      "options for columns are only for a --data with labels; leave them out."
    )
  data = _own(options, finished, size)
  return data.evaluate(finished.items(), "test")


def _own(options: Options, finished: Finished, size: int) -> data_lib.Data:
  """The run's data; of conversations, with --data for all of its splits."""
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
