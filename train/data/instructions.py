"""Reads conversations from tables of instructions and responses."""

from collections.abc import Iterator, Mapping, Sequence
import os
from typing import Any

from .. import checked
from ..errors import UsageError
from ..models.io.template import Conversation, Message
from . import divide, hashing, tables

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.02
_FEW_HELD_OUT = 0.1
TEXT = "text"
"""The role of a plain text, whose every token is learned."""

# The columns of (the question, more text of the question or None, the answer).
_FORMS = (
  ("prompt", None, "response"),
  ("prompt", None, "completion"),
  ("query", None, "response"),
  ("query", None, "answer"),
  ("question", None, "answer"),
  ("instruction", "input", "output"),
  ("instruction", "context", "response"),
)
_ALLOWED = (
  "a row must have messages, or conversations, or prompt and response or "
  "completion, or query and response or answer, or question and answer, or "
  "instruction, output and perhaps input, or instruction, response and "
  "perhaps context, or a text alone"
)
_ALLOWED_ROLES = (
  "a conversation may begin with one system message; then user and assistant "
  "must take turns, tool must follow the assistant's tool_calls, and the "
  "assistant must be last"
)
# ShareGPT's names of roles.
_ROLES = {
  "human": "user",
  "gpt": "assistant",
  "chatgpt": "assistant",
  "function_call": "assistant",
  "observation": "tool",
}
_JSON_NAMES = {
  type(None): "null",
  bool: "a truth value",
  int: "a number",
  float: "a number",
  str: "a string",
  list: "a list",
  dict: "an object",
}

Numbered = tuple[int, Conversation]
"""A row's number, by which the row is drawn, and its conversation."""


