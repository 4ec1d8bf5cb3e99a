"""Matches regular expressions from untrusted files, in bounded time.

`re` backtracks, so that `(a+)+$` takes a year for a path of fifty letters. Here
all alternatives are followed at once, as sets of positions in the text: the
time is at most the pattern's length times the cube of the text's length. Syntax
and meaning are those of `re`, which also matches classes, escapes and anchors;
references to earlier matches, as `\\1`, are not supported.
"""

from collections.abc import Iterable
import dataclasses
import functools
import re
from typing import Protocol

_LONGEST = 100_000
_DEEPEST = 50

_ATOM = re.compile(
  r"""
  \[\^?\]?(?:\\.|[^\\\]])*\]             # a class
  | \\(?:x..|u.{4}|U.{8}|N\{[^}]*\}|0[0-7]{0,2}|[^1-9])
  | [^\\()\[|*+?]                        # itself, a dot or an anchor
  """,
  re.DOTALL | re.VERBOSE,
)
_MANY = re.compile(r"(?:([*+?])|\{(?!\})(\d*)(,?)(\d*)\})([?+]?)")
_OPEN = re.compile(r"\((?:\?(?:P<\w+>|<?[=!]|([aimsu]*):))?(?!\?)")
_FLAGS = re.compile(r"\(\?([aimsu]+)\)")


def check(pattern: str) -> None:
  """Refuses a pattern that is not a regular expression or not supported here.

  Raises:
    ValueError: if it is refused; the message says why.
  """
  if not isinstance(pattern, str):
    raise ValueError(
      f"{pattern!r} is not a regular expression: it is no string."
    )
  _compiled(pattern)


def fullmatch(pattern: str, text: str) -> bool:
  """Whether the pattern matches the whole text, as in `re.fullmatch`.

  Raises:
    ValueError: as `check`.
  """
  return ends(pattern, text, (0,))


def ends(pattern: str, text: str, starts: Iterable[int]) -> bool:
  """Whether the pattern matches from one of `starts` to the text's end.

  Raises:
    ValueError: as `check`.
  """
  node, match = _compiled(pattern), _Match(text)
  return any(len(text) in match.ends(node, i) for i in starts)


class _Match:
  """A text, with a cache of the matches of a pattern's parts in it."""

  def __init__(self, text: str):
    self.text = text
    self._known: dict[tuple[int, int], frozenset[int]] = {}

  def ends(self, node: "_Node", start: int) -> frozenset[int]:
    """The ends of all matches that begin at `start`."""
    key = id(node), start
    if key not in self._known:
      self._known[key] = frozenset(node.ends(self, start))
    return self._known[key]

  def after(self, node: "_Node", starts: Iterable[int]) -> set[int]:
    """The ends of all matches that begin at one of `starts`."""
    return {end for start in starts for end in self.ends(node, start)}


class _Node(Protocol):
  """A part of a pattern."""

  def ends(self, match: _Match, start: int, /) -> Iterable[int]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class _Atoms:
  """Characters, classes and anchors in a row, which `re` matches in one way."""

  pattern: re.Pattern[str]

  def ends(self, match: _Match, start: int) -> Iterable[int]:
    found = self.pattern.match(match.text, start)
    return (found.end(),) if found else ()


@dataclasses.dataclass(frozen=True, eq=False)
class _Row:
  parts: tuple[_Node, ...]

  def ends(self, match: _Match, start: int) -> Iterable[int]:
    places = {start}
    for part in self.parts:
      places = match.after(part, places)
    return places


@dataclasses.dataclass(frozen=True, eq=False)
class _Either:
  parts: tuple[_Node, ...]

  def ends(self, match: _Match, start: int) -> Iterable[int]:
    return {end for part in self.parts for end in match.ends(part, start)}


