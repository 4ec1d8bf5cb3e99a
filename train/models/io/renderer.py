"""Renders untrusted chat templates, as the program of a separate process.

Only a process can be stopped at any time. A template may double a list in a
loop and print it, or ask a filter for a text of a terabyte. Then Python cannot
count or interrupt the work. `rendering.py` keeps one such process, and sends it
several conversations at once. This module imports only Jinja, so the process
starts fast.
"""

from collections.abc import Iterator, Sized
import contextlib
import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

import jinja2
from jinja2 import ext, nodes, parser, sandbox

SECONDS = 2
"""The limit of processor time for a text; usual texts take a thousandth."""
BYTES = 2**29
"""The limit of the process's memory."""
CHARACTERS = 2**24
"""The limit of a text's length."""
_BITS = 4096
"""The limit of the size of a number that is a product or a power."""
_SAID = 1000
"""The limit of the length of an error message, in characters."""

# Some templates write the date into the prompt. Here the date is always the
# same, so that a run that is resumed on another day reads the same tokens.
_TODAY = datetime.datetime(2024, 7, 26)


class _Generation(ext.Extension):
  """Parses `{% generation %}`, which marks responses, and removes it."""

  tags = {"generation"}  # noqa: RUF012, as the base class has it

  def parse(self, parser: parser.Parser) -> list[nodes.Node]:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(sandbox.ImmutableSandboxedEnvironment):
  """A sandbox that refuses huge products before they are computed."""

  intercepted_binops = frozenset(("*", "**"))

  def call_binop(
    self, context: Any, operator: str, left: Any, right: Any
  ) -> Any:
    if _size(operator, left, right) > CHARACTERS:
      raise jinja2.TemplateError(
        f"{left!r:.20} {operator} {right!r:.20} is too large"
      )
    return super().call_binop(context, operator, left, right)


def _size(operator: str, left: Any, right: Any) -> float:
  """Returns the size of a product or a power, in characters or items."""
  if isinstance(left, int) and isinstance(right, int):
    bits = left.bit_length() + right.bit_length()
    if operator == "**":
      bits = left.bit_length() * max(right, 0)
    return 0 if bits <= _BITS else CHARACTERS + 1
  for count, many in ((left, right), (right, left)):
    if isinstance(count, int) and isinstance(many, Sized):
      return count * len(many)
  return 0


@functools.cache
def environment() -> jinja2.Environment:
  """Returns the Jinja environment that published templates expect."""
  made = _Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[ext.loopcontrols, _Generation],
  )
  made.filters["tojson"] = _to_json
  made.globals["raise_exception"] = _raise
  made.globals["strftime_now"] = _TODAY.strftime
  return made


def _to_json(value: Any, **options: Any) -> str:
  # Jinja's own filter escapes characters for HTML.
  return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
  return environment().from_string(source)


def _render(source: str, variables: dict[str, Any]) -> str:
  def parts() -> Iterator[str]:
    size = 0
    for part in _compile(source).generate(variables):
      size += len(part)
      if size > CHARACTERS:
        raise jinja2.TemplateError(
          f"its text has more than {CHARACTERS:,} characters"
        )
      yield part

  text = "".join(parts())
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise jinja2.TemplateError(
      f"its text has {text[error.start]!r}, half of a surrogate pair, which is"
      " no character"
    ) from None
  return text


def _answer(source: str, variables: dict[str, Any]) -> dict[str, str]:
  # The limit is for processor time, so a busy machine does not matter. The
  # timer's signal ends the process at any time.
  signal.setitimer(signal.ITIMER_PROF, SECONDS)
  try:
    return {"text": _render(source, variables)}
  except MemoryError:
    fault = "it takes too much memory"
  except RecursionError:
    fault = "it calls itself without an end"
  except jinja2.TemplateError as error:
    fault = str(error)
  # Expressions in the template and Jinja's functions can raise any type.
  except Exception as error:
    fault = f"{type(error).__name__}: {error}"
  return {"error": fault[:_SAID]}


def main() -> None:
  """Answers requests until the input ends.

  A request is a line of JSON: a template, and the variables of each text. The
  answer is a line of JSON for each text, up to the first one with an error.
  """
  # macOS has no such limit.
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
  # A core dump would be large and useless.
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  environment()
  for request in sys.stdin.buffer:
    source, several = json.loads(request)
    for variables in several:
      answer = _answer(source, variables)
      print(json.dumps(answer), flush=True)
      if "error" in answer:
        break


if __name__ == "__main__":
  main()
