"""Classification by words: a prompt, and one word for each label."""

from collections.abc import Sequence
import itertools

import numpy as np
import tokenizers

from ..models.family import Pretrained
from ..models.io import tokenizer as tokenizer_
from .task import Task, Text

_RESULT = "\nresult:"


def encode(
  tokenizer: tokenizers.Tokenizer,
  task: Task,
  texts: Sequence[Text],
  max_length: int,
) -> list[tuple[list[int], list[int]]]:
  """Returns the token ids of each text's prompt, unpadded.

  A prompt has the task's instruction, the text or texts, and `result:`, each on
  its own line (if the tokenizer keeps lines). A model answers with the word of
  a label (see `answers`). With its first two arguments bound, this function is
  the `encode` of `pipeline.tokenize`.

  Args:
    tokenizer: adds its special tokens to each prompt.
    task: the task of the texts.
    texts: texts, or pairs of texts.
    max_length: the most tokens of a prompt. Texts are cut at their end, and
      the longer text of a pair is cut first. The instruction and `result:` are
      never cut.

  Returns:
    (ids, type_ids) of each prompt, two lists of one length; all types are 0.

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


def prompt(task: Task, text: Text) -> str:
  """Returns the prompt that `encode` encodes, as one text."""
  return "".join([f"{task.instruction}\n", *_lines(text), _RESULT])


def answers(
  pretrained: Pretrained, task: Task
) -> int | tuple[tuple[int, ...], ...]:
  """Returns what `pretrained.classifier` takes for the labels of a task.

  Returns:
    the number of outputs of a new head, or the tokens of each label's word.

  Raises:
    ValueError: if the model answers in words, and two words are too similar.
  """
  if pretrained.family.has_new_head:
    return task.outputs
  return pretrained.label_tokens(task.answers, after=_RESULT)


def _lines(text: Text) -> list[str]:
  return [text] if isinstance(text, str) else [text[0], f"\n{text[1]}"]


def _pieces(
  tokenizer: tokenizers.Tokenizer, texts: list[str]
) -> list[tokenizers.Encoding]:
  with tokenizer_.refusing():
    return tokenizer.encode_batch(texts, add_special_tokens=False)