@dataclasses.dataclass(frozen=True, eq=False)
class _Many:
  """A part that is repeated `least` times or more, up to `most` times."""

  part: _Node
  least: int
  most: int | None

  def ends(self, match: _Match, start: int) -> Iterable[int]:
    # With each repetition a position moves on, or stays from then on.
    enough = len(match.text) + 1
    places = {start}
    for _ in range(min(self.least, enough)):
      places = match.after(self.part, places)
    found, new = places, places
    left = enough if self.most is None else self.most - self.least
    while new and left > 0:
      new = match.after(self.part, new) - found
      found = found | new
      left -= 1
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class _Look:
  """A look ahead or behind, positive or negative."""

  part: _Node
  behind: bool
  wanted: bool

  def ends(self, match: _Match, start: int) -> Iterable[int]:
    if self.behind:
      found = any(start in match.ends(self.part, i) for i in range(start + 1))
    else:
      found = bool(match.ends(self.part, start))
    return (start,) if found == self.wanted else ()


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> _Node:
  if len(pattern) > _LONGEST:
    raise ValueError(
      f"{pattern:.40}... is not a regular expression that is matched here: it "
      f"has {len(pattern):,} characters, more than {_LONGEST:,}."
    )
  try:
    re.compile(pattern)
  except (re.error, OverflowError) as error:
    raise ValueError(
      f"{pattern!r:.200} is not a regular expression: {error}."
    ) from error
  except RecursionError as error:
    raise ValueError(
      f"{pattern!r:.200} is not a regular expression that is matched here: it "
      f"has more than {_DEEPEST} nested groups."
    ) from error
  return _Parser(pattern).whole()


class _Parser:
  """Parses a pattern that `re` accepts."""

  def __init__(self, pattern: str):
    self._pattern = pattern
    self._place = 0
    self._depth = 0

  def whole(self) -> _Node:
    first = self._take(_FLAGS)
    node = self._either(_flags(first[1]) if first else 0)
    if self._place < len(self._pattern):
      raise self._unknown()
    return node

  def _take(self, token: re.Pattern[str]) -> re.Match[str] | None:
    found = token.match(self._pattern, self._place)
    if found:
      self._place = found.end()
    return found

  def _at(self, character: str) -> bool:
    return self._pattern.startswith(character, self._place)

  def _unknown(self) -> ValueError:
    part = self._pattern[self._place :][:20]
    return ValueError(
      f"{self._pattern!r:.200} is not a regular expression that is matched "
      f"here: it has {part!r}. Groups, classes, quantifiers, anchors and looks "
      "ahead or behind are; references to an earlier match are not."
    )

  def _either(self, flags: int) -> _Node:
    parts = [self._row(flags)]
    while self._at("|"):
      self._place += 1
      parts.append(self._row(flags))
    return parts[0] if len(parts) == 1 else _Either(tuple(parts))

  def _row(self, flags: int) -> _Node:
    parts: list[_Node] = []
    atoms = ""
    while self._place < len(self._pattern) and not (
      self._at("|") or self._at(")")
    ):
      atom = "" if self._at("(") else self._atom()
      part = _Atoms(re.compile(atom, flags)) if atom else self._group(flags)
      count = self._count()
      if atom and count is None:
        atoms += atom
        continue
      if atoms:
        parts.append(_Atoms(re.compile(atoms, flags)))
        atoms = ""
      parts.append(part if count is None else _Many(part, *count))
    if atoms:
      parts.append(_Atoms(re.compile(atoms, flags)))
    return parts[0] if len(parts) == 1 else _Row(tuple(parts))

  def _atom(self) -> str:
    found = self._take(_ATOM)
    if found is None:
      raise self._unknown()
    return found[0]

  def _group(self, flags: int) -> _Node:
    start = self._place
    found = self._take(_OPEN)
    self._depth += 1
    if found is None or self._depth > _DEEPEST:
      self._place = start
      raise self._unknown()
    node = self._either(flags | _flags(found[1] or ""))
    self._place += 1  # the closing bracket
    self._depth -= 1
    if found[0][-1] in "=!":
      return _Look(node, "<" in found[0], found[0][-1] == "=")
    return node

  def _count(self) -> tuple[int, int | None] | None:
    """How often the last part may be repeated; None without a quantifier."""
    start = self._place
    found = self._take(_MANY)
    if found is None:
      return None
    if found[5] == "+":
      self._place = start
      raise self._unknown()
    if found[1]:
      return {"*": (0, None), "+": (1, None), "?": (0, 1)}[found[1]]
    least = int(found[2] or 0)
    if not found[3]:
      return least, least
    return least, int(found[4]) if found[4] else None


def _flags(letters: str) -> int:
  return sum(re.RegexFlag[letter.upper()] for letter in letters)
