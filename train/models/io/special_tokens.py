"""The tokens that begin and end texts: from every file that may name them."""

import pathlib
from typing import Any

from ... import checked

# The first that names one is believed; the second is of older folders.
_TEXTS = ("tokenizer_config.json", "special_tokens_map.json")
_IDS = ("generation_config.json", "config.json")


def text(folder: pathlib.Path, name: str) -> str:
  """The text of a special token; empty if the tokenizer's files name none.

  Args:
    folder: of a model.
    name: `bos_token` or `eos_token`.

  Raises:
    UsageError: a file is no JSON object, or has something else for a token.
  """
  for file in _TEXTS:
    path = folder / file
    if not checked.is_file(path):
      continue
    token = checked.field(
      str(path), checked.read_json(path), name, str | dict | None, None
    )
    if isinstance(token, dict):
      token = checked.field(f"{path}, {name},", token, "content", str)
    if token:
      return token
  return ""


def end_ids(folder: pathlib.Path) -> tuple[int, ...]:
  """The ids that a model's files say texts and turns end with, in their order.

  `token_ids.check_folder` has looked at them before.

  Args:
    folder: of a model.

  Returns:
    those of generation_config.json, then those of config.json; of Llama 3,
    which ends texts, turns and messages with three tokens, all of them.
  """
  found: list[Any] = []
  for file in _IDS:
    path = folder / file
    if checked.is_file(path):
      named = checked.read_json(path).get("eos_token_id")
      found += named if isinstance(named, list) else [named]
  return tuple(dict.fromkeys(x for x in found if x is not None))
