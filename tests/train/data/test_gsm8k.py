"""GSM8K: the number that an answer ends in, and files of questions."""

import decimal
import json

from hypothesis import given
from hypothesis import strategies as st
import pytest

from train.data import gsm8k


@pytest.mark.parametrize(
  ("text", "number"),
  [
    ("She has 48 / 2 = <<48/2=24>>24 left.\n#### 24", "24"),
    ("#### 1,234", "1234"),
    ("#### 12,345,678.50", "12345678.5"),
    ("#### $1,000.", "1000"),
    ("####-7", "-7"),
    ("#### -$7", "-7"),
    ("#### $-7", "-7"),
    ("#### 42 apples, of 50", "42"),
    ("#### 3.0", "3"),
    ("#### .5", "0.5"),
    ("#### 1 ####\n#### 2", "2"),
    # Without a mark, or nothing behind it: the last number.
    ("First 3, then 4. The answer is: 12.", "12"),
    ("It costs $5, or 10% more.", "10"),
    ("So there are 7 cats.\n####", "7"),
    ("between 3-5", "5"),
    ("x = -5", "-5"),
    ("(3)-5", "5"),
    ("8 - 5 is 3!", "3"),
    # Groups of other sizes are no thousands.
    ("1,2,3", "3"),
    ("1,2345", "2345"),
    ("0042", "42"),
  ],
)
def test_the_number_that_an_answer_ends_in(text, number):
  assert gsm8k.number(text) == decimal.Decimal(number)


@pytest.mark.parametrize("text", ["", "####", "None.", "#### many", "a-b, $"])
def test_an_answer_without_a_number_is_never_right(text):
  assert gsm8k.number(text) is None
  assert not gsm8k.is_right(text, gsm8k.Question("?", decimal.Decimal(0)))


@given(st.integers(-(10**12), 10**12), st.text())
def test_what_stands_behind_the_mark_counts_and_thousands_do_not(x, before):
  for written in (f"{x}", f"{x:,}", f"{x}.00", f" {x} km"):
    found = gsm8k.number(f"{before}\n#### {written}")
    assert found == x
  question = gsm8k.Question("?", decimal.Decimal(x))
  assert gsm8k.is_right(f"The answer is {x:,}.", question)
  assert not gsm8k.is_right(f"The answer is {x + 1}.", question)


@given(st.text())
def test_any_text_can_be_looked_at(text):
  number = gsm8k.number(text)
  assert number is None or number.is_finite()


def _file(folder, *rows):
  path = folder / "questions.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_questions_are_read_in_order(tmp_path):
  path = _file(
    tmp_path,
    {"question": "How many?", "answer": "2 + 1 = 3\n#### 3"},
    {"query": "And these?", "response": "The answer is: 1,000"},
  )
  assert gsm8k.load(path) == [
    gsm8k.Question("How many?", decimal.Decimal(3)),
    gsm8k.Question("And these?", decimal.Decimal(1000)),
  ]


def test_a_row_without_a_number_is_named(tmp_path):
  path = _file(
    tmp_path,
    {"question": "a", "answer": "#### 3"},
    {"question": "b", "answer": "many"},
  )
  with pytest.raises(
    ValueError, match=r"line 2: the answer must .* got 'many'"
  ):
    gsm8k.load(path)
  with pytest.raises(ValueError, match="has no rows"):
    gsm8k.load(_file(tmp_path))
