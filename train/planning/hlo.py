"""Reads a compiled program's text: instructions, loops and collectives."""

from collections.abc import Iterator, Mapping, Sequence
import math
import re
from typing import NamedTuple

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)

_ALIASES = {"ragged-all-to-all": "all-to-all"}
_ENTERED = ("while", "conditional", "call", "async-start")

_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(
  r"\b(calls|to_apply|body|condition|branch_computations|true_computation"
  r"|false_computation)=(\{[^}]*\}|%?[\w.-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')
_INDEX = re.compile(r"\bindex=(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")


class Array(NamedTuple):
  """The type of an array on one chip.

  Attributes:
    dtype: XLA's name of the dtype, such as `f32`.
    shape: the shape, without the padding of its layout.
  """

  dtype: str
  shape: tuple[int, ...]

  @property
  def bytes(self) -> float:
    """The size of the array."""
    if self.dtype == "pred":
      return math.prod(self.shape)
    bits = re.match(r"[a-z]+(\d+)", self.dtype)  # for f8e4m3fn, this is 8
    return math.prod(self.shape) * int(bits[1]) / 8 if bits else 0


class Instruction(NamedTuple):
  """One instruction of a program.

  Attributes:
    result: the type of the result, one array or several.
    operands: the names of the instructions that it reads.
    value: the text in the brackets, which is the value of a constant.
    rest: the text of its attributes.
  """

  name: str
  result: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  value: str
  rest: str

  @property
  def bytes(self) -> float:
    """The size of the result."""
    return sum(array.bytes for array in self.result)

  @property
  def called(self) -> dict[str, list[str]]:
    """The names of the computations that it calls, by their role."""
    return {
      role: re.findall(r"[\w.-]+", names)
      for role, names in _CALLED.findall(self.rest)
    }


class Computation(NamedTuple):
  """Instructions by name, in the order in which they run."""

  instructions: dict[str, Instruction]
  root: Instruction

  def source(self, name: str) -> Instruction:
    """Returns the instruction that makes a value, behind all copies."""
    x = self.instructions[name]
    return self.source(x.operands[0]) if x.opcode == "copy" else x

  def constant(self, name: str) -> int | None:
    """Returns the value of an integer constant; None for other values."""
    x = self.source(name)
    return int(x.value) if x.opcode == "constant" else None

  def carried(self, name: str) -> int | None:
    """Returns the place of a value among those that a loop carries, or None."""
    x = self.source(name)
    index = _INDEX.search(x.rest)
    return int(index[1]) if x.opcode == "get-tuple-element" and index else None


class Program(NamedTuple):
  """A program that runs on each of `devices` chips."""

  computations: Mapping[str, Computation]
  entry: str
  devices: int


class Executed(NamedTuple):
  """An instruction, its computation, and how often it runs.

  Attributes:
    times: how often it runs; None in a loop of unknown length.
  """

  instruction: Instruction
  computation: Computation
  times: int | None


class Collective(NamedTuple):
  """One array that the chips of a group exchange.

  Attributes:
    kind: one of `KINDS`.
    dtype: XLA's name of the dtype, such as `f32`.
    shape: the shape of the result on one chip.
    group: the number of chips in a group.
    times: how often it runs; None in a loop of unknown length.
    op_name: JAX's name of the operation that it comes from.
  """

  kind: str
  dtype: str
  shape: tuple[int, ...]
  group: int
  times: int | None
  op_name: str

  @property
  def bytes(self) -> int:
    """The bytes that one chip sends each time, if the chips form a ring.

    For n chips and a result of s bytes, these are 2 s (n - 1) / n in an
    all-reduce, s (n - 1) / n in an all-gather or an all-to-all, s (n - 1) in a
    reduce-scatter, and s in a permutation.
    """
    others = self.group - 1
    share = {
      "all-reduce": 2 * others / self.group,
      "all-gather": others / self.group,
      "reduce-scatter": others,
      "all-to-all": others / self.group,
      "collective-permute": 1,
    }[self.kind]
    return round(share * Array(self.dtype, self.shape).bytes)


def parse(text: str) -> Program:
  """Parses the text of a program.

  Args:
    text: the text of the program, from `compiled.as_text()`.

  Raises:
    ValueError: if `text` is not the text of a program.
  """
  computations: dict[str, Computation] = {}
  name = entry = root = None
  instructions: dict[str, Instruction] = {}
  for line in text.splitlines():
    if head := _HEAD.match(line):
      name, instructions = head[2], {}
      entry = name if head[1] else entry
    elif line == "}" and name and root:
      computations[name] = Computation(instructions, root)
    elif name and line.startswith("  ") and " = " in line:
      x = _instruction(line.strip())
      instructions[x.name] = x
      root = x if line.startswith("  ROOT ") else root
  if entry is None:
    raise ValueError(
      f"the text of a compiled program has an ENTRY; got {text[:80]!r}."
    )
  devices = math.prod(map(int, _DEVICES.findall(text.partition("\n")[0])))
  return Program(computations, entry, devices)


def executed(program: Program, fusions: bool = False) -> Iterator[Executed]:
  """Yields all instructions that run, also those in loops and branches.

  All branches of a conditional count as running.

  Args:
    program: from `parse`.
    fusions: whether to yield the instructions inside a fusion, after the fusion
      itself.
  """
  return _executed(program, program.entry, 1, fusions)


def collectives(text: str) -> list[Collective]:
  """Returns the collectives of a compiled program, an entry for each array.

  The start and the end of an asynchronous collective count as one.

  Args:
    text: as in `parse`.

  Raises:
    ValueError: as `parse`.
  """
  program = parse(text)
  found = []
  for x, computation, times in executed(program, fusions=True):
    # The end of an asynchronous collective has the type of the result, and its
    # start has the attributes.
    opcode = x.opcode.removesuffix("-done")
    kind = _ALIASES.get(opcode, opcode)
    if kind not in KINDS or (is_chained(x) and not _begins(computation, x)):
      continue
    first = x
    if opcode != x.opcode:
      first = computation.instructions[x.operands[0]]
    op_name = _OP_NAME.search(first.rest)
    found += [
      Collective(
        kind,
        *array,
        group=_group_size(first.rest, program.devices),
        times=times,
        op_name=op_name[1] if op_name else "",
      )
      for array in x.result
    ]
  return found


def bytes_by_kind(found: Sequence[Collective]) -> dict[str, int]:
  """Returns the bytes that one chip sends in a run, for each of `KINDS`.

  A collective in a loop of unknown length counts once; see `Collective.times`.
  """
  return {
    kind: sum(
      c.bytes * (1 if c.times is None else c.times)
      for c in found
      if c.kind == kind
    )
    for kind in KINDS
  }


def is_chained(x: Instruction) -> bool:
  """Whether a collective in a fusion is one of several parts of a collective.

  The compiler for TPUs interleaves some collectives with other work. Each part
  then names the collective again.
  """
  return "chain_id=" in x.rest


def _begins(computation: Computation, x: Instruction) -> bool:
  return any(
    x.name in other.operands and '"AsyncCollectiveStart"' in other.rest
    for other in computation.instructions.values()
  )


def _instruction(line: str) -> Instruction:
  name, _, definition = line.removeprefix("ROOT ").partition(" = ")
  # A type is one word, or a tuple in brackets, which may hold more brackets.
  end = _closing(definition) if definition[0] == "(" else definition.index(" ")
  result, rest = definition[:end], definition[end:].lstrip()
  opcode, _, _ = rest.partition("(")
  rest = rest[len(opcode) :]
  end = _closing(rest)
  inside = rest[1 : end - 1]
  return Instruction(
    name=name.removeprefix("%"),
    result=tuple(
      Array(dtype, tuple(int(size) for size in shape.split(",") if size))
      for dtype, shape in _ARRAY.findall(result)
    ),
    opcode=opcode,
    operands=tuple(_OPERAND.findall(inside)),
    value=inside,
    rest=rest[end:],
  )


def _closing(text: str) -> int:
  """Returns the place after the bracket that closes the first bracket."""
  depth = 0
  for place in re.finditer(r"[()]", text):
    depth += 1 if place[0] == "(" else -1
    if depth == 0:
      return place.end()
  raise ValueError(f"a bracket is not closed in {text[:80]!r}.")


def _executed(
  program: Program, name: str, times: int | None, fusions: bool
) -> Iterator[Executed]:
  computation = program.computations[name]
  for x in computation.instructions.values():
    yield Executed(x, computation, times)
    if x.opcode not in _ENTERED and not (fusions and x.opcode == "fusion"):
      continue
    inside = times
    if x.opcode == "while":
      trips = _trips(program, computation, x)
      inside = None if times is None or trips is None else times * trips
    for called in x.called.values():
      for other in called:
        yield from _executed(program, other, inside, fusions)


def _trips(
  program: Program, around: Computation, loop: Instruction
) -> int | None:
  """Returns how often the body of a loop runs; None if it is unknown."""
  if stated := _TRIPS.search(loop.rest):
    return int(stated[1])
  # The compiler for TPUs does not write the number. A loop of `lax.scan` runs
  # while i < n, and i is one of the values that it carries.
  condition, body = (
    program.computations[loop.called[role][0]] for role in ("condition", "body")
  )
  test = condition.root
  if test.opcode != "compare" or "direction=LT" not in test.rest:
    return None
  index = condition.carried(test.operands[0])
  end = condition.constant(test.operands[1])
  if index is None or end is None:
    return None
  start = around.constant(around.source(loop.operands[0]).operands[index])
  following = body.source(body.root.operands[index])
  if start is None or following.opcode != "add":
    return None
  own, by = following.operands
  step = body.constant(by)
  if body.carried(own) != index or not step:
    return None
  return math.ceil((end - start) / step)


def _group_size(attributes: str, devices: int) -> int:
  """Returns the number of chips in a group, from any of XLA's notations."""
  # {{0,1},{2,3}}: all chips of each group.
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return listed[1].count(",") + 1
  # [groups,chips]<=[chips of all]
  if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
    return int(tiled[1])
  # mesh['x'=2,'y'=4] {'y'}, or a part of an axis: {'y':(1)2}.
  if named := re.search(
    r"replica_groups=(mesh\[[^\]]*\])[^{]*\{([^}]*)\}", attributes
  ):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
    return math.prod(
      int(part or sizes[axis])
      for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
    )
  return devices
