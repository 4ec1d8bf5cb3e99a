"""Regular expressions of files: as `re` has them, in time that is bounded."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from bilora_jax import _patterns

_ATOMS = ("a", "b", ".", "/", "[ab]", "[^a]", r"\d", r"\w", r"\.", r"\b", "$")
_ATOMS += ("^", "[]a]", r"[\]a-b]", r"\x61", "(?:a|ab)", "(a|)", "(?=a)")
_ATOMS += ("(?!b)", "(?<=a)", "(?<!/)", "(?P<x1>b)", "{", "{}", "{a", "é")
_COUNTS = ("", "", "", "*", "+", "?", "*?", "{2}", "{1,2}", "{,2}", "{2,}?")
_TEXTS = st.text("ab/.1{}é", max_size=8)


def _pattern(parts):
  def grown(inner):
    group = st.sampled_from(("(%s)%s", "(?:%s)%s", "(?=%s)"))
    whole = st.builds(
      lambda form, x, count: form % ((x, count)[: form.count("%s")]),
      group,
      inner,
      st.sampled_from(_COUNTS),
    )
    return st.builds("".join, st.lists(whole | inner, max_size=3)) | st.builds(
      "|".join, st.lists(inner, min_size=2, max_size=3)
    )

  return st.recursive(parts, grown, max_leaves=6)


@settings(max_examples=1000, deadline=None)
@given(
  _pattern(
    st.builds("".join, st.tuples(*map(st.sampled_from, (_ATOMS, _COUNTS))))
  ),
  _TEXTS,
)
def test_a_pattern_matches_what_re_matches(pattern, text):
  try:
    expected = re.fullmatch(pattern, text)
  except re.error:
    with pytest.raises(ValueError, match="is not a regular expression: "):
      _patterns.check(pattern)
    return
  assert _patterns.fullmatch(pattern, text) == bool(expected)


@settings(deadline=None)
@given(
  _pattern(
    st.builds("".join, st.tuples(*map(st.sampled_from, (_ATOMS, _COUNTS))))
  ),
  st.text("ab.1", max_size=8),
)
def test_the_end_of_a_name_matches_as_in_peft(pattern, module):
  try:
    expected = re.match(rf"(.*\.)?({pattern})$", module)
  except re.error:
    return
  starts = [0, *(i for i, x in enumerate(module, 1) if x == ".")]
  assert _patterns.ends(pattern, module, starts) == bool(expected)


@pytest.mark.parametrize(
  ("pattern", "text", "matches"),
  [
    ("(?i)A/B", "a/b", True),
    ("(?i:A)/B", "a/B", True),
    ("(?i:A)/B", "a/b", False),
    ("(?is:.*)b", "\nB", False),
    (re.escape("layers_0/q-proj (é)"), "layers_0/q-proj (é)", True),
    (".*(query|value)", "encoder/layer_0/query", True),
    ("(?!.*layer_0).*query", "encoder/layer_0/query", False),
  ],
)
def test_flags_and_escapes_are_those_of_re(pattern, text, matches):
  assert bool(re.fullmatch(pattern, text)) == matches
  assert _patterns.fullmatch(pattern, text) == matches


@pytest.mark.parametrize(
  "pattern",
  [
    "(a+)+!",
    "(a|a)" * 40 + "!",
    "(a?){60}a{60}!",
    "(.*)*" * 10 + "!",
    ".*" * 20 + "!",
    "(((((a*)*)*)*)*)*!",
    "(a{1,1000000}){1,1000000}!",
    "(?=(a+)+!)a",
  ],
)
def test_no_pattern_takes_long(pattern):
  assert not _patterns.fullmatch(pattern, "a" * 60)


@pytest.mark.parametrize(
  ("pattern", "fault"),
  [
    (r"(a)\1", r"has '\\\\1'"),
    ("(?P<x>a)(?P=x)", "has"),
    ("a*+", r"has '\*\+'"),
    ("(?>a)", "has"),
    ("(?x) a", "has"),
    ("(" * 60 + ")" * 60, "has"),
    ("(" * 20_000 + ")" * 20_000, "more than 50 nested groups"),
    ("a" * 100_001, "has 100,001 characters"),
    ("[", "unterminated"),
    (3, "it is no string"),
  ],
)
def test_what_is_not_matched_is_refused_by_name(pattern, fault):
  with pytest.raises(ValueError, match=f"is not a regular expr.*{fault}"):
    _patterns.check(pattern)
