"""Prepares a task's dataset once, with TFDS, and opens its stored splits.

TFDS needs no TensorFlow to write and read ArrayRecord files. But it needs
TensorFlow to unzip, and without a network it tries to download for minutes. So
this module downloads and unzips the original files, and puts them where TFDS
looks for manual downloads. TFDS checks their SHA-256.
"""

from collections.abc import Iterator, Sequence
import contextlib
import http.client
import importlib
import io
import os
import pathlib
import shutil
import stat
import sys
import tempfile
from typing import Any, NamedTuple
import urllib.request
import zipfile
import zlib

import tensorflow_datasets as tfds

from .. import bounds, files, locks

_TIMEOUT_SECONDS = 30
_WORK = ".preparing-"


class Dataset(NamedTuple):
  """A TFDS dataset that this module prepares.

  Attributes:
    name: the name of the dataset, for errors.
    builder: the TFDS builder, as `module:Class`.
    config: the builder's configuration, or None if it has none.
    originals: (file name, URL) of each file that the dataset is prepared from;
      empty if the data are in this repository.
  """

  name: str
  builder: str
  config: str | None = None
  originals: tuple[tuple[str, str], ...] = ()


def default_data_dir() -> pathlib.Path:
  """Returns the default folder of prepared datasets."""
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(cache) / "bilora_jax" / "tfds"


def open_stored(
  dataset: Dataset, stored: str, data_dir: str | os.PathLike[str] | None = None
) -> Sequence[dict[str, Any]]:
  """Returns the rows of a stored split, and prepares the dataset if needed.

  Several processes may call this function at once. Each process prepares the
  dataset in its own folder, and the first one moves its folder to the final
  place.

  Args:
    dataset: the dataset.
    stored: the TFDS name of a split, such as `validation_matched`.
    data_dir: the folder of prepared datasets; the user's cache if None. Its
      subfolder `originals` holds the original files, also downloaded ones.

  Returns:
    the rows, read from ArrayRecord files with random access.

  Raises:
    RuntimeError: if an original file is missing and cannot be downloaded, or
      the dataset cannot be prepared.
  """
  folder = pathlib.Path(data_dir or default_data_dir()).expanduser().absolute()
  builder = _builder(dataset, folder)
  if not builder.data_path.exists():
    _prepare(dataset, folder, builder)
    builder = _builder(dataset, folder)
  # TFDS's logging decorator hides the signature from pyright.
  return builder.as_data_source(stored)  # pyright: ignore[reportCallIssue]


def _builder(
  dataset: Dataset, folder: pathlib.Path
) -> tfds.core.DatasetBuilder:
  module, name = dataset.builder.split(":")
  builder = getattr(importlib.import_module(module), name)
  config = {} if dataset.config is None else {"config": dataset.config}
  return builder(data_dir=folder, file_format="array_record", **config)


def _prepare(
  dataset: Dataset, folder: pathlib.Path, final: tfds.core.DatasetBuilder
) -> None:
  originals = folder / "originals"
  with contextlib.ExitStack() as stack:
    try:
      originals.mkdir(parents=True, exist_ok=True)
      work = stack.enter_context(_working(folder))
    except OSError as error:
      raise RuntimeError(
        f"The data folder {folder} cannot be written to: {error}. Give another"
        " one with --data-dir."
      ) from error
    for file, url in dataset.originals:
      _fetch(dataset, url, originals / file)
      _unzip(originals / file, work / "extracted" / f"ZIP.{file}")
    _generate(dataset, work, originals)
    source = work / pathlib.Path(final.data_dir).relative_to(folder)
    target = pathlib.Path(final.data_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
      source.rename(target)
    except OSError:
      if not target.exists():  # if it exists, another process was first
        raise


@contextlib.contextmanager
def _working(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a new working folder; removes those of killed processes first."""
  for left in folder.glob(f"{_WORK}*"):
    with contextlib.suppress(OSError), locks.taken(left / locks.FILE) as mine:
      if mine:
        shutil.rmtree(left)
  with contextlib.ExitStack() as stack:
    while True:
      work = pathlib.Path(tempfile.mkdtemp(prefix=_WORK, dir=folder))
      stack.callback(shutil.rmtree, work, ignore_errors=True)
      # Another process may hold the lock while it looks for old folders.
      if stack.enter_context(locks.taken(work / locks.FILE)):
        break
    yield work


def _generate(
  dataset: Dataset, work: pathlib.Path, originals: pathlib.Path
) -> None:
  config = tfds.download.DownloadConfig(
    manual_dir=originals,
    extract_dir=work / "extracted",
    try_download_gcs=False,
  )
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints
      _builder(dataset, work).download_and_prepare(
        download_dir=work / "downloads", download_config=config
      )
  except Exception as error:
    names = ", ".join(str(originals / file) for file, _ in dataset.originals)
    source = names or "the file that comes with this repository"
    hint = "\nA file that is deleted is downloaded again." if names else ""
    raise RuntimeError(
      f"{dataset.name} cannot be prepared from {source}: {error}{hint}"
    ) from error


def _fetch(dataset: Dataset, url: str, path: pathlib.Path) -> None:
  if path.exists():
    return
  try:
    with (
      urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response,
      files.replacing(path) as partial,
      partial.open("wb") as file,
    ):
      shutil.copyfileobj(response, file)
  except (OSError, http.client.HTTPException) as error:
    raise RuntimeError(
      f"{dataset.name} needs {path.name}, and downloading {url} failed:"
      f" {error}. Get the file by other means and put it at {path}, or name a"
      " folder that has it in `originals` with --data-dir."
    ) from error


def _unzip(path: pathlib.Path, folder: pathlib.Path) -> None:
  if path.suffix != ".zip":
    return
  try:
    with zipfile.ZipFile(path) as archive:
      _check_zip(path, archive)
      archive.extractall(folder)
  # The other three types are for files inside the zip: damaged ones, and those
  # with an unknown compression.
  except (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
  ) as error:
    raise RuntimeError(
      f"{path} is not a zip file: {error}. Delete it to have it downloaded"
      " again, or put the right one there."
    ) from error


def _check_zip(path: pathlib.Path, archive: zipfile.ZipFile) -> None:
  """Refuses an unsafe zip before it is unpacked.

  Raises:
    RuntimeError: if an entry leads out of the folder, is encrypted, or is
      neither a file nor a folder.
    UsageError: if the unpacked files are far larger than the zip.
  """
  for info in archive.infolist():
    name = pathlib.PurePosixPath(info.filename.replace("\\", "/"))
    kind = stat.S_IFMT(info.external_attr >> 16)
    if name.is_absolute() or ".." in name.parts:
      fault = "leads out of the folder that it is unpacked to"
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
      fault = "is neither a file nor a folder"
    elif info.flag_bits & 1:
      fault = "is encrypted"
    else:
      continue
    raise RuntimeError(
      f"{path} is refused: {info.filename!r:.200} in it {fault}. Delete it to"
      " have it downloaded again, or put the right one there."
    )
  whole = sum(info.file_size for info in archive.infolist())
  bounds.check(path, whole)
