"""Reads a user's rows in all supported formats, as mappings of columns."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import csv
import gzip
import io
import os
import pathlib
from typing import Any, NamedTuple
import zlib

import numpy as np

from .. import bounds, checked, jsonl, options
from ..errors import UsageError
from . import idx

TFDS = "tfds:"
"""The prefix of the name of a TFDS dataset."""
IMAGE, LABEL = "image", "label"
"""The columns of a folder of images."""
SUFFIXES = (
  *(".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".parquet"),
)
_ALLOWED = (
  f"a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, a folder of images by"
  f" class or of IDX files, a folder that Hugging Face datasets saved, or"
  f" {TFDS}NAME"
)
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_ROWS = 1024
"""Rows of a Parquet file to read at once: few bytes may become gigabytes."""
_SPLITS = {
  "train": "train",
  "training": "train",
  "validation": "validation",
  "valid": "validation",
  "val": "validation",
  "dev": "validation",
  "eval": "validation",
  "test": "test",
  "testing": "test",
}


class Table(NamedTuple):
  """Rows of one stored split.

  Attributes:
    path: the file, folder or dataset of the rows.
    columns: the names of the columns.
    rows: mappings from the names of columns to values.
    where: from a row's number to its place, in words.
    names: from each column of class numbers to the names of its classes.
    folder: the folder that relative paths of images start from.
  """

  path: str
  columns: tuple[str, ...]
  rows: Sequence[Mapping[str, Any]]
  where: Callable[[int], str]
  names: Mapping[str, tuple[str, ...]]
  folder: pathlib.Path


def read(
  path: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None
) -> dict[str, Table]:
  """Returns the tables of a path, by their splits.

  If a path has one table, this table is `train`.

  Args:
    path: a file, a folder, or `tfds:` and the name of a prepared dataset.
    data_dir: the folder of prepared datasets; the user's cache if None.

  Raises:
    UsageError: if the path does not exist or its content is invalid. The
      message names the file, and the line if there is one.
    RuntimeError: if the path cannot be read.
  """
  name = os.fspath(path)
  if name.startswith(TFDS):
    return _tfds(name, data_dir)
  found = pathlib.Path(name).expanduser()
  try:
    if checked.is_folder(found):
      return _folder(found)
    if checked.is_file(found):
      return {"train": _file(found)}
    raise UsageError(f"{name} is not there; rows must be {_ALLOWED}.")
  except OSError as error:
    raise RuntimeError(f"{found} cannot be read: {error}.") from error


def one(
  path: str | os.PathLike[str],
  split: str = "test",
  data_dir: str | os.PathLike[str] | None = None,
) -> Table:
  """Returns the only table of a path, or one of several tables.

  Args:
    path: as of `read`.
    split: which table to return if the path has several.
    data_dir: as of `read`.

  Raises:
    UsageError: as `read`; or if the path has several tables, but not `split`.
    RuntimeError: as `read`.
  """
  found = read(path, data_dir)
  if len(found) == 1:
    return next(iter(found.values()))
  if split not in found:
    raise UsageError(
      f"{os.fspath(path)} has the splits {', '.join(found)}, but no split "
      f"{split}."
    )
  return found[split]


def shown(names: Sequence[Any], most: int = 8) -> str:
  """Returns a list of names for a sentence, shortened if they are many."""
  text = ", ".join(str(name)[:40] for name in names[:most])
  return text if len(names) <= most else f"{text}, ... ({len(names)} in all)"


def _file(path: pathlib.Path) -> Table:
  bounds.check_gzip(path)
  name = path.name.lower()
  if name.endswith((".csv", ".csv.gz")):
    return _csv(path, ",")
  if name.endswith((".tsv", ".tsv.gz")):
    return _csv(path, "\t")
  if name.endswith((".jsonl", ".jsonl.gz")):
    places, rows = [], []
    for where, row in jsonl.read(path):
      if not isinstance(row, dict):
        raise UsageError(
          f"{where}, is not an object; a row must be an object with a value "
          "for each column."
        )
      places.append(where)
      rows.append(row)
    return _table(path, rows, places)
  if name.endswith(".parquet"):
    from pyarrow import parquet

    def whole(file: pathlib.Path) -> Any:
      with parquet.ParquetFile(file) as stored:
        return _gathered(file, stored.schema_arrow, stored.iter_batches(_ROWS))

    return _arrow(path, [_pyarrow(whole, path)])
  raise UsageError(f"{path} is not a file of rows; rows must be {_ALLOWED}.")


def _csv(path: pathlib.Path, delimiter: str) -> Table:
  """Reads text columns; in a TSV, unpaired quotes are plain characters."""
  try:
    return _quoted(path, delimiter, csv.QUOTE_MINIMAL)
  except UsageError:
    if delimiter == ",":
      raise
  return _quoted(path, delimiter, csv.QUOTE_NONE)


def _quoted(path: pathlib.Path, delimiter: str, quoting: Any) -> Table:
  columns, rows, places = None, [], []
  with contextlib.ExitStack() as stack:
    stored: Any = stack.enter_context(checked.open_file(path))
    if path.suffix == ".gz":
      stored = stack.enter_context(gzip.GzipFile(fileobj=stored))
    # The codec removes a byte order mark from the first column's name.
    file = io.TextIOWrapper(stored, encoding="utf-8-sig", newline="")
    line = 1
    try:
      head = file.readline()
      file.seek(0)
      if delimiter == "," and "," not in head and ";" in head:
        # Spreadsheets write this in countries with decimal commas.
        delimiter = ";"
      reader = csv.reader(
        file, delimiter=delimiter, quoting=quoting, strict=True
      )
      for values in reader:
        where, line = f"{path}, line {line}", reader.line_num + 1
        if not values:
          continue
        if columns is None:
          columns = values
          if len(set(columns)) < len(columns):
            raise UsageError(
              f"{where}, names a column twice: {shown(columns)}. The first "
              "line must name each column once."
            )
          continue
        if len(values) != len(columns):
          raise UsageError(
            f"{where}, has {len(values)} columns; the first line names "
            f"{len(columns)}: {shown(columns)}. A text with a delimiter in it "
            "must stand in double quotes."
          )
        rows.append(dict(zip(columns, values)))
        places.append(where)
    except (csv.Error, UnicodeDecodeError, EOFError, zlib.error) as error:
      raise UsageError(
        f"{path}, line {line}, cannot be read: {error}."
      ) from error
  return _table(path, rows, places, tuple(columns or ()))


def _table(
  path: pathlib.Path,
  rows: Sequence[Mapping[str, Any]],
  places: Sequence[str] | None = None,
  columns: tuple[str, ...] = (),
  names: Mapping[str, tuple[str, ...]] | None = None,
) -> Table:
  if not rows:
    raise UsageError(f"{path} has no rows; at least one is needed.")
  columns = columns or tuple(
    dict.fromkeys(name for row in rows for name in row)
  )

  def where(i: int) -> str:
    return places[i] if places else f"{path}, row {i + 1}"

  folder = path if path.is_dir() else path.parent
  return Table(str(path), columns, rows, where, names or {}, folder)


def _arrow(path: pathlib.Path, tables: Sequence[Any]) -> Table:
  import pyarrow as pa

  whole = _pyarrow(lambda _: pa.concat_tables(tables), path)
  features: dict[str, Any] = {}
  stored = (whole.schema.metadata or {}).get(b"huggingface")
  if stored:
    where = f"{path}, the features of its schema,"
    known = checked.parse_json(stored, where, dict)
    known = checked.field(where, known, "info", dict, {})
    features = checked.field(where, known, "features", dict | None, None) or {}
  info = path / "dataset_info.json"
  if checked.is_file(info):
    known = checked.read_json(info)
    features = (
      checked.field(str(info), known, "features", dict | None, None) or features
    )
  names = {
    name: checked.field(
      f"{path}, the classes of {name},", feature, "names", tuple[str, ...]
    )
    for name, feature in features.items()
    if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
  }

  def listed(_: pathlib.Path) -> list[Any]:
    # Arrow would follow offsets that point outside the file's memory.
    whole.validate(full=True)
    return whole.to_pylist()

  rows = _pyarrow(listed, path)
  return _table(path, rows, columns=tuple(whole.column_names), names=names)


def _gathered(path: pathlib.Path, schema: Any, batches: Iterable[Any]) -> Any:
  """Returns a table of batches, and checks their size while they are read.

  Raises:
    UsageError: if the batches are far larger than their file.
  """
  import pyarrow as pa

  found, size = [], 0
  for batch in batches:
    # `nbytes` reads offsets, so they are checked first.
    batch.validate()
    # Empty rows take memory too, when they become Python objects.
    size += batch.nbytes + 16 * batch.num_rows
    bounds.check(path, size)
    found.append(batch)
  return pa.Table.from_batches(found, schema)


def _pyarrow(reader: Callable[[Any], Any], path: pathlib.Path) -> Any:
  """Returns what `reader` reads from a file.

  Raises:
    UsageError: if the file cannot be read. Arrow raises many types of errors,
      also Python's own for dates and texts.
  """
  try:
    return reader(path)
  except Exception as error:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise UsageError(f"{path} cannot be read: {line}.") from error


def _folder(path: pathlib.Path) -> dict[str, Table]:
  whole = path / "dataset_dict.json"
  if checked.is_file(whole):
    splits = checked.field(
      str(whole), checked.read_json(whole), "splits", tuple[str, ...]
    )
    for name in splits:
      _check_name(str(whole), name)
    return _by_split({name: _saved(path / name) for name in splits}, path)
  if checked.is_file(path / "state.json"):
    return {"train": _saved(path)}
  if idx.is_folder(path):
    return {
      split: _table(path, rows)
      for split, rows in idx.tables(path, IMAGE, LABEL).items()
    }
  folders = sorted(x for x in path.iterdir() if x.is_dir())
  if folders and all(x.name.lower() in _SPLITS for x in folders):
    return _by_split({x.name: _images(x) for x in folders}, path)
  return {"train": _images(path)}


def _by_split(
  tables: Mapping[str, Table], path: pathlib.Path | str
) -> dict[str, Table]:
  if len(tables) == 1:
    return {"train": next(iter(tables.values()))}
  found = {}
  for name, table in tables.items():
    split = _SPLITS.get(name.lower())
    if split is not None:  # others, such as validation_mismatched, are unused
      if split in found:
        raise UsageError(f"{path} has two splits for {split}: {tables.keys()}.")
      found[split] = table
  if "train" not in found:
    raise UsageError(
      f"{path} has the splits {shown(list(tables))}; one must be train."
    )
  return found


def _saved(path: pathlib.Path) -> Table:
  """Reads a folder that `save_to_disk` of Hugging Face's datasets wrote."""
  from pyarrow import ipc

  def stream(file: pathlib.Path) -> Any:
    with checked.open_file(file) as opened:
      stored = ipc.open_stream(opened)
      return _gathered(file, stored.schema, stored)

  state = path / "state.json"
  items = checked.field(
    str(state), checked.read_json(state), "_data_files", tuple[dict, ...]
  )
  files = [
    checked.field(f"{state}, _data_files,", item, "filename", str)
    for item in items
  ]
  if not files:
    raise UsageError(f"{state} lists no files of rows.")
  for name in files:
    _check_name(str(state), name)
  return _arrow(path, [_pyarrow(stream, path / file) for file in files])


