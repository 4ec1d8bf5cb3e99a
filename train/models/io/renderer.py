"""Renders chat templates, which strangers wrote, in a process of its own.

Only a process can be stopped whatever it is at: a template may double a list in
a loop and print it, or ask a filter for a text of a terabyte, and neither comes
back to Python to be counted. `rendering.py` keeps one such process and sends it
some conversations at a time. It imports Jinja alone, so that it starts at once.
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
"""Of the processor, that a text may take; usual ones take a thousandth."""
BYTES = 2**29
"""Of memory, that the process may have."""
CHARACTERS = 2**24
"""That a text may have."""
_BITS = 4096
"""Of a number that a product or a power may have."""
_SAID = 1000
"""Characters of what is wrong."""

# Some templates write the day into the prompt. Here it is always the same, so
# that a run which is resumed tomorrow, or started again, reads the same tokens.
_TODAY = datetime.datetime(2024, 7, 26)


class _Generation(ext.Extension):
  """Reads `{% generation %}`, which marks responses, and leaves it out."""

  tags = {"generation"}  # noqa: RUF012, as the base class has it

  def parse(self, parser: parser.Parser) -> list[nodes.Node]:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(sandbox.ImmutableSandboxedEnvironment):
  """Says at once what would only be found out by running into a limit."""

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
  """Of a product or a power, in characters or items."""
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
  """The names, options and extensions that templates are published for."""
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
  # Jinja's own escapes what HTML would misread.
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
  # Time of the processor: a machine that is busy, or asleep, costs none. Its
  # signal ends the process whatever it is at.
  signal.setitimer(signal.ITIMER_PROF, SECONDS)
  try:
    return {"text": _render(source, variables)}
  except MemoryError:
    fault = "it takes too much memory"
  except RecursionError:
    fault = "it calls itself without an end"
  except jinja2.TemplateError as error:
    fault = str(error)
  # Whatever the template's own expressions and Jinja's functions raise.
  except Exception as error:
    fault = f"{type(error).__name__}: {error}"
  return {"error": fault[:_SAID]}


def main() -> None:
  """Answers requests until there are none.

  A request is a line of JSON: a template, and the variables of each text. The
  answer is a line of JSON for each, up to the first with an error.
  """
  # A Mac has no such limit.
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
  # A dump of the memory would be large, and of no use.
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
