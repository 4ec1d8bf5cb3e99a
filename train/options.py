"""Options: fields of frozen dataclasses, each with a flag, a type and bounds.

A group of options is a dataclass. The command line, a study's TOML and a run's
JSON use the flags as names of the fields. A flag is unique over all groups.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import difflib
import functools
import math
import reprlib
import sys
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import docstring_parser
import tyro

from .errors import UsageError

_SHOWN = 8
# The upper bounds of numbers without a bound of their own. Steps are counted in
# int32. Arrays are float32, in which the product of two such floats is finite.
_BELOW = {int: 2**31, float: 1e9}
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100
_REPR.maxlevel = 3


def option(
  default: Any,
  *,
  flag: str = "",
  least: float = -math.inf,
  above: float = -math.inf,
  below: float = math.inf,
) -> Any:
  """Returns a field of a group.

  Args:
    default: the value if the option is not given.
    flag: the name of the option for users; empty: the name of the field.
    least: the inclusive lower bound of a number.
    above: the exclusive lower bound of a number, in place of `least`.
    below: the exclusive upper bound of a number; by default 2**31 for whole
      numbers and 1e9 for others.
  """
  metadata = {"flag": flag, "least": least, "above": above, "below": below}
  return dataclasses.field(default=default, metadata=metadata)


def flag(field: dataclasses.Field) -> str:
  """Returns the name of an option for users, such as `learning_rate`."""
  return field.metadata.get("flag") or field.name


def spelt(name: str) -> str:
  """Returns a flag in the form of a command line: `--learning-rate`."""
  return "--" + name.replace("_", "-")


def fields(group: Any) -> Mapping[str, dataclasses.Field]:
  """Returns the fields of a group, or of its class, by their flags."""
  return _fields(group if isinstance(group, type) else type(group))


@functools.cache
def _fields(kind: Any) -> Mapping[str, dataclasses.Field]:
  # A study calls this tens of thousands of times.
  return types.MappingProxyType({flag(x): x for x in dataclasses.fields(kind)})


def values(group: Any) -> dict[str, Any]:
  """Returns the values of a group by their flags."""
  return {name: getattr(group, x.name) for name, x in fields(group).items()}


def build(kind: Any, given: Mapping[str, Any]) -> Any:
  """Returns a group from values by flags; other fields get their defaults."""
  known = fields(kind)
  return kind(**{known[name].name: value for name, value in given.items()})


def parse(kind: Any, argv: Sequence[str] | None, program: str) -> Any:
  """Parses the options of a command.

  Args:
    kind: a dataclass of options; its fields may be groups.
    argv: the arguments after the command; None: the arguments of this process.
    program: the first words of the command line, for `--help`.

  Raises:
    UsageError: if an option is out of its bounds.
    SystemExit: with code 2, if an option is unknown; with 0 after `--help`.
  """
  if asks_for_help(argv):
    tyro.cli(_with_help(kind), args=argv, prog=program)
  found = tyro.cli(kind, args=argv, prog=program)
  check(found)
  for field in dataclasses.fields(kind):
    if dataclasses.is_dataclass(group := getattr(found, field.name)):
      check(group)
  return found


def asks_for_help(argv: Sequence[str] | None) -> bool:
  """Returns whether a command line asks for help; None: this process's."""
  return bool({"-h", "--help"} & set(sys.argv if argv is None else argv))


def help_texts(kind: type) -> dict[str, str]:
  """Returns the docstring below each field of a group, each in one line.

  Tyro can read these docstrings too, but it keeps their line breaks.
  """
  found = {}
  for base in reversed(kind.__mro__[:-1]):
    if dataclasses.is_dataclass(base):
      for field in docstring_parser.parse_from_object(base).params:
        found[field.arg_name] = " ".join((field.description or "").split())
  return found


def _with_help(kind: Any) -> Any:
  """Returns a copy of the class for Tyro, with the help text of each field."""
  help_of = help_texts(kind)
  fields: list[Any] = []
  for x in dataclasses.fields(kind):
    group = x.default_factory
    annotation = x.type
    if isinstance(group, type) and dataclasses.is_dataclass(group):
      group = _with_help(group)
      annotation = tyro.conf.OmitArgPrefixes[group]
    elif x.name in help_of:
      annotation = Annotated[x.type, tyro.conf.arg(help=help_of[x.name])]
    field = dataclasses.field(default=x.default, metadata=x.metadata)
    if group is not dataclasses.MISSING:
      field = dataclasses.field(default_factory=group)
    fields.append((x.name, annotation, field))
  copy = dataclasses.make_dataclass(kind.__name__, fields, frozen=True)
  copy.__doc__ = kind.__doc__
  return copy


