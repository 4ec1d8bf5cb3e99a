"""Damages files: bytes anywhere, and values, keys and lengths of their formats.

A mutant is a function of the file and of a number, so that one which was found
can be made again.
"""

from collections.abc import Callable, Iterator
import json
import random
import re
import struct
from typing import Any

Mutator = Callable[[random.Random, bytes], bytes]

_RAW = "@@raw@@"
# Texts of JSON that stand for values which `json` does not write.
_RAWS = (
  *("NaN", "Infinity", "-Infinity", "1e999", "-0.0", "1E400", "9" * 5000),
  *("[" * 5000 + "]" * 5000, "[" * 200 + "]" * 200, '{"a":' * 300 + "1"),
  *(r'"\ud800"', r'"a\u0000b"', "", "tru", "'a'", "0x10", "1,", '"'),
)
_VALUES: tuple[Any, ...] = (
  *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**32, 2**63, 2**64, 10**18),
  *(0.0, 0.5, -1.5, 1e-300, 1e30, 1e300, "", "x", "no", "1", "../..", "a/b"),
  *("/", "\u0663", "{", "(a+", "{{", "%s", "x" * 70_000, [], {}, [None], [[]]),
  *([0], [1, "a"], {"a": 1}, {"": {}}, ["a", "a"], {"content": 5}, [{}]),
)
_LINES = ("", ",", ",,,,", '"', "\t", "x", "-", "{}", "[]", "null", "#", "\x00")
_TOKENS = (
  *("0", "-1", "1e999", "nan", "99999999999999999999", "", "''", '"', "[", "]"),
  *("true", "null", "{}", "[]", "1_0", "0x10", "2026-13-45", "~", "&a", "*a"),
  *(
    "!!python/object:os.system",
    "\u0663",
    "1" * 5000,
    "[" * 3000,
    "{a: " * 300,
  ),
)
_INTEGERS = (0, 1, 2, 127, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def flipped(draw: random.Random, content: bytes) -> bytes:
  """Some bits are others."""
  found = bytearray(content)
  for _ in range(draw.choice((1, 1, 1, 2, 5, 20))):
    if found:
      # Headers are at the start, and Parquet's at the end.
      size = draw.choice((len(found), min(len(found), 200)))
      at = draw.randrange(size)
      at = at if draw.random() < 0.8 else len(found) - 1 - at
      found[at] ^= 1 << draw.randrange(8)
  return bytes(found)


def splattered(draw: random.Random, content: bytes) -> bytes:
  """An integer of 4 or 8 bytes is an extreme one."""
  found, size = bytearray(content), draw.choice((4, 8))
  if len(found) < size:
    return content
  at = draw.randrange(len(found) - size + 1)
  if draw.random() < 0.5:
    at = min(at, 400) // 4 * 4
  at = min(at, len(found) - size)
  value = draw.choice(_INTEGERS)
  value = value if size == 4 else draw.choice((value, 2**62, 2**63, 2**64 - 1))
  found[at : at + size] = value.to_bytes(size, "little")
  return bytes(found)


def cut(draw: random.Random, content: bytes) -> bytes:
  """The end is missing, or a part within."""
  if not content or draw.random() < 0.1:
    return b""
  start, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
  if draw.random() < 0.6:
    return content[:end]
  return content[:start] + content[end:]


def grown(draw: random.Random, content: bytes) -> bytes:
  """A part stands twice, or something is put in."""
  at = draw.randrange(len(content) + 1)
  if draw.random() < 0.5:
    start, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:at] + content[start:end] + content[at:]
  some = draw.choice(
    (b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", draw.randbytes(8), b'"', b"[")
  )
  return content[:at] + some + content[at:]


def in_json(draw: random.Random, content: bytes) -> bytes:
  """Values and keys of a JSON file are others."""
  value = json.loads(content)
  raws: list[str] = []
  for _ in range(draw.choice((1, 1, 1, 2, 3))):
    value = _changed(draw, value, raws)
  text = json.dumps(value)
  for raw in raws:
    text = text.replace(f'"{_RAW}"', raw, 1)
  return text.encode()


def in_jsonl(draw: random.Random, content: bytes) -> bytes:
  """Values of a line of JSON are others."""
  lines = content.splitlines()
  at = draw.randrange(len(lines))
  lines[at] = in_json(draw, lines[at])
  return b"\n".join(lines) + b"\n"


def in_lines(draw: random.Random, content: bytes) -> bytes:
  """Lines, or words and numbers in them, are others."""
  text = content.decode("utf-8", "surrogateescape")
  if draw.random() < 0.3:
    lines = text.split("\n")
    at = draw.randrange(len(lines))
    change = draw.randrange(4)
    if change == 0:
      del lines[at]
    elif change == 1:
      lines.insert(at, lines[draw.randrange(len(lines))])
    else:
      lines.insert(at, draw.choice(_LINES))
    text = "\n".join(lines)
  else:
    tokens = list(re.finditer(r"[\w.+-]+|\"[^\"\n]*\"|[\[\]{}=:,]", text))
    if tokens:
      found = draw.choice(tokens)
      text = text[: found.start()] + draw.choice(_TOKENS) + text[found.end() :]
  return text.encode("utf-8", "surrogateescape")


def in_safetensors(draw: random.Random, content: bytes) -> bytes:
  """The header is another; what follows it is as it was."""
  (size,) = struct.unpack("<Q", content[:8])
  header, rest = content[8 : 8 + size], content[8 + size :]
  made = in_json(draw, header)
  return struct.pack("<Q", len(made)) + made + rest


BYTES: tuple[Mutator, ...] = (flipped, splattered, cut, grown)
TEXT: tuple[Mutator, ...] = (in_lines, in_lines, in_lines, flipped, cut, grown)
JSON: tuple[Mutator, ...] = (*[in_json] * 6, flipped, cut, grown)
JSONL: tuple[Mutator, ...] = (*[in_jsonl] * 6, flipped, cut, grown, in_lines)
SAFETENSORS: tuple[Mutator, ...] = (*[in_safetensors] * 4, *BYTES)


def same_json(draw: random.Random, content: bytes) -> bytes:
  """Other bytes of the same JSON value."""
  value = json.loads(content)
  change = draw.randrange(4)
  if change == 0:
    return b"\xef\xbb\xbf" + content
  if change == 1 and isinstance(value, dict):
    names = list(value)
    draw.shuffle(names)
    value = {name: value[name] for name in names}
  if change == 2 and isinstance(value, dict) and value:
    name = draw.choice(list(value))
    twice = f"{json.dumps(name)}: {json.dumps(value[name])}"
    return f"{{{twice}, {json.dumps(value)[1:]}".encode()
  return json.dumps(value, indent=draw.randrange(5)).encode()


def _changed(draw: random.Random, value: Any, raws: list[str]) -> Any:
  """A value with one change, anywhere in it."""
  places = list(_places(value))
  if not places or draw.random() < 0.03:
    return _another(draw, raws)
  holder, key = draw.choice(places)
  change = draw.random()
  if change < 0.62:
    holder[key] = _another(draw, raws)
  elif change < 0.75:
    del holder[key]
  elif isinstance(holder, dict):
    if change < 0.83:
      holder[f"{key}_"] = holder.pop(key)
    elif change < 0.9:
      holder[draw.choice(("a", "", "__class__", "\u0663"))] = _another(
        draw, raws
      )
    else:
      other = draw.choice(list(holder))
      holder[key], holder[other] = holder[other], holder[key]
  elif change < 0.87:
    holder.insert(key, holder[draw.randrange(len(holder))])
  else:
    holder[key] = [holder[key]]
  return value


def _another(draw: random.Random, raws: list[str]) -> Any:
  if draw.random() < 0.2:
    raws.append(draw.choice(_RAWS))
    return _RAW
  # A copy: what is put in may be changed again.
  return json.loads(json.dumps(draw.choice(_VALUES)))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
  if isinstance(value, dict | list):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
      yield value, key
      yield from _places(inner)