def load(
  source: str | os.PathLike[str],
  split: str,
  *,
  held_out: float = HELD_OUT,
  limit: int | None = None,
  seed: int = 0,
  data_dir: str | os.PathLike[str] | None = None,
) -> list[Conversation]:
  """Returns the conversations of a split, in memory, in a fixed order.

  A row is one of
    {"messages": [{"role": ..., "content": ...}, ...]},
    {"conversations": [{"from": ..., "value": ...}, ...]} (ShareGPT),
    {"prompt": ..., "response": ...} (or `completion`),
    {"query": ..., "response": ...} (MetaMathQA; or `answer`, Code-Feedback),
    {"question": ..., "answer": ...} (GSM8K),
    {"instruction": ..., "input": ..., "output": ...} (Alpaca),
    {"instruction": ..., "context": ..., "response": ...} (Dolly),
    {"text": ...}, whose every token is learned.
  `input` and `context` may be missing or empty. Other keys are ignored. A
  content may be a list of parts, {"type": "text", "text": ...}.

  A row's split depends only on its text. Two rows that differ only in case,
  punctuation or white space are in the same split.

  Args:
    source: the argument of `tables.read`.
    split: `train`, `validation` or `test`.
    held_out: the share of the rows in `validation`, and in `test`.
    limit: the most rows to return; None: all. `seed` alone decides which rows.
      For one seed, a smaller choice is part of each larger choice.
    seed: any integer.
    data_dir: the folder of prepared datasets; the user's cache if None.

  Raises:
    ValueError: if an argument or a row is invalid, or the split has no rows.
      The message names the file and the line of a row.
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
  rows = list(enumerate(x for _, x in read(source, data_dir)))
  found = _by_hash(rows, dict.fromkeys(SPLITS[1:], held_out))[split]
  if not found:
    raise ValueError(
      f"{os.fspath(source)} has 0 rows in {split} at held_out {held_out}, but"
      " at least one is needed."
    )
  return drawn(found, limit, seed)


def splits(
  source: str,
  *,
  held_out: float = 0.0,
  validation: str = "",
  test: str = "",
  data_dir: str | None = None,
) -> tuple[dict[str, list[Numbered]], list[str]]:
  """Returns the conversations of all splits, and notes for the user.

  Missing splits are held out of `train`. A hash of the text decides whether a
  row is held out. If a split would be empty, because there are few rows,
  `divide.divide` holds rows out instead.

  Args:
    source: the argument of `tables.read`; a TFDS dataset gives its `train`.
    held_out: the share of a missing split; 0: 0.02, or 0.1 if rows are few.
    validation: the path of the validation rows; empty: see above.
    test: the path of the test rows; empty: see above.
    data_dir: the folder of prepared datasets; the user's cache if None.

  Raises:
    ValueError: as `load` does.
    RuntimeError: if a table cannot be read.
  """
  stored = tables.read(source, data_dir)
  if source.startswith(tables.TFDS):
    stored = {"train": stored["train"]}
  for split, path in zip(SPLITS[1:], (validation, test)):
    if path:
      stored[split] = tables.one(path, split, data_dir)
  found = {
    split: list(enumerate(x for _, x in conversations(table)))
    for split, table in stored.items()
  }
  missing = [split for split in SPLITS if split not in found]
  if not missing:
    return found, []
  count = len(found["train"])
  divided = _by_hash(
    found["train"], dict.fromkeys(missing, held_out or HELD_OUT)
  )
  if not all(divided.values()):
    share = held_out or _FEW_HELD_OUT
    parts = divide.divide(
      [_words(conversation) for _, conversation in found["train"]],
      [0] * count,
      dict.fromkeys(missing, share),
      source,
    )
    divided = {
      split: [found["train"][i] for i in part] for split, part in parts.items()
    }
  return found | divided, [divide.note(count, divided, "the text")]


def drawn(
  rows: Sequence[Numbered], limit: int | None, seed: int
) -> list[Conversation]:
  """Returns all conversations, or `limit` of them, drawn by the seed."""
  if limit is not None:
    rows = sorted(rows, key=lambda row: hashing.digest(f"{seed} {row[0]}"))
  return [conversation for _, conversation in rows[:limit]]


def read(
  source: str | os.PathLike[str],
  data_dir: str | os.PathLike[str] | None = None,
) -> Iterator[tuple[str, Conversation]]:
  """Yields the place, in words, and the conversation of each `train` row."""
  yield from conversations(tables.read(source, data_dir)["train"])


def conversations(table: tables.Table) -> Iterator[tuple[str, Conversation]]:
  """Yields the place, in words, and the conversation of each row of a table.

  Raises:
    UsageError: if a row is invalid.
  """
  for i, row in enumerate(table.rows):
    where = table.where(i)
    yield where, conversation(row, where)


def _by_hash(
  rows: Sequence[Numbered], shares: Mapping[str, float]
) -> dict[str, list[Numbered]]:
  """Divides rows by the hash of their text.

  The rows with the smallest hashes are `test`, the next ones are `validation`,
  and the others are `train`.
  """
  found: dict[str, list[Numbered]] = {"train": []} | {x: [] for x in shares}
  for row in rows:
    place, end, chosen = hashing.share(_words(row[1])), 0.0, "train"
    for split in reversed(list(shares)):
      end += shares[split]
      if place < end:
        chosen = split
        break
    found[chosen].append(row)
  return found


def _words(conversation: Conversation) -> str:
  return hashing.joined(message.content for message in conversation)


def conversation(row: Any, where: str) -> Conversation:
  """Returns the conversation of a row in any of the forms of `load`.

  Raises:
    UsageError: if the row is invalid; the message has its place, `where`.
  """
  if not isinstance(row, Mapping):
    raise UsageError(f"{where} is {_kind(row)}; {_ALLOWED}.")
  for key in ("messages", "conversations"):
    if row.get(key) is not None:
      return _messages(_listed(row[key], f"{where}: {key}"), key, where)
  for question, more, answer in _FORMS:
    asked, answered = row.get(question), row.get(answer)
    if question not in row or answer not in row:
      continue
    if isinstance(asked, list) and isinstance(answered, list):
      return _messages(asked + answered, f"{question} and {answer}", where)
    asked = _string(asked, question, where)
    if more and str(row.get(more) or "").strip():
      asked += "\n\n" + _string(row[more], more, where)
    answered = _string(answered, answer, where)
    return Message("user", asked), Message("assistant", answered)
  if TEXT in row:
    return (Message(TEXT, _string(row[TEXT], TEXT, where)),)
  keys = tables.shown(list(row)) or "none"
  raise UsageError(f"{where} has the keys {keys}; {_ALLOWED}.")


def _listed(value: Any, where: str) -> Any:
  """Returns a list; a CSV file stores it as the text of a JSON list."""
  if isinstance(value, str) and value.lstrip().startswith("["):
    return checked.parse_json(value, where)
  return value


def _messages(value: Any, key: str, where: str) -> Conversation:
  if not isinstance(value, list) or not all(map(_is_message, value)):
    raise UsageError(
      f"{where}: {key} must be a list of objects with the keys role and content"
      f" (or from and value); got {_short(value)}."
    )
  said: list[Any] = [
    item if "role" in item else {"role": item["from"], "content": item["value"]}
    for item in value
  ]
  roles = [_ROLES.get(str(x["role"]), str(x["role"])) for x in said]
  if "assistant" not in roles:
    raise UsageError(
      f"{where} has no assistant message, so there is nothing to learn; its"
      f" roles are {_short(roles)}; {_ALLOWED_ROLES}."
    )
  found = tuple(_message(role, item, where) for role, item in zip(roles, said))
  before = "start"
  for message in found[1:] if roles[0] == "system" else found:
    if before not in _AFTER.get(message.role, ()):
      break
    before = "calls" if "tool_calls" in dict(message.more) else message.role
  else:
    if roles[-1] == "assistant":
      return found
  raise UsageError(f"{where} has the roles {_short(roles)}; {_ALLOWED_ROLES}.")


# The states that may come before each role.
_AFTER = {
  "user": ("start", "assistant"),
  "assistant": ("user", "tool"),
  "tool": ("calls", "tool"),
}
# The keys of a message that templates use, besides its role and content.
_MORE = ("tool_calls", "tool_call_id", "name")


def _is_message(item: Any) -> bool:
  if not isinstance(item, Mapping):
    return False
  if not isinstance(item.get("role", item.get("from")), str):
    return False
  if "role" in item:
    return "content" in item or bool(item.get("tool_calls"))
  return {"from", "value"} <= item.keys()


def _message(role: str, item: Mapping[str, Any], where: str) -> Message:
  more = tuple(
    (name, item[name])
    for name in _MORE
    if item.get(name) and (role == "tool" or name == "tool_calls")
  )
  content = item.get("content")
  if isinstance(content, list):
    content = _parts(content, role, where)
  if more and role == "assistant" and not content:
    return Message(role, "", more)
  name = f"the {role}'s content"
  return Message(role, _string(content, name, where), more)


def _parts(parts: list[Any], role: str, where: str) -> str:
  """Returns the text of a content that is a list of parts."""
  for part in parts:
    kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
    if kind != "text" or not isinstance(part.get("text"), str):
      raise UsageError(
        f"{where}: the {role}'s content has a part of the type {kind!r}; a part"
        ' must be {"type": "text", "text": ...}.'
      )
  return "".join(part["text"] for part in parts)


def _string(value: Any, name: str, where: str) -> str:
  if not isinstance(value, str):
    raise UsageError(f"{where}: {name} must be a string; got {_kind(value)}.")
  if not value.strip():
    raise UsageError(
      f"{where}: {name} is empty; it must have at least one character that is"
      " not white space."
    )
  try:
    value.encode()
  except UnicodeEncodeError as error:  # JSON can spell half a character
    raise UsageError(
      f"{where}: {name} must be valid Unicode; got {error}."
    ) from error
  return value


def _kind(value: Any) -> str:
  return _JSON_NAMES.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 100 else f"{text[:100]}..."
