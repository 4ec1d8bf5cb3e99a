"""Classification in words: a prompt, and a word for each label."""

from collections.abc import Sequence
import itertools

import numpy as np
import tokenizers

from . import chat
from .task import Task, Text

_RESULT = "\nresult:"


def encode(
  tokenizer: tokenizers.Tokenizer,
  task: Task,
  texts: Sequence[Text],
  max_length: int,
) -> list[tuple[list[int], list[int]]]:
  """Returns the token ids of each text's prompt, unpadded.

  A prompt is the task's instruction, the text or the texts, and `result:`, each
  on a line of its own (where the tokenizer has lines, as T5's has not). A
  decoder's next token is its answer (`label_ids`), a T5's are a word
  (`words`). With its first two arguments bound, this is what
  `pipeline.tokenize` takes.

  Args:
    tokenizer: adds what it begins a text with, and at the end nothing, or for a
      T5 what ends a text.
    task: of the texts.
    texts: texts, or pairs of texts.
    max_length: tokens a prompt may take. A text loses its end, of a pair the
      longer one first; the instruction and `result:` are never cut.

  Returns:
    (ids, type_ids) of each prompt, two lists of one length; the types are 0.

  Raises:
    ValueError: if `max_length` leaves no room for the texts.
  """
  head, tail = _pieces(tokenizer, [f"{task.instruction}\n", _RESULT])
  around = len(head) + len(tail) + tokenizer.num_special_tokens_to_add(False)
  if max_length <= around:
    raise ValueError(
      f"max_length must exceed the {around} tokens of a prompt of {task.name}"
      f" without its texts; got {max_length}."
    )
  rows = [_lines(text) for text in texts]
  pieces = iter(_pieces(tokenizer, list(itertools.chain(*rows))))
  found = []
  for row in rows:
    parts = list(itertools.islice(pieces, len(row)))
    lengths = [len(part) for part in parts]
    while sum(lengths) > max_length - around:
      lengths[np.argmax(lengths)] -= 1
    for part, length in zip(parts, lengths):
      part.truncate(length)
    whole = tokenizers.Encoding.merge([head, *parts, tail])
    ids = tokenizer.post_process(whole).ids
    found.append((ids, [0] * len(ids)))
  return found


def label_ids(tokenizer: tokenizers.Tokenizer, task: Task) -> list[int]:
  """Returns the token that begins each label's word after `result:`.

  Raises:
    ValueError: if two words begin with the same token.
  """
  by_token: dict[int, str] = {}
  for word in task.answers:
    first = chat.continuation(tokenizer, _RESULT, f" {word}")[0]
    if first in by_token:
      raise ValueError(
        f"The labels {by_token[first]!r} and {word!r} of {task.name} begin with"
        f" the same token, {tokenizer.id_to_token(first)!r}; a decoder can tell"
        " labels apart by their first tokens only. Other names for the labels,"
        " or a --model that is an encoder, can do without."
      )
    by_token[first] = word
  return list(by_token)


def words(
  tokenizer: tokenizers.Tokenizer, task: Task, eos_id: int
) -> list[tuple[int, ...]]:
  """Returns the tokens of each label's word, as a text of its own, and the end.

  Args:
    tokenizer: of a T5.
    task: whose words they are.
    eos_id: the token that ends a text.

  Raises:
    ValueError: if two words have the same tokens, or one has none.
  """
  by_tokens: dict[tuple[int, ...], str] = {}
  for word in task.answers:
    ids = tokenizer.encode(word, add_special_tokens=False).ids
    if not ids:
      raise ValueError(
        f"The label {word!r} of {task.name} has no tokens in this vocabulary."
      )
    tokens = (*ids, eos_id)
    if tokens in by_tokens:
      raise ValueError(
        f"The labels {by_tokens[tokens]!r} and {word!r} of {task.name} have the"
        f" same tokens, {tokenizer.encode(word).tokens}; they cannot be told"
        " apart."
      )
    by_tokens[tokens] = word
  return list(by_tokens)


def _lines(text: Text) -> list[str]:
  return [text] if isinstance(text, str) else [text[0], f"\n{text[1]}"]


def _pieces(
  tokenizer: tokenizers.Tokenizer, texts: list[str]
) -> list[tokenizers.Encoding]:
  return tokenizer.encode_batch(texts, add_special_tokens=False)
