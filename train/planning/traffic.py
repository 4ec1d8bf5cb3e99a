"""Counts the bytes that a compiled program reads and writes.

Loops are counted in full. XLA's own count, `cost_analysis()["bytes accessed"]`,
counts the body of a loop once, so it counts only one of the layers in a scan.
"""

from . import hlo

# These instructions move nothing, or the instructions that they call do.
FREE = (
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("while", "conditional", "call", "after-all", "opt-barrier"),
  *("partition-id", "replica-id"),
)
_FREE_CALLS = ('"AllocateBuffer"', '"ConcatBitcast"', '"AsyncCollectiveDone"')
_SLICES = ("dynamic-slice", "slice", "gather")


def accessed(text: str) -> float:
  """Returns the bytes that one chip reads and writes in a run of a program.

  These are the operands and results of all instructions that run, in any kind
  of memory. The rules are XLA's: a fusion reads its operands and writes its
  result. If an array is sliced, only the slice counts. If an array is updated
  in place, only the update counts. A loop of unknown length counts once.

  Args:
    text: the text of the program, from `compiled.as_text()`.

  Raises:
    ValueError: if `text` is not the text of a program.
  """
  program = hlo.parse(text)
  return sum(
    _bytes(program, computation, x) * (1 if times is None else times)
    for x, computation, times in hlo.executed(program)
  )


def _bytes(
  program: hlo.Program, computation: hlo.Computation, x: hlo.Instruction
) -> float:
  if (
    x.opcode in FREE
    or x.opcode.endswith(("-start", "-update"))
    or _is_free_call(x)
  ):
    return 0
  # The end of an asynchronous instruction has the type of its result.
  if x.opcode in _SLICES or x.opcode.endswith("-done"):
    return 2 * x.bytes
  if x.opcode == "dynamic-update-slice":
    return 2 * computation.instructions[x.operands[1]].bytes
  if x.opcode == "fusion":
    return _fusion_bytes(program.computations[x.called["calls"][0]])
  return x.bytes + sum(computation.instructions[o].bytes for o in x.operands)


def _fusion_bytes(inside: hlo.Computation) -> float:
  users: dict[str, list[hlo.Instruction]] = {}
  for x in inside.instructions.values():
    for name in x.operands:
      users.setdefault(name, []).append(x)

  def read(x):
    total = 0.0
    for user in users.get(x.name, []):
      place = user.operands.index(x.name)
      if user.opcode in _SLICES and place == 0:
        total += user.bytes
      elif user.opcode == "bitcast":
        total += read(user)
      elif not (
        (user.opcode == "dynamic-update-slice" and place == 0)
        or user.opcode in ("tuple", "custom-call")
        or hlo.is_chained(user)
      ):
        return x.bytes
    return min(total, x.bytes)

  def written(x):
    operands = [inside.instructions[name] for name in x.operands]
    if x.opcode == "tuple":
      return sum(map(written, operands))
    if x.opcode == "bitcast":
      return written(operands[0])
    if x.opcode == "dynamic-update-slice":
      return operands[1].bytes
    if x.opcode == "custom-call" and '"AsyncCollectiveStart"' in x.rest:
      return sum(
        own.bytes + inside.instructions[own.operands[0]].bytes
        for own in operands
      )
    if x.opcode == "parameter" or hlo.is_chained(x) or _is_free_call(x):
      return 0
    return x.bytes

  parameters = [
    x for x in inside.instructions.values() if x.opcode == "parameter"
  ]
  return sum(map(read, parameters)) + written(inside.root)


def _is_free_call(x: hlo.Instruction) -> bool:
  return x.opcode == "custom-call" and any(
    name in x.rest for name in _FREE_CALLS
  )
