"""`python -m train predict`: labels new rows with a finished run."""

import csv
import io
import json
import pathlib
from typing import Any

import numpy as np
from rich import console, table

from .. import files
from ..data.load import Given
from ..data.task import Text
from ..errors import UsageError
from .finished import Finished, open_run
from .options import Columns, Predict

_SUFFIXES = (".csv", ".jsonl", ".parquet")


def main(options: Predict) -> int:
  """Labels the rows, and writes or prints the results. Returns 0.

  Raises:
    ValueError: if the run or the rows are invalid.
    OSError: if the file cannot be written.
  """
  given = sum(map(bool, (options.data, options.text, options.image)))
  if given != 1:
    raise UsageError(
      "one of --data, --text and --image must say what to label; got "
      f"{'several of them' if given else 'none of them'}."
    )
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
  """Refuses a run of conversations, which has no labels for rows.

  Raises:
    UsageError: if the run is refused; the message names the right command.
  """
  if finished.task.kind == "conversations":
    raise UsageError(
      f"{finished.folder} learned to respond in conversations, and has no "
      "labels for rows; use generate --run."
    )


def read(finished: Finished, data: str, columns: Columns, labelled: bool):
  """Reads rows from the run's columns, or from the columns that are named.

  Raises:
    ValueError: if the rows are invalid.
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
  """Writes rows atomically; the suffix of the path decides the format."""
  with files.replacing(out) as part:
    if out.suffix == ".parquet":
      import pyarrow as pa
      from pyarrow import parquet

      parquet.write_table(pa.Table.from_pylist(rows), part)
    elif out.suffix == ".jsonl":
      part.write_text("".join(json.dumps(files.finite(x)) + "\n" for x in rows))
    else:
      part.write_text(_csv(rows))


def _out(options: Predict) -> pathlib.Path | None:
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


def _rows(options: Predict, finished: Finished) -> Given:
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


def _texts(options: Predict) -> list[Text]:
  if not options.text_pair:
    return list(options.text)
  if len(options.text) != len(options.text_pair):
    raise UsageError(
      f"each --text needs a --text-pair; got {len(options.text)} and "
      f"{len(options.text_pair)}."
    )
  return list(zip(options.text, options.text_pair))


def _told(finished: Finished, answers: np.ndarray) -> list[dict[str, Any]]:
  """Returns the columns of each row: label and probabilities, or a value."""
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
