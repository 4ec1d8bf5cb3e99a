"""Loads a tokenizer.json, and encodes texts and pairs of texts."""

import collections.abc
import contextlib
import os
import pathlib

import tokenizers

from ... import checked
from . import weights

FILE = "tokenizer.json"
# Eight times the size of the largest published file.
_MOST = 2**28
_PAD_TOKENS = ("[PAD]", "<pad>")


def load_tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """Returns the tokenizer of a model folder, without truncation and padding.

  Many published files have both; MiniLM's pads every text to 128 tokens. In
  this program, `encode` truncates and `data.pipeline` pads.

  Raises:
    WeightsError: tokenizer.json is missing or cannot be read.
  """
  path = pathlib.Path(folder) / FILE
  if not checked.is_file(path):
    raise weights.WeightsError(f"{path.parent} has no {FILE}.")
  if path.stat().st_size > _MOST:
    raise weights.WeightsError(
      f"{path} has {path.stat().st_size:,} bytes; at most {_MOST:,} are read."
    )
  with weights.told_of(f"{path} is not a tokenizer that `tokenizers` can read"):
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def refusing(
  whose: str | os.PathLike[str] = "the model",
) -> contextlib.AbstractContextManager[None]:
  """Returns a context that turns a tokenizer's failures into a WeightsError.

  `tokenizers` raises a bare Exception if a vocabulary has no token for unknown
  text. If a pattern backtracks too often, Rust panics after ten million steps;
  see `weights.told_of`.
  """
  return weights.told_of(
    f"The tokenizer of {os.fspath(whose)} cannot read a text"
  )


def encode(
  tokenizer: tokenizers.Tokenizer,
  texts: collections.abc.Sequence[str | tuple[str, str]],
  max_length: int,
) -> list[tuple[list[int], list[int]]]:
  """Returns the token ids and segment ids of each text, unpadded.

  Args:
    tokenizer: from `load_tokenizer`; it is not changed.
    texts: texts, or pairs of texts.
    max_length: the most tokens of a text, with special tokens. In a pair, the
      longer text is cut first.

  Returns:
    (ids, type_ids) of each text, two lists of one length in
    [special tokens, max_length].

  Raises:
    ValueError: max_length leaves no room beside the special tokens, or a text
      is neither a string nor a pair of strings.
  """
  for i, text in enumerate(texts):
    if not _is_text(text):
      raise ValueError(f"Text {i} must be a string or a pair, got {text!r}.")
  pairs = any(isinstance(text, tuple) for text in texts)
  special = tokenizer.num_special_tokens_to_add(pairs)
  # The library does not truncate if only the special tokens fit.
  if max_length <= special:
    raise ValueError(
      f"max_length must exceed the {special} special tokens of a "
      f"{'pair' if pairs else 'text'}, got {max_length}."
    )
  tokenizer.enable_truncation(max_length, strategy="longest_first")
  try:
    with refusing():
      encoded = tokenizer.encode_batch(list(texts))
  finally:
    tokenizer.no_truncation()
  return [(item.ids, item.type_ids) for item in encoded]


def continuation(
  tokenizer: tokenizers.Tokenizer, text: str, more: str
) -> list[int]:
  """Returns the token ids of `more` when it follows `text`.

  Some tokenizers add a space to the start of every text, so `more` is tokenized
  together with `text`. Only if a token crosses the boundary between the two,
  `more` is tokenized by itself.
  """

  def ids(text: str) -> list[int]:
    with refusing():
      return tokenizer.encode(text, add_special_tokens=False).ids

  before, whole = ids(text), ids(text + more)
  if whole[: len(before)] == before:
    return whole[len(before) :]
  return ids(more)


def pad_id(tokenizer: tokenizers.Tokenizer) -> int:
  """Returns the id of the padding token, '[PAD]' or '<pad>'.

  Raises:
    WeightsError: the vocabulary has neither.
  """
  for token in _PAD_TOKENS:
    found = tokenizer.token_to_id(token)
    if found is not None:
      return found
  raise weights.WeightsError(
    f"The tokenizer has no padding token; looked for {', '.join(_PAD_TOKENS)}."
  )


def _is_text(text: object) -> bool:
  if isinstance(text, tuple):
    return len(text) == 2 and all(isinstance(part, str) for part in text)
  return isinstance(text, str)
