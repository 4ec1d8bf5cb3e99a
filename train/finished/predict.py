"""`python -m train predict`: what a finished run tells of new rows."""

from collections.abc import Sequence
import csv
import dataclasses
import io
import json
import pathlib
from typing import Annotated, Any

import numpy as np
from rich import console, table
import tyro

from .. import command, files
from .. import options as options_lib
from ..data.load import Given
from ..data.task import Task, Text
from ..errors import UsageError
from ..options import option
from .finished import Finished, open_run

_SUFFIXES = (".csv", ".jsonl", ".parquet")
_Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Columns:
  """Columns of --data, if their names differ from those of the run."""

  text_column: str = ""
  """Column with the text, or several columns separated by commas, such as
  title,body. Empty means the run's column."""
  text_pair_column: str = ""
  """Column with the second text of a pair. Empty means the run's column."""
  label_column: str = ""
  """Column with the label, if one is needed. Empty means the run's column."""

  def named(self, task: Task) -> Task:
    """The task, with these columns in place of its own."""
    given = [x for x in (self.text_column, self.text_pair_column) if x]
    if not given:
      return dataclasses.replace(task, label=self.label_column or task.label)
    if task.image:
      if self.text_pair_column:
        raise UsageError(
          "--text-pair-column is only for texts; the run read images."
        )
      return dataclasses.replace(task, image=self.text_column)
    if len(given) != len(task.texts) or not self.text_column:
      raise UsageError(
        f"the run read {len(task.texts)} text(s) a row: "
        f"--text-column{' and --text-pair-column' * (len(task.texts) - 1)}; "
        f"got {' and '.join(given)}."
      )
    return dataclasses.replace(
      task,
      texts=tuple(tuple(x.strip() for x in y.split(",")) for y in given),
      label=self.label_column or task.label,
    )