def _check_name(where: str, name: str) -> None:
  """Refuses the name of a file that is outside the folder."""
  if pathlib.PurePath(name).name != name:
    raise UsageError(
      f"{where} must list files in the same folder by their names; got "
      f"{options.shown(name)}."
    )


def images(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the images of a folder and its subfolders, sorted by path."""
  for file in sorted(path.rglob("*")):
    if file.suffix.lower() in _IMAGES and file.is_file():
      yield file


def _images(path: pathlib.Path) -> Table:
  """Reads a folder of images; each subfolder holds the images of a class."""
  files = list(images(path))
  if not files:
    raise UsageError(
      f"{path} has no images ({', '.join(_IMAGES)}); rows must be {_ALLOWED}."
    )
  rows: list[dict[str, Any]] = []
  for file in files:
    parts = file.relative_to(path).parts
    row = {IMAGE: str(file)}
    rows.append(row | {LABEL: parts[0]} if len(parts) > 1 else row)
  return _table(path, rows, [str(file) for file in files])


def _tfds(
  name: str, data_dir: str | os.PathLike[str] | None
) -> dict[str, Table]:
  import tensorflow_datasets as tfds

  from . import prepare

  folder = pathlib.Path(data_dir or prepare.default_data_dir()).expanduser()
  dataset = name.removeprefix(TFDS)
  try:
    builder = tfds.builder(dataset, data_dir=folder, file_format="array_record")
    features: Any = builder.info.features
    # TFDS's logging decorator hides the signature from pyright.
    read_split: Any = builder.as_data_source
    if not builder.info.splits:
      raise LookupError("it is not prepared.")
    stored = {split: [*read_split(split)] for split in builder.info.splits}
  except Exception as error:  # TFDS raises many types
    first_line = str(error).partition("\n")[0]
    raise RuntimeError(
      f"The TFDS dataset {dataset!r} cannot be read from {folder}: {first_line}"
      f" Prepare it with tensorflow_datasets.builder({dataset!r},"
      f" data_dir={str(folder)!r}, file_format='array_record')"
      ".download_and_prepare(), or give a file."
    ) from error
  names = {
    column: tuple(feature.names)
    for column, feature in features.items()
    if isinstance(feature, tfds.features.ClassLabel)
  }
  tables = {}
  for split, rows in stored.items():
    label = name if len(stored) == 1 else f"{name}/{split}"
    tables[split] = Table(
      path=name,
      columns=tuple(features),
      rows=[{key: _text(value) for key, value in row.items()} for row in rows],
      where=lambda i, label=label: f"{label}, row {i}",
      names=names,
      folder=folder,
    )
  return _by_split(tables, name)


def _text(value: Any) -> Any:
  """Returns a TFDS value as Python's own type: str for bytes, or a number."""
  if isinstance(value, np.generic):
    return value.item()
  return value.decode() if isinstance(value, bytes) else value
