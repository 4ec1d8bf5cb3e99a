"""Conversations to tokens, with a mask of the tokens that are learned."""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import itertools
from typing import Any

import numpy as np
import tokenizers

from ..models.io import tokenizer as tokenizer_
from ..models.io.template import Conversation, Template
from .instructions import TEXT
from .options import OnLong

_AT_ONCE = 64
"""How many conversations are rendered together."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
  """Tokenized conversations, joined end to end.

  Attributes:
    tokens: [total] int32, the token ids of all sequences.
    loss: [total] bool, whether a token is to be learned.
    offsets: [sequences + 1] int64; sequence i is
      `tokens[offsets[i]:offsets[i + 1]]`.
    skipped: how many conversations were left out because of their length.
  """

  tokens: np.ndarray
  loss: np.ndarray
  offsets: np.ndarray
  skipped: int = 0

  def __len__(self) -> int:
    return len(self.offsets) - 1

  @property
  def lengths(self) -> np.ndarray:
    """The number of tokens of each sequence, [sequences] int64."""
    return np.diff(self.offsets)


def tokenize(
  conversations: Iterable[Conversation],
  tokenizer: tokenizers.Tokenizer,
  template: Template,
  max_length: int,
  *,
  eos: int | None = None,
  on_long: OnLong = "cut",
) -> Sequences:
  """Tokenizes all conversations once, each as `encode` does.

  Raises:
    ValueError: as `encode` does, or if all conversations are left out.
  """
  tokens, loss, lengths, skipped = [], [], [], 0
  rest = iter(conversations)
  while some := list(itertools.islice(rest, _AT_ONCE)):
    texts = iter(template.render_all([x for one in some for x in _parts(one)]))
    for conversation in some:
      encoded = _encoded(
        tokenizer, conversation, texts, max_length, eos, on_long
      )
      if encoded is None:
        skipped += 1
        continue
      ids, mask = encoded
      tokens.append(np.asarray(ids, np.int32))
      loss.append(np.asarray(mask, bool))
      lengths.append(len(ids))
  if not lengths:
    raise ValueError(
      f"There are no conversations to learn from: {skipped} were left out "
      f"because they have more than {max_length} tokens; at least one is "
      "needed."
    )
  return Sequences(
    tokens=np.concatenate(tokens),
    loss=np.concatenate(loss),
    offsets=np.concatenate([[0], np.cumsum(lengths)]),
    skipped=skipped,
  )


def encode(
  tokenizer: tokenizers.Tokenizer,
  template: Template,
  conversation: Conversation,
  max_length: int,
  *,
  eos: int | None = None,
  on_long: OnLong = "cut",
) -> tuple[list[int], list[bool]] | None:
  """Returns a conversation's token ids, and which of them are to be learned.

  The tokens of the assistant's turns are learned, and the tokens that end these
  turns. The text before a turn ends with the assistant's header. It is
  tokenized by itself, just as it is when the model generates a response. So no
  token is partly prompt and partly response.

  A single message with the role `text` is a plain text. All its tokens are
  learned. The tokenizer adds its own first tokens, and `eos` ends the text.

  Args:
    tokenizer: finds its special tokens in the template's text; it adds none to
      a conversation.
    template: must only append text when a conversation becomes longer.
    conversation: has at least one assistant message, or is a plain text.
    max_length: the most tokens allowed.
    eos: the id of the token at which generation stops. Text that a template
      writes after this token in a turn is not learned. The token is appended
      to the last turn if it is missing there.
    on_long: what happens to a conversation of more than `max_length` tokens.
      `cut`: its end is cut off, and it is left out if no response remains.
      `skip`: it is left out. `error`: it is refused.

  Returns:
    (ids, loss), two lists of one length; None if the conversation is left out.

  Raises:
    ValueError: if the conversation is too long and `on_long` is `error`, or if
      the template changes earlier text, or leaves out a response or a part
      of the use of tools.
  """
  texts = iter(template.render_all(_parts(conversation)))
  return _encoded(tokenizer, conversation, texts, max_length, eos, on_long)


def _parts(conversation: Conversation) -> list[tuple[Conversation, bool]]:
  """Returns the parts of a conversation to render, as `Template.render` takes.

  Each response needs two: the messages before it, and the same messages with
  it. A conversation with tools is also rendered whole.
  """
  if conversation[0].role == TEXT:
    return []
  parts: list[tuple[Conversation, bool]] = []
  for i, message in enumerate(conversation):
    if message.role == "assistant":
      parts += [(conversation[:i], True), (conversation[: i + 1], False)]
  return [*parts, *[(conversation, False)] * bool(_told(conversation))]


def _encoded(
  tokenizer: tokenizers.Tokenizer,
  conversation: Conversation,
  texts: Iterator[str],
  max_length: int,
  eos: int | None,
  on_long: OnLong,
) -> tuple[list[int], list[bool]] | None:
  """As `encode`; takes the rendered texts of `_parts` from an iterator."""
  if max_length <= 0:
    raise ValueError(f"max_length must be at least 1; got {max_length}.")
  if conversation[0].role == TEXT:
    with tokenizer_.refusing():
      ids = tokenizer.encode(conversation[0].content).ids
    if eos is not None and ids[-1:] != [eos]:
      ids = [*ids, eos]
    return _fitted(ids, [True] * len(ids), max_length, on_long, conversation)
  text, ids, loss = "", [], []
  for i, message in enumerate(conversation):
    if message.role != "assistant":
      continue
    prompt, before, text = next(texts), text, next(texts)
    asked = tokenizer_.continuation(
      tokenizer, before, _appended(before, prompt)
    )
    if text == prompt:
      raise ValueError(
        f"The chat template writes nothing for the response"
        f" {message.content[:100]!r}, so it cannot be learned."
      )
    answered = tokenizer_.continuation(
      tokenizer, prompt, _appended(prompt, text)
    )
    if eos is not None and i == len(conversation) - 1 and eos not in answered:
      answered.append(eos)
    ids += asked + answered
    loss += [False] * len(asked) + _until_last(eos, answered)
  if told := _told(conversation):
    _check_tools(told, next(texts))
  return _fitted(ids, loss, max_length, on_long, conversation)


def _fitted(
  ids: list[int],
  loss: list[bool],
  max_length: int,
  on_long: OnLong,
  conversation: Conversation,
) -> tuple[list[int], list[bool]] | None:
  loss[:1] = [False]  # no earlier token can predict the first one
  if len(ids) > max_length and on_long == "error":
    raise ValueError(
      f"A conversation has {len(ids)} tokens, but --max-length is "
      f"{max_length}; give a larger --max-length, or cut or skip long "
      "conversations with --on-long. The conversation begins "
      f"{conversation[0].content[:100]!r}."
    )
  if len(ids) > max_length and on_long == "skip":
    return None
  ids, loss = ids[:max_length], loss[:max_length]
  return (ids, loss) if any(loss) else None


def _told(conversation: Conversation) -> list[str]:
  """Returns the answers of tools, and the names of the called tools."""
  told = [message.content for message in conversation if message.role == "tool"]
  for message in conversation:
    told += map(_called, dict(message.more).get("tool_calls", ()))
  return told


def _check_tools(told: Sequence[str], text: str) -> None:
  """Refuses a template whose text leaves out a part of `told`."""
  for part in told:
    if part.strip() not in text:
      raise ValueError(
        "The chat template leaves out a part of a conversation with tools "
        f"({part[:100]!r}); give a template that writes it with "
        "--chat-template."
      )


def _called(call: Any) -> str:
  function = call.get("function", call) if isinstance(call, dict) else {}
  return str(function.get("name", ""))


def _appended(before: str, text: str) -> str:
  if not text.startswith(before):
    raise ValueError(
      "The chat template changes its earlier text when a conversation goes "
      "on, so the program cannot tell responses from prompts; a template must "
      f"only append. It first wrote ...{before[-100:]!r}, and then "
      f"...{text[: len(before)][-100:]!r} in its place."
    )
  return text[len(before) :]


def _until_last(eos: int | None, ids: list[int]) -> list[bool]:
  end = len(ids) - ids[::-1].index(eos) if eos in ids else len(ids)
  return [i < end for i in range(len(ids))]