@dataclasses.dataclass(frozen=True)
class Options:
  """Labels new rows by a finished run of any method.

  Rows keep their order. For each row the result has the most likely label and
  the probability of every label. For a regression it has the value.
  """

  run: str
  """The folder of a finished run."""
  data: str = ""
  """Rows to label: a .csv, .tsv, .jsonl or .parquet file, a folder of images or
  of Hugging Face datasets, or tfds:NAME."""
  text: Annotated[_Repeated, tyro.conf.arg(metavar="TEXT")] = ()
  """A text to label, in place of --data. Give the option again for another
  text."""
  text_pair: Annotated[_Repeated, tyro.conf.arg(metavar="TEXT")] = ()
  """The second text of each --text, if the run was trained on pairs."""
  image: Annotated[_Repeated, tyro.conf.arg(metavar="FILE")] = ()
  """An image to label, in place of --data. Give the option again for another
  image."""
  out: str = ""
  """File to write, which ends in .csv, .jsonl or .parquet. Empty means that the
  labels are printed."""
  overwrite: bool = False
  """Replace --out if the file exists."""
  batch_size: int = option(0, least=0, below=2**20)
  """Number of rows that are labelled together. 0 means the number of the
  run."""
  accept_changes: bool = False
  """Go on although the model is not the one that the run was trained on."""
  columns: tyro.conf.OmitArgPrefixes[Columns] = dataclasses.field(
    default_factory=Columns
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Labels the rows, and writes or prints what was found. Returns 0.

  Raises:
    ValueError: if the run or the rows are not as they must be.
    OSError: if the file cannot be written.
  """
  options = tyro.cli(Options, args=argv, prog=f"{command.NAME} predict")
  given = sum(map(bool, (options.data, options.text, options.image)))
  if given != 1:
    raise UsageError(
      "one of --data, --text and --image must say what to label; got "
      f"{'several of them' if given else 'none of them'}."
    )
  options_lib.check(options)
  options_lib.check(options.columns)
  out = _out(options)
  finished = open_run(options.run, accept_changes=options.accept_changes)
  check_labelled(finished)
  rows = _rows(options, finished)
  size = options.batch_size or finished.batch_size
  found = _told(finished, rows.answers(finished.answer(), size))
  if out is not None:
    write(out, found)
    print(f"{out} has {len(found)} rows.")
  elif options.data:
    print(_csv(found), end="")
  else:
    names = [_name(x) for x in options.image or _texts(options)]
    _print([{"": name, **row} for name, row in zip(names, found)])
  return 0


def check_labelled(finished: Finished) -> None:
  """Refuses a run that has no label for a row.

  Raises:
    UsageError: that names the command for it.
  """
  if finished.task.kind == "conversations":
    raise UsageError(
      f"{finished.folder} learned to respond in conversations, and has no "
      "labels for rows; use generate --run."
    )


def read(finished: Finished, data: str, columns: Columns, labelled: bool):
  """The rows of a path, in the run's columns or in those that are named.

  Raises:
    ValueError: if they are not as they must be.
  """
  task = columns.named(finished.task)
  rows = finished.rows(data, task, labelled)
  for name in ("texts", "image", "label"):
    named = getattr(task, name) != getattr(finished.task, name)
    if named and getattr(rows.task, name) != getattr(task, name):
      flag = "--label-column" if name == "label" else "--text-column"
      raise UsageError(
        f"{flag} names a column that {data} does not have; got "
        f"{columns.label_column if name == 'label' else columns.text_column}."
      )
  return rows


def write(out: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  """Writes rows, in the format of the name, whole or not at all."""
  with files.replacing(out) as part:
    if out.suffix == ".parquet":
      import pyarrow as pa
      from pyarrow import parquet

      parquet.write_table(pa.Table.from_pylist(rows), part)
    elif out.suffix == ".jsonl":
      part.write_text("".join(json.dumps(files.finite(x)) + "\n" for x in rows))
    else:
      part.write_text(_csv(rows))


def _out(options: Options) -> pathlib.Path | None:
  if not options.out:
    return None
  out = pathlib.Path(options.out).expanduser()
  if out.suffix not in _SUFFIXES:
    raise UsageError(
      f"--out must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}; got "
      f"{out}."
    )
  if out.exists() and not options.overwrite:
    raise UsageError(f"--out {out} exists; --overwrite replaces it.")
  files.check_place("--out", out)
  return out


def _rows(options: Options, finished: Finished) -> Given:
  if options.data:
    return read(finished, options.data, options.columns, labelled=False)
  if options.columns != Columns():
    raise UsageError("options for columns are only for --data; leave them out.")
  if bool(options.image) is not bool(finished.task.image):
    kind = "image" if finished.task.image else "text"
    raise UsageError(
      f"{finished.folder} reads {kind}s; give --{kind}, or --data with {kind}s."
    )
  return finished.rows(options.image or _texts(options), finished.task)


def _texts(options: Options) -> list[Text]:
  if not options.text_pair:
    return list(options.text)
  if len(options.text) != len(options.text_pair):
    raise UsageError(
      f"each --text needs a --text-pair; got {len(options.text)} and "
      f"{len(options.text_pair)}."
    )
  return list(zip(options.text, options.text_pair))


def _told(finished: Finished, answers: np.ndarray) -> list[dict[str, Any]]:
  """A row's label and probabilities, or its value, by columns."""
  if finished.task.kind == "regression":
    return [{"value": float(x)} for x in answers]
  labels = finished.labels
  return [
    {
      "label": labels[int(np.argmax(row))],
      **{f"probability_{x}": float(y) for x, y in zip(labels, row)},
    }
    for row in answers
  ]


def _csv(rows: list[dict[str, Any]]) -> str:
  text = io.StringIO()
  writer = csv.DictWriter(text, rows[0], lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def _name(row: Text) -> str:
  return row if isinstance(row, str) else " | ".join(row)


def _print(rows: list[dict[str, Any]]) -> None:
  shown = table.Table(box=None)
  for name in rows[0]:
    shown.add_column(name, overflow="fold")
  for row in rows:
    shown.add_row(
      *(f"{x:.4f}" if isinstance(x, float) else x for x in row.values())
    )
  console.Console(markup=False, highlight=False).print(shown)
