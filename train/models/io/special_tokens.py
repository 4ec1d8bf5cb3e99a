"""Finds the tokens that begin and end texts in the files of a model folder."""

import pathlib
from typing import Any

from ... import checked

# The first file that names a token decides. The second is in older folders.
_TEXTS = ("tokenizer_config.json", "special_tokens_map.json")
_IDS = ("generation_config.json", "config.json")


def text(folder: pathlib.Path, name: str) -> str:
  """Returns the text of a special token; empty if no file names it.

  Args:
    folder: the model's folder.
    name: `bos_token` or `eos_token`.

  Raises:
    UsageError: a file is not a JSON object, or has an invalid token.
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
  """Returns the ids of the tokens that end texts and turns, in files' order.

  `token_ids.check_folder` must check the files before.

  Args:
    folder: the model's folder.

  Returns:
    the ids in generation_config.json, then those in config.json. Llama 3 has
    three of them, which end texts, turns and messages.
  """
  found: list[Any] = []
  for file in _IDS:
    path = folder / file
    if checked.is_file(path):
      named = checked.read_json(path).get("eos_token_id")
      found += named if isinstance(named, list) else [named]
  return tuple(dict.fromkeys(x for x in found if x is not None))
