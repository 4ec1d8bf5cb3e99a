"""GSM8K: questions, and whether an answer ends in the right number.

Cobbe et al., arXiv 2110.14168: grade-school mathematics, whose answers end with
a line `#### 42`.
"""

import decimal
import os
import re
from typing import NamedTuple

from . import instructions

_MARK = "####"
# A dash behind a word or a number is no sign; commas count only between groups
# of three digits.
_NUMBER = re.compile(
  r"(?:(?<![\w)])(-)\$?|\$(-)|)"
  r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
  r"|(?<![0-9])\.[0-9]+)"
)


class Question(NamedTuple):
  """A question, and the number that is its answer."""

  text: str
  answer: decimal.Decimal


def number(text: str) -> decimal.Decimal | None:
  """The number that an answer ends in; None if it has none.

  It is the first number behind the last `####`. Where there is no such mark, or
  no number behind it, it is the last number of the text, as models answer that
  were taught to end otherwise ("The answer is: 42"). Thousands separators, a
  currency sign and what follows the digits, as a unit or a full stop, are left
  out; numbers are compared as such, so that 3.0 is 3.
  """
  _, mark, end = text.rpartition(_MARK)
  marked = _numbers(end) if mark else []
  if marked:
    return marked[0]
  found = _numbers(text)
  return found[-1] if found else None


def is_right(answer: str, question: Question) -> bool:
  """Whether an answer ends in the question's number."""
  return number(answer) == question.answer


def load(path: str | os.PathLike[str]) -> list[Question]:
  """The questions of a file, in order.

  Args:
    path: of rows with `question` and `answer` as GSM8K has them, or in another
      of the forms that `instructions.load` reads.

  Raises:
    ValueError: if a row is not as it must be, or its answer has no number; the
      sentence names the file and the line.
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
