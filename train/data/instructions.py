"""Instructions and their responses, read as conversations: JSONL or TFDS."""

from collections.abc import Iterable, Iterator, Mapping
import gzip
import json
import os
import pathlib
from typing import Any
import zlib

from ..models.io.template import Conversation, Message
from . import hashing

SPLITS = ("train", "validation", "test")
TFDS = "tfds:"
"""What the source of a TFDS dataset begins with, before the dataset's name."""

# (what is asked, further text of the question or None, what is answered).
_FORMS = (
  ("prompt", None, "response"),
  ("query", None, "response"),
  ("query", None, "answer"),
  ("question", None, "answer"),
  ("instruction", "input", "output"),
  ("instruction", "context", "response"),
)
_ALLOWED = (
  "a row is an object with the key messages, or prompt and response, or query"
  " and response or answer, or question and answer, or instruction, output and"
  " perhaps input, or instruction, response and perhaps context"
)
_ALLOWED_ROLES = (
  "allowed are one system message or none, then user and assistant in turns,"
  " the assistant last"
)
_JSON_NAMES = {
  type(None): "null",
  bool: "a truth value",
  int: "a number",
  float: "a number",
  str: "a string",
  list: "a list",
  dict: "an object",
}


def load(
  source: str | os.PathLike[str],
  split: str,
  *,
  held_out: float = 0.02,
  limit: int | None = None,
  seed: int = 0,
  data_dir: str | os.PathLike[str] | None = None,
) -> list[Conversation]:
  """Returns the conversations of a split, in memory, in a fixed order.

  A row is one of
    {"messages": [{"role": ..., "content": ...}, ...]},
    {"prompt": ..., "response": ...},
    {"query": ..., "response": ...} (MetaMathQA; or `answer`, Code-Feedback),
    {"question": ..., "answer": ...} (GSM8K),
    {"instruction": ..., "input": ..., "output": ...} (Alpaca),
    {"instruction": ..., "context": ..., "response": ...} (Dolly),
  where `input` and `context` may be missing or empty, and other keys are left
  alone. Which split it is in depends on its text alone, and two rows that
  differ only in case, punctuation or white space are in the same.

  Args:
    source: a file of one JSON object a line, `.jsonl` or `.jsonl.gz`, or
      `tfds:` and the name of a TFDS dataset that is prepared in `data_dir` in
      the ArrayRecord format; its stored split `train` is read.
    split: `train`, `validation` or `test`.
    held_out: the share of the rows in `validation`, and in `test`.
    limit: take this many rows only, chosen by `seed` alone; for one seed, a
      smaller choice is part of each larger one.
    seed: any integer.
    data_dir: the folder of prepared datasets; the user's cache if None.

  Raises:
    ValueError: if an argument or a row is not as it must be (the sentence names
      the file and the line), or the split has no rows, or fewer than `limit`.
    RuntimeError: if the file or the dataset cannot be read.
  """
  if split not in SPLITS:
    raise ValueError(
      f"There is no split {split!r}; the splits are {', '.join(SPLITS)}."
    )
  if not 0 <= held_out <= 0.5:
    raise ValueError(f"held_out must be from 0 to 0.5; got {held_out}.")
  if limit is not None and limit <= 0:
    raise ValueError(f"limit must be at least 1; got {limit}.")
  name = os.fspath(source)
  found = []
  for i, (_, conversation) in enumerate(read(source, data_dir)):
    if _split(conversation, held_out) == split:
      found.append((i, conversation))
  if len(found) < (limit or 1):
    wanted = "at least one is needed" if limit is None else f"limit is {limit}"
    raise ValueError(
      f"{name} has {len(found)} rows in {split} at held_out {held_out}, but"
      f" {wanted}."
    )
  if limit is not None:
    found.sort(key=lambda item: hashing.digest(f"{seed} {item[0]}"))
  return [conversation for _, conversation in found[:limit]]


def read(
  source: str | os.PathLike[str],
  data_dir: str | os.PathLike[str] | None = None,
) -> Iterator[tuple[str, Conversation]]:
  """Yields where each row is, in words, and its conversation; see `load`."""
  name = os.fspath(source)
  if name.startswith(TFDS):
    rows = _stored(name.removeprefix(TFDS), data_dir)
  else:
    rows = _lines(pathlib.Path(name).expanduser())
  for where, row in rows:
    yield where, _conversation(row, where)


