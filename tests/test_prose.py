"""Phrases that readers stumbled over do not come back."""

import ast
import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
# docs/contributing.md says what to write in their place.
_REFUSED = re.compile(
  r"\b(?:another start|other starts|seams?|less that (?:of|by)"
  r"|what (?:it|the \w+) has of|knows no|knows nothing|skips on"
  r"|whatever the keys?|not to be waited)\b",
  re.IGNORECASE,
)
_STYLE = _ROOT / "docs" / "contributing.md"
_PAGES = [
  _ROOT / "README.md",
  _ROOT / "CHANGELOG.md",
  *sorted(x for x in (_ROOT / "docs").rglob("*.md") if x != _STYLE),
  *sorted((_ROOT / "studies").rglob("*.md")),
]
_MODULES = [
  path
  for folder in ("bilora_jax", "train", "benchmarks", "examples")
  for path in sorted((_ROOT / folder).rglob("*.py"))
]


def _said(text: str) -> list[str]:
  return [x.group() for x in _REFUSED.finditer(" ".join(text.split()))]


def _words(path: pathlib.Path) -> str:
  """The docstrings, comments and messages of a module."""
  source = path.read_text()
  strings = [
    node.value
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
  ]
  comments = re.findall(r"^\s*# (.*)$", source, re.MULTILINE)
  return "\n".join([*strings, " ".join(comments)])


@pytest.mark.parametrize("page", _PAGES, ids=lambda x: x.name)
def test_a_page_has_none_of_them(page):
  assert not _said(page.read_text())


def test_docstrings_comments_and_messages_have_none_of_them():
  found = {
    str(path.relative_to(_ROOT)): words
    for path in _MODULES
    if (words := _said(_words(path)))
  }
  assert not found


def test_they_are_found_where_they_are():
  assert _said("Each has another\nstart.") == ["another start"]
  refused = [row.split("|")[1] for row in _table()]
  assert refused and all(_said(x) for x in refused)
  assert not any(_said(row.split("|")[2]) for row in _table())


def _table() -> list[str]:
  rows = re.findall(r"^\|.*\|$", _STYLE.read_text().split("## Words")[1], re.M)
  return rows[2:]