def check(group: Any) -> None:
  """Refuses numbers out of their bounds, and invalid texts.

  NaN is out of all bounds. A text with a NUL or half of a surrogate pair cannot
  be part of a path, and cannot be written into a run's files.

  Raises:
    UsageError: if a value is refused; the message names the option, the value
      and the allowed values.
  """
  for name, field in fields(group).items():
    value = getattr(group, field.name)
    if type(value) in _BELOW:
      _check_bounds(name, value, field.metadata)
    for text in value if isinstance(value, tuple | list) else [value]:
      if isinstance(text, str) and not is_text(text):
        raise UsageError(
          f"{spelt(name)} must be a Unicode text without NUL; got "
          f"{shown(text)}."
        )


def _check_bounds(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
  least = bounds.get("least", -math.inf)
  above = bounds.get("above", -math.inf)
  below = bounds.get("below", math.inf)
  below = min(below, _BELOW[type(value)]) if below == math.inf else below
  if least <= value < below and value > above:
    return
  if type(value) is int:
    allowed = f"at least {least}" if value < least else f"below {below}"
  elif above > -math.inf:
    allowed = f"in ({above:g}, {below:g})"
  else:
    allowed = f"in [{least:g}, {below:g})"
  raise UsageError(f"{spelt(name)} must be {allowed}; got {shown(value)}.")


def is_text(text: str) -> bool:
  """Returns whether a text can be written to a file and be part of a path."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return "\0" not in text


def fits(value: Any, kind: Any) -> bool:
  """Returns whether a value of JSON, TOML or YAML is of a type.

  Args:
    value: the value.
    kind: `int`, `float` (finite; whole numbers are allowed), `str`, `bool`,
      `dict`, `list`, `None`, a Literal, a tuple of one of these types, a union
      of some with `|`, or `object`, which allows every value.
  """
  if get_origin(kind) is Literal:
    return value in get_args(kind)
  if get_origin(kind) is tuple:
    return isinstance(value, list | tuple) and all(
      fits(item, get_args(kind)[0]) for item in value
    )
  if get_origin(kind) in (Union, types.UnionType):
    return any(fits(value, one) for one in get_args(kind))
  if kind in (None, types.NoneType):
    return value is None
  # Not isinstance, because True is an int in Python but no number in JSON.
  if kind is float:
    # This refuses NaN, infinities and whole numbers that are too large for a
    # float.
    most = sys.float_info.max
    return type(value) in (int, float) and -most <= value <= most
  return kind is object or type(value) is kind


def wanted(kind: Any) -> str:
  """Returns a phrase for the values of a type, for messages."""
  if get_origin(kind) is Literal:
    return f"one of {', '.join(map(repr, get_args(kind)))}"
  if get_origin(kind) is tuple:
    many = {
      int: "whole numbers",
      float: "numbers",
      str: "texts",
      dict: "objects",
    }
    inner = get_args(kind)[0]
    return f"a list of {many.get(inner) or wanted(inner)}"
  if get_origin(kind) in (Union, types.UnionType):
    return " or ".join(wanted(one) for one in get_args(kind))
  return {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "an object (a table of keys and values)",
    list: "a list",
    None: "null",
    types.NoneType: "null",
    object: "anything",
  }[kind]


def shown(value: Any) -> str:
  """Returns a short text for a value of any size, for messages."""
  try:
    return _REPR.repr(value)
  except ValueError:  # more digits than Python writes
    return f"a number of {value.bit_length():,} bits"


def checked(where: str, name: str, value: Any, kind: Any) -> Any:
  """Returns the value in its type: the 1 of TOML or JSON may become 1.0.

  Raises:
    UsageError: if the value has another type.
  """
  if not fits(value, kind):
    raise UsageError(
      f"{where}: {name} must be {wanted(kind)}; got {shown(value)}."
    )
  if get_origin(kind) is tuple:
    inner = get_args(kind)[0]
    return tuple(float(x) if inner is float else x for x in value)
  return float(value) if kind is float else value


def known(
  where: str, row: Any, names: Iterable[str], what: str = "key"
) -> None:
  """Refuses a table with an unknown key.

  Args:
    where: the place of the table, in words, for messages.
    row: the table.
    names: the known keys.
    what: the word for a key in messages.

  Raises:
    UsageError: if a key is unknown; the message has the most similar names.
  """
  if not isinstance(row, Mapping):
    raise UsageError(f"{where} must be a table; got {shown(row)}.")
  names = list(names)
  for key in row:
    if key not in names:
      near = difflib.get_close_matches(str(key), names, n=3) or sorted(names)
      raise UsageError(
        f"{where} has no {what} {shown(key)}; perhaps {listed(near, 'or')}?"
      )


def listed(names: Iterable[str], last: str = "") -> str:
  """Joins names for messages; shows the first few and the count of many."""
  names = list(names)
  if len(names) > _SHOWN:
    return f"{', '.join(names[:_SHOWN])}, ... ({len(names)} in all)"
  if last and len(names) > 1:
    return f"{', '.join(names[:-1])} {last} {names[-1]}"
  return ", ".join(names)
