"""GSM8K: reads questions, and checks the final number of an answer.

Cobbe et al., arXiv 2110.14168: grade-school mathematics. The answers of the
dataset end with a line such as `#### 42`.
"""

import decimal
import os
import re
from typing import NamedTuple

from . import instructions

_MARK = "####"
# A dash after a word or a number is no minus sign. Commas are part of a number
# only between groups of three digits.
_NUMBER = re.compile(
  r"(?:(?<![\w)])(-)\$?|\$(-)|)"
  r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
  r"|(?<![0-9])\.[0-9]+)"
)


class Question(NamedTuple):
  """A question and its answer, a number."""

  text: str
  answer: decimal.Decimal


def number(text: str) -> decimal.Decimal | None:
  """Returns the final number of an answer; None if it has no number.

  This is the first number after the last `####`. If there is no such mark, or
  no number after it, this is the last number of the text, because some models
  learned another form ("The answer is: 42"). Thousands separators, currency
  signs and text after the digits, such as a unit, are ignored. The result is a
  number, so 3.0 equals 3.
  """
  _, mark, end = text.rpartition(_MARK)
  marked = _numbers(end) if mark else []
  if marked:
    return marked[0]
  found = _numbers(text)
  return found[-1] if found else None


def is_right(answer: str, question: Question) -> bool:
  """Whether the final number of an answer is the question's answer."""
  return number(answer) == question.answer


def load(path: str | os.PathLike[str]) -> list[Question]:
  """Returns the questions of a file, in order.

  Args:
    path: a file of rows with `question` and `answer`, as GSM8K has them, or of
      another form that `instructions.load` reads.

  Raises:
    ValueError: if a row is invalid or its answer has no number. The message
      names the file and the line.
    RuntimeError: if the file cannot be read.
  """
  found = []
  for where, conversation in instructions.read(path):
    answer = number(conversation[-1].content)
    if answer is None:
      raise ValueError(
        f"{where}: the answer must have a number, as '#### 42'; got"
        f" {conversation[-1].content[:100]!r}."
      )
    found.append(Question(conversation[-2].content, answer))
  return found


def _numbers(text: str) -> list[decimal.Decimal]:
  return [
    decimal.Decimal(f"{minus or inner_minus}{digits.replace(',', '')}")
    for minus, inner_minus, digits in _NUMBER.findall(text)
  ]
