"""Classification in words: a prompt, and a word for each label."""

from collections.abc import Sequence
import itertools
from typing import NamedTuple

import numpy as np
import tokenizers

from ..models.family import Pretrained
from .images import ImageTask
from .task import Task, Text

_RESULT = "\nresult:"


class Prompt(NamedTuple):
  """How a task is put to a model that answers in words.

  Attributes:
    instruction: what is asked of the texts that follow.
    words: what each label is called, in order; the task's names if None.
  """

  instruction: str
  words: tuple[str, ...] | None = None


_SENTIMENT = Prompt("classify the sentiment of the text:")
_ENTAILMENT = "does the first text entail the second?"
_PROMPTS = {
  "snippets": _SENTIMENT,
  "glue/sst2": _SENTIMENT,
  "glue/cola": Prompt("classify the grammaticality of the text:"),
  "glue/mrpc": Prompt(
    "classify the semantic similarity of the two texts:",
    ("different", "equivalent"),
  ),
  "glue/qnli": Prompt("does the text entail the answer to the question?"),
  "glue/mnli": Prompt("classify the relation of the two texts:"),
  "glue/rte": Prompt(_ENTAILMENT),
  "super_glue/boolq": Prompt("answer the question from the passage:"),
  "super_glue/cb": Prompt("classify the relation of the two texts:"),
  "super_glue/copa": Prompt(
    "choose the more plausible of the two:", ("first", "second")
  ),
  "super_glue/wic": Prompt(
    "does the word have the same meaning in both texts?"
  ),
}


def prompt(task: Task) -> Prompt:
  """Returns how a task is put to a model that answers in words.

  Raises:
    ValueError: if there is no prompt for the task.
  """
  if task.name not in _PROMPTS:
    raise ValueError(
      f"There is no prompt for the task {task.name!r}; there are prompts for"
      f" {', '.join(_PROMPTS)}."
    )
  found = _PROMPTS[task.name]
  return found._replace(words=found.words or task.labels)


def encode(
  tokenizer: tokenizers.Tokenizer,
  task: Task,
  texts: Sequence[Text],
  max_length: int,
) -> list[tuple[list[int], list[int]]]:
  """Returns the token ids of each text's prompt, unpadded.

  A prompt is the task's instruction, the text or the texts, and `result:`, each
  on a line of its own (where the tokenizer has lines). A model answers by a
  word for each label (`answers`). With its first two arguments bound, this is
  what `pipeline.tokenize` takes.

  Args:
    tokenizer: adds what it begins a text with, and what ends a text that is not
      gone on with.
    task: of the texts.
    texts: texts, or pairs of texts.
    max_length: tokens a prompt may take. A text loses its end, of a pair the
      longer one first; the instruction and `result:` are never cut.

  Returns:
    (ids, type_ids) of each prompt, two lists of one length; the types are 0.

  Raises:
    ValueError: if `max_length` leaves no room for the texts, or there is no
      prompt for the task.
  """
  head, tail = _pieces(tokenizer, [f"{prompt(task).instruction}\n", _RESULT])
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


def answers(
  pretrained: Pretrained, task: Task | ImageTask
) -> int | tuple[tuple[int, ...], ...]:
  """Returns what `pretrained.classifier` takes for the labels of a task.

  Raises:
    ValueError: if the model answers in words, and there is no prompt for the
      task, or two words cannot be told apart.
  """
  if pretrained.family.has_new_head:
    return len(task.labels)
  assert isinstance(task, Task)
  words = prompt(task).words
  assert words is not None
  return pretrained.label_tokens(words, after=_RESULT)


def _lines(text: Text) -> list[str]:
  return [text] if isinstance(text, str) else [text[0], f"\n{text[1]}"]


def _pieces(
  tokenizer: tokenizers.Tokenizer, texts: list[str]
) -> list[tokenizers.Encoding]:
  return tokenizer.encode_batch(texts, add_special_tokens=False)
