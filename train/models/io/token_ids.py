"""Refuses token ids for which the embedding has no row.

JAX does not refuse them. It reads NaN, and a run would learn nothing.
"""

from collections.abc import Mapping
import pathlib
from typing import Any

import tokenizers

from . import tokenizer as tokenizer_
from . import weights

_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
_END = "_token_id"
# Some old files have this value if the model has no padding token.
_NO_PAD = -1


def check(
  tokenizer: tokenizers.Tokenizer,
  rows: int,
  segments: int | None,
  path: pathlib.Path,
) -> None:
  """Refuses a tokenizer that gives ids beyond an embedding's rows.

  The embedding may have more rows than the tokenizer has ids, because many
  embeddings are padded.

  Args:
    tokenizer: the tokenizer; its vocabulary, added tokens and post-processor
      are checked.
    rows: the rows of the embedding.
    segments: the rows of the embedding of segments; None if there is none.
    path: the path of the model.

  Raises:
    WeightsError: if an id is too large; the message names the token.
  """
  size = tokenizer.get_vocab_size()
  if size > rows:
    raise weights.WeightsError(
      f"The tokenizer of {path} has {size} tokens and the model's vocab_size "
      f"is {rows}; they belong to different models."
    )
  for token, number in tokenizer.get_vocab().items():
    if number >= rows:
      raise weights.WeightsError(
        f"The tokenizer of {path} gives {token!r:.100} the id {number}, and "
        f"the model's vocab_size is {rows}: ids are below it."
      )
  # The post-processor adds tokens to all texts, and these may be missing from
  # the vocabulary. To see the segments, texts must not be empty.
  text = "" if segments is None else "a"
  for pair in (None, text):
    with tokenizer_.refusing(path):
      added = tokenizer.encode(text, pair)
    for found, limit, what, size_name in (
      (added.ids, rows, "id", "vocab_size"),
      (added.type_ids, segments, "segment", "type_vocab_size"),
    ):
      if limit is not None and max(found, default=0) >= limit:
        raise weights.WeightsError(
          f"The tokenizer of {path} adds a token with the {what} {max(found)} "
          f"to texts, and the model's {size_name} is {limit}: it must be below."
        )


def check_folder(folder: pathlib.Path, rows: int) -> None:
  """Refuses special tokens beyond an embedding's rows in a folder's JSON files.

  Raises:
    WeightsError: if an id is too large; the message names the file and the
      token.
  """
  for name in _FILES:
    path = folder / name
    if not path.is_file():
      continue
    config = weights.read_json(path)
    check_named(
      {key: x for key, x in config.items() if key.endswith(_END)}, rows, path
    )
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, Mapping):
      raise weights.WeightsError(
        f"{path} has added_tokens_decoder, which is no object of ids."
      )
    check_named(
      {
        f"an id of added_tokens_decoder, {number:.100},": int(number)
        if number.isdecimal() and number.isascii() and len(number) < 20
        else number
        for number in added
      },
      rows,
      path,
    )


def check_named(
  named: Mapping[str, Any], rows: int, path: pathlib.Path
) -> None:
  """Refuses invalid ids of a file.

  Args:
    named: from a name in the file to an id, to a list of ids (as Llama 3's
      `eos_token_id`), or to None.
    rows: the rows of the embedding.
    path: the file.

  Raises:
    WeightsError: if an id is invalid; the message names the first one.
  """
  for name, found in named.items():
    for number in found if isinstance(found, list) else [found]:
      if number is None or (number == _NO_PAD and name == f"pad{_END}"):
        continue
      if type(number) is not int or not 0 <= number < rows:
        raise weights.WeightsError(
          f"{path}: {name} must be a token's id, an integer in [0, {rows}), "
          f"the rows of the embedding; got {number!r:.100}."
        )
