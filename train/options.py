"""Options: fields of frozen dataclasses, with a flag, a type and bounds each.

A group of options is a dataclass. Its fields are named on the command line, in
a study's TOML and in a run's JSON by their flags, which are unique over all
groups.
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
# What a number is below that says no more: steps are counted in int32, and
# arrays are of float32, in which products of two such numbers are finite.
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
  """A field of a group.

  Args:
    default: its value if nothing is given.
    flag: what it is called outside, if not by the field's own name.
    least: the least value of a number.
    above: what a number is above, in place of the least.
    below: what a number is below; if it is not given, 2**31 for whole numbers
      and 1e9 for others.
  """
  metadata = {"flag": flag, "least": least, "above": above, "below": below}
  return dataclasses.field(default=default, metadata=metadata)


def flag(field: dataclasses.Field) -> str:
  """The name of an option outside, as in `learning_rate`."""
  return field.metadata.get("flag") or field.name


def spelt(name: str) -> str:
  """A flag as it is typed, as in `--learning-rate`."""
  return "--" + name.replace("_", "-")


def fields(group: Any) -> Mapping[str, dataclasses.Field]:
  """The fields of a group, or of its class, by their flags."""
  return _fields(group if isinstance(group, type) else type(group))


@functools.cache
def _fields(kind: Any) -> Mapping[str, dataclasses.Field]:
  # A study asks for them by the ten thousand.
  return types.MappingProxyType({flag(x): x for x in dataclasses.fields(kind)})


def values(group: Any) -> dict[str, Any]:
  """The values of a group by their flags."""
  return {name: getattr(group, x.name) for name, x in fields(group).items()}


def build(kind: Any, given: Mapping[str, Any]) -> Any:
  """A group from values by their flags; what is not given is at its default."""
  known = fields(kind)
  return kind(**{known[name].name: value for name, value in given.items()})


def parse(kind: Any, argv: Sequence[str] | None, program: str) -> Any:
  """The options of a command.

  Args:
    kind: a dataclass of options, some of which may be groups.
    argv: what follows the command; None: the arguments of this process.
    program: what the command line starts with.

  Raises:
    UsageError: if an option is out of its bounds.
    SystemExit: with code 2, if an option is unknown; with 0 after `--help`.
  """
  if asks_for_help(argv):
    tyro.cli(_told(kind), args=argv, prog=program)
  found = tyro.cli(kind, args=argv, prog=program)
  check(found)
  for field in dataclasses.fields(kind):
    if dataclasses.is_dataclass(group := getattr(found, field.name)):
      check(group)
  return found


def asks_for_help(argv: Sequence[str] | None) -> bool:
  """Whether a command line, or this process's, is to explain the options."""
  return bool({"-h", "--help"} & set(sys.argv if argv is None else argv))


def texts(kind: type) -> dict[str, str]:
  """What explains each field of a group: the docstring below it.

  Tyro reads them too, but keeps their line breaks.
  """
  found = {}
  for base in reversed(kind.__mro__[:-1]):
    if dataclasses.is_dataclass(base):
      for told in docstring_parser.parse_from_object(base).params:
        found[told.arg_name] = " ".join((told.description or "").split())
  return found


def _told(kind: Any) -> Any:
  """The same options for Tyro, with what explains them."""
  explained = texts(kind)
  fields: list[Any] = []
  for x in dataclasses.fields(kind):
    group = x.default_factory
    told = x.type
    if isinstance(group, type) and dataclasses.is_dataclass(group):
      group = _told(group)
      told = tyro.conf.OmitArgPrefixes[group]
    elif x.name in explained:
      told = Annotated[x.type, tyro.conf.arg(help=explained[x.name])]
    field = dataclasses.field(default=x.default, metadata=x.metadata)
    if group is not dataclasses.MISSING:
      field = dataclasses.field(default_factory=group)
    fields.append((x.name, told, field))
  told = dataclasses.make_dataclass(kind.__name__, fields, frozen=True)
  told.__doc__ = kind.__doc__
  return told


def check(group: Any) -> None:
  """Refuses a number that is out of its bounds, and a text that is none.

  NaN is in no bounds. A text with a NUL or half of a surrogate pair can be no
  part of a path, nor be written into a run's files.

  Raises:
    UsageError: that names the option, what came and what is allowed.
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
  """Whether a text can be written to a file, and be part of a path."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return "\0" not in text


def fits(value: Any, kind: Any) -> bool:
  """Whether a value of JSON, TOML or YAML is of a type.

  Args:
    value: any.
    kind: `int`, `float` (finite, whole or not), `str`, `bool`, `dict`, `list`,
      `None`, a Literal, a tuple of one of these, `|` of some, or `object`.
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
  # Not isinstance: to JSON, true is no number.
  if kind is float:
    # What is no float is infinite as one; NaN is not in any bounds.
    most = sys.float_info.max
    return type(value) in (int, float) and -most <= value <= most
  return kind is object or type(value) is kind


def wanted(kind: Any) -> str:
  """What a value of a type is called."""
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
  """A value for a sentence, which is short whatever the value is."""
  try:
    return _REPR.repr(value)
  except ValueError:  # of more digits than Python writes
    return f"a number of {value.bit_length():,} bits"


def checked(where: str, name: str, value: Any, kind: Any) -> Any:
  """The value as its type has it: TOML's and JSON's 1 is 1.0 where it may be.

  Raises:
    UsageError: if it is of another type.
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
  """Refuses a table with a key that is not among some names.

  Raises:
    UsageError: with the names that are nearest.
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
  """Names in a sentence; of many, the first few and how many there are."""
  names = list(names)
  if len(names) > _SHOWN:
    return f"{', '.join(names[:_SHOWN])}, ... ({len(names)} in all)"
  if last and len(names) > 1:
    return f"{', '.join(names[:-1])} {last} {names[-1]}"
  return ", ".join(names)
