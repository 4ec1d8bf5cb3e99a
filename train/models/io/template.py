"""Chat templates: from a conversation to the text that a decoder reads."""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any, NamedTuple

import jinja2

from ... import checked, options
from ...errors import UsageError
from . import renderer, rendering, special_tokens

PLAIN = (
  "{{ bos_token }}"
  "{% for message in messages %}"
  "{% if message.role == 'system' %}{{ message.content + '\n\n' }}"
  "{% elif message.role == 'user' %}"
  "{{ '### Instruction:\n' + message.content + '\n\n### Response:\n' }}"
  "{% elif message.role == 'assistant' %}"
  "{{ message.content + (eos_token or '\n\n') }}"
  "{% endif %}"
  "{% endfor %}"
)
"""The template for base models, which have none of their own."""

_ENDS = ("bos", "eos")
# Ten times the length of the longest published template.
_MOST = 2**20


class Message(NamedTuple):
  """One message of a conversation.

  Attributes:
    role: `system`, `user`, `assistant` or `tool`.
    content: the text; empty if an assistant only calls tools.
    more: further keys and values for the template, such as `tool_calls`.
  """

  role: str
  content: str
  more: tuple[tuple[str, Any], ...] = ()


Conversation = tuple[Message, ...]
"""At most one system message, then user and assistant in turns."""


@dataclasses.dataclass(frozen=True)
class Template:
  """A chat template, as in `tokenizer_config.json` and GGUF files.

  Attributes:
    source: the Jinja source. Its variables are `messages`,
      `add_generation_prompt`, `bos_token` and `eos_token`. Its date is always
      26 July 2024.
    bos: the text of the token that begins a text, the template's `bos_token`.
    eos: the text of the token that ends a text, the template's `eos_token`.

  Raises:
    ValueError: if `source` is not a template.
  """

  source: str = PLAIN
  bos: str = ""
  eos: str = ""

  def __post_init__(self) -> None:
    if len(self.source) > _MOST:
      raise ValueError(
        f"The chat template has {len(self.source):,} characters; at most"
        f" {_MOST:,} are read."
      )
    try:
      # Only parsed, because to compile a template computes its constants.
      renderer.environment().parse(self.source)
    except jinja2.TemplateError as error:
      raise ValueError(
        f"The chat template is not one that Jinja can read: {error}."
      ) from error
    except RecursionError as error:
      raise ValueError(
        "The chat template is not one that Jinja can read: its expressions "
        "are nested too deeply."
      ) from error

  def render(
    self, conversation: Conversation, add_generation_prompt: bool = False
  ) -> str:
    """Returns the text of a conversation, or of its beginning.

    Args:
      conversation: at least one message.
      add_generation_prompt: whether the text ends with the assistant's header.

    Raises:
      ValueError: if the template refuses the conversation, or takes more time,
        memory or text than `renderer` allows.
    """
    return self.render_all([(conversation, add_generation_prompt)])[0]

  def render_all(
    self, conversations: Sequence[tuple[Conversation, bool]]
  ) -> list[str]:
    """Returns the text of each conversation, faster than by `render`.

    Raises:
      ValueError: as `render`, for the first conversation that fails.
    """
    texts, error = rendering.render(
      self.source, [self._variables(*x) for x in conversations]
    )
    if error:
      conversation, _ = conversations[len(texts)]
      roles = ", ".join(message.role for message in conversation)
      raise ValueError(
        f"The chat template does not take a conversation of {roles:.200}:"
        f" {error}."
      )
    return texts

  def _variables(
    self, conversation: Conversation, add_generation_prompt: bool
  ) -> dict[str, Any]:
    return {
      "messages": [
        {"role": x.role, "content": x.content, **dict(x.more)}
        for x in conversation
      ],
      "add_generation_prompt": add_generation_prompt,
      "bos_token": self.bos,
      "eos_token": self.eos,
      "tools": None,
      "documents": None,
    }


def load_template(folder: str | pathlib.Path) -> Template:
  """Returns the template of a model folder, or the plain one if it has none.

  The template is the `chat_template` of `tokenizer_config.json`, or the file
  `chat_template.jinja`, or that of `chat_template.json`, which models with
  images have. `special_tokens.text` finds the texts of the special tokens.

  Args:
    folder: the model's folder.

  Raises:
    ValueError: if a file is invalid.
  """
  path = pathlib.Path(folder) / "tokenizer_config.json"
  config = checked.read_json(path) if checked.is_file(path) else {}
  source = checked.field(
    str(path), config, "chat_template", str | list | None, None
  )
  if isinstance(source, list):  # several templates, by name
    named = dict(_named(item, str(path)) for item in source)
    if "default" not in named:
      raise ValueError(
        f"{path} has chat templates named {', '.join(named)}; one of them must"
        " be named default."
      )
    source = named["default"]
  own_file = path.with_name("chat_template.jinja")
  if checked.is_file(own_file):
    source = checked.read_text(own_file)
  of_processor = path.with_name("chat_template.json")
  if source is None and checked.is_file(of_processor):
    source = checked.field(
      str(of_processor),
      checked.read_json(of_processor),
      "chat_template",
      str,
    )
  bos, eos = (special_tokens.text(path.parent, f"{x}_token") for x in _ENDS)
  return Template(PLAIN if source is None else source, bos, eos)


def _named(item: Any, where: str) -> tuple[str, str]:
  """Returns the name and the source of one of several templates."""
  where += ", chat_template,"
  if not isinstance(item, dict):
    raise UsageError(
      f"{where} is a list of objects with name and template; got "
      f"{options.shown(item)}."
    )
  name, template = (
    checked.field(where, item, key, str) for key in ("name", "template")
  )
  return name, template