def _lines(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Yields each line's place and value; a line is in memory at a time."""
  if not path.name.endswith((".jsonl", ".jsonl.gz")):
    raise ValueError(
      f"The source of instructions must be a .jsonl or .jsonl.gz file, or"
      f" {TFDS}NAME; got {path}."
    )
  opener = gzip.open if path.suffix == ".gz" else open
  try:
    with opener(path, "rb") as file:
      for number, line in enumerate(file, 1):
        where = f"{path}, line {number}"
        if line.strip():
          yield where, _parse(line, where)
  except (OSError, EOFError, zlib.error) as error:
    raise RuntimeError(f"{path} cannot be read: {error}.") from error


def _parse(line: bytes, where: str) -> Any:
  try:
    return json.loads(line.decode())
  except (ValueError, RecursionError) as error:  # not UTF-8: a ValueError, too
    raise ValueError(
      f"{where} is not JSON in UTF-8 ({error}); {_ALLOWED}."
    ) from error


def _stored(
  name: str, data_dir: str | os.PathLike[str] | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Yields each row's place and value of a prepared TFDS dataset."""
  import tensorflow_datasets as tfds

  from . import prepare

  folder = pathlib.Path(data_dir or prepare.default_data_dir()).expanduser()
  try:
    builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    # TFDS's logging decorator hides the signature from pyright.
    rows = builder.as_data_source("train")  # pyright: ignore[reportCallIssue]
  except Exception as error:  # TFDS raises many types
    first_line = str(error).partition("\n")[0]
    raise RuntimeError(
      f"The TFDS dataset {name!r} cannot be read from {folder}: {first_line}"
      f" Prepare it with tensorflow_datasets.builder({name!r},"
      f" data_dir={str(folder)!r}, file_format='array_record')"
      ".download_and_prepare(), or give a .jsonl file."
    ) from error
  for i in range(len(rows)):
    where = f"{TFDS}{name}, row {i}"
    yield where, {key: _text(value) for key, value in rows[i].items()}


def _text(value: Any) -> Any:
  return value.decode() if isinstance(value, bytes) else value


def _conversation(row: Any, where: str) -> Conversation:
  """Reads a row in any of its forms, or says what is wrong with it."""
  if not isinstance(row, Mapping):
    raise ValueError(f"{where} is {_kind(row)}; {_ALLOWED}.")
  if "messages" in row:
    return _messages(row["messages"], where)
  for question, more, answer in _FORMS:
    if question in row and answer in row:
      asked = _string(row[question], question, where)
      if more and str(row.get(more) or "").strip():
        asked += "\n\n" + _string(row[more], more, where)
      answered = _string(row[answer], answer, where)
      return Message("user", asked), Message("assistant", answered)
  keys = ", ".join(map(str, row)) or "none"
  raise ValueError(f"{where} has the keys {keys}; {_ALLOWED}.")


def _messages(value: Any, where: str) -> Conversation:
  if not isinstance(value, list) or not all(
    isinstance(item, Mapping) and {"role", "content"} <= item.keys()
    for item in value
  ):
    raise ValueError(
      f"{where}: messages must be a list of objects with the keys role and"
      f" content; got {_short(value)}."
    )
  roles = [item["role"] for item in value]
  if "assistant" not in roles:
    raise ValueError(
      f"{where} has no assistant message, so there is nothing to learn; its"
      f" roles are {_short(roles)}; {_ALLOWED_ROLES}."
    )
  turns = roles[1:] if roles[0] == "system" else roles
  if len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
    raise ValueError(
      f"{where} has the roles {_short(roles)}; {_ALLOWED_ROLES}."
    )
  return tuple(
    Message(role, _string(item["content"], f"the {role}'s content", where))
    for role, item in zip(roles, value)
  )


def _string(value: Any, name: str, where: str) -> str:
  if not isinstance(value, str):
    raise ValueError(f"{where}: {name} must be a string; got {_kind(value)}.")
  if not value.strip():
    raise ValueError(
      f"{where}: {name} is empty; it must have at least one character that is"
      " not white space."
    )
  try:
    value.encode()
  except UnicodeEncodeError as error:  # JSON can spell half a character
    raise ValueError(
      f"{where}: {name} must be valid Unicode; got {error}."
    ) from error
  return value


def _split(conversation: Iterable[Message], held_out: float) -> str:
  text = "\n".join(
    hashing.normalise(message.content) for message in conversation
  )
  share = hashing.share(text)
  if share < held_out:
    return "test"
  return "validation" if share < 2 * held_out else "train"


def _kind(value: Any) -> str:
  return _JSON_NAMES.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 100 else f"{text[:100]}..."
