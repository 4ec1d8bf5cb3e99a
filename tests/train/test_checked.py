"""One checked reader of files: a value of its type, or a sentence."""

import json
import os
import re
import socket

from hypothesis import given
from hypothesis import strategies as st
import pytest

from train import checked, jsonl, options
from train.errors import UsageError

_LARGE = 1 << 99_999
"""Of more digits than Python writes."""


def _write(path, content: str | bytes):
  path.write_bytes(content.encode() if isinstance(content, str) else content)
  return path


@pytest.mark.parametrize(
  ("content", "told"),
  [
    ("", "is not JSON in UTF-8: Expecting value"),
    ("{", "is not JSON in UTF-8"),
    (b"\xff\xfe{}", "is not JSON in UTF-8"),
    (b'{"a": "\xe9"}', "is not JSON in UTF-8"),
    ("[]", r"must hold an object .*; got \[\]"),
    ("5", "must hold an object .*; got 5"),
    ("null", "must hold an object .*; got None"),
    ('{"a": 1, "a": 2}', ".*the key 'a' occurs twice"),
    ('{"a": "\\ud83d"}', r"has '\\ud83d', half of a surrogate pair"),
    ('{"a": ' + "9" * 5000 + "}", "is not JSON in UTF-8: Exceeds the limit"),
    ("[" * 100_000, "is nested more than 100 levels"),
    ("[" * 150 + "]" * 150, "is nested more than 100 levels"),
  ],
)
def test_json_that_is_none_is_a_sentence(content, told, tmp_path):
  path = _write(tmp_path / "a.json", content)
  with pytest.raises(UsageError, match=f"{re.escape(str(path))} {told}"):
    checked.read_json(path)


@pytest.mark.parametrize(
  ("content", "value"),
  [
    (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
    ('{"a": 1, "a": 1}', {"a": 1}),
    ('{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
    (
      json.dumps({"a": [[] for _ in range(200)]}),
      {"a": [[] for _ in range(200)]},
    ),
  ],
)
def test_json_that_means_one_thing_is_read(content, value, tmp_path):
  assert checked.read_json(_write(tmp_path / "a.json", content)) == value


@pytest.mark.parametrize("read", [checked.read_json, jsonl.read_log])
def test_what_is_no_file_is_a_sentence(read, tmp_path):
  (tmp_path / "folder").mkdir()
  os.mkfifo(tmp_path / "pipe")
  with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(str(tmp_path / "socket"))
  for name, told in {
    "folder": "is a folder; it must be a file",
    "pipe": "is a pipe or a device; it must be a file",
    "socket": "cannot be read|is a pipe or a device",
    "n" * 5000: "cannot be read: .*[Ff]ile name too long",
    "a\0b": "embedded null byte",
    "a\ud800": "surrogates not allowed",
  }.items():
    with pytest.raises(UsageError, match=told):
      read(tmp_path / name)
  with pytest.raises(UsageError, match="/dev/zero is a pipe or a device"):
    checked.read_bytes("/dev/zero")
  with pytest.raises(UsageError, match="is not there"):
    checked.read_bytes(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any file")
def test_a_file_that_may_not_be_read_is_a_sentence(tmp_path):
  path = _write(tmp_path / "a.json", "{}")
  path.chmod(0)
  with pytest.raises(UsageError, match="cannot be read: Permission denied"):
    checked.read_json(path)


def test_a_file_beyond_the_most_there_may_be_is_not_read_on(tmp_path):
  path = _write(tmp_path / "a", "12345")
  assert checked.read_bytes(path, 5) == b"12345"
  with pytest.raises(UsageError, match="has more than 4 bytes"):
    checked.read_bytes(path, 4)


@pytest.mark.parametrize(
  ("value", "kind", "told"),
  [
    (1.5, int, "a whole number; got 1.5"),
    (True, int, "a whole number; got True"),
    (float("nan"), float, "a number; got nan"),
    (float("inf"), float, "a number; got inf"),
    (10**400, float, "a number; got 1000"),
    (_LARGE, str, "a text; got a number of 100,000 bits"),
    (1, bool, "true or false; got 1"),
    ([1, "a"], tuple[int, ...], "a list of whole numbers"),
    ({}, list | None, r"a list or null; got \{\}"),
    ("x" * 10**6, dict, "an object"),
  ],
  ids=lambda value: "" if value is _LARGE else None,
)
def test_a_field_is_of_its_type(value, kind, told):
  with pytest.raises(UsageError, match=f"^f: a must be .*{told}") as error:
    checked.field("f", {"a": value}, "a", kind)
  assert len(str(error.value)) < 300


def test_a_missing_field_is_at_its_default_or_is_asked_for():
  assert checked.field("f", {}, "a", int, 3) == 3
  assert checked.field("f", {"a": 1}, "a", float) == 1.0
  assert checked.field("f", {"a": None}, "a", int | None) is None
  with pytest.raises(
    UsageError, match="f lacks a, which must be a whole number"
  ):
    checked.field("f", {}, "a", int)


_JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(_JSON)
def test_any_value_of_json_is_read_as_it_was_written(value):
  text = json.dumps(value)
  assert repr(checked.parse_json(text.encode(), "f")) == repr(value)
  assert len(options.shown(value)) < 3000


@given(st.binary())
def test_any_bytes_are_json_or_a_sentence(content):
  try:
    checked.parse_json(content, "f")
  except UsageError as error:
    assert str(error).startswith("f ")
