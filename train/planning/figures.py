"""The memory, operations and traffic of a compiled step, and their table."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax

from . import hlo, topology, traffic


@dataclasses.dataclass(frozen=True)
class Figures:
  """What a step of one method needs on each device.

  Attributes:
    arguments: bytes of the arguments, which are weights, state and batch.
    temporary: bytes of temporary arrays.
    output: bytes of results that do not replace the state.
    code: bytes of the program.
    host: bytes of arrays that are kept in the host's memory.
    peak: the most bytes of a device in use at once, as the compiler plans them.
      Temporary arrays may take more if there are gaps between them. For a step
      that offloads, the sum of all arrays.
    flops: the operations of the step, from its equations, divided by the number
      of devices.
    bytes_accessed: bytes read and written, with loops in full; see `traffic`.
    bytes_accessed_once: XLA's own count, which counts a loop's body once; 0 if
      XLA has no count.
    bytes_sent: bytes sent, by kind of collective.
    loops_known: whether all loops with collectives have a known length.
  """

  method: str
  arguments: int
  temporary: int
  output: int
  code: int
  host: int
  peak: int
  flops: float
  bytes_accessed: float
  bytes_accessed_once: float
  bytes_sent: dict[str, int]
  loops_known: bool


def of(method: str, compiled: jax.stages.Compiled, flops: float) -> Figures:
  """Returns the figures of a compiled step.

  Args:
    method: the name of the method.
    compiled: the step; all devices run the same program.
    flops: see `Figures`.
  """
  memory, text = compiled.memory_analysis(), compiled.as_text()
  assert memory is not None and text is not None
  # XLA has no cost analysis when it compiles for a GPU that is not there.
  cost = compiled.cost_analysis() or {}
  collectives = hlo.collectives(text)
  return Figures(
    method=method,
    arguments=memory.argument_size_in_bytes,
    temporary=memory.temp_size_in_bytes,
    output=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
    host=memory.host_temp_size_in_bytes,
    peak=_peak(memory),
    flops=flops,
    bytes_accessed=traffic.accessed(text),
    bytes_accessed_once=cost.get("bytes accessed", 0.0),
    bytes_sent=hlo.bytes_by_kind(collectives),
    loops_known=all(x.times is not None for x in collectives),
  )


def _peak(memory: Any) -> int:
  if not memory.host_temp_size_in_bytes:
    return memory.peak_memory_in_bytes
  # With offloading, XLA's own peak was wrong: it was the arguments and the
  # arrays in the host's memory. The sum of a device's arrays is an upper bound.
  return (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )


def table(found: Sequence[Figures]) -> str:
  """Returns a table of figures side by side, with ratios to the first."""

  def row(name, values, write):
    first = values[0]
    cells = [write(first).rjust(13)]
    cells += [
      write(value).rjust(13)
      + (f"{value / first:.3f}".rjust(8) if first else " " * 8)
      for value in values[1:]
    ]
    return name.ljust(28) + "".join(cells)

  names = [x.method for x in found]
  lines = [
    " " * 28
    + names[0].rjust(13)
    + "".join(name.rjust(13) + "ratio".rjust(8) for name in names[1:])
  ]
  lines += [
    row(name, [getattr(x, name) for x in found], gib)
    for name in ("arguments", "temporary", "output", "code", "host", "peak")
  ]
  lines.append(
    row("floating-point operations", [x.flops for x in found], "{:.4g}".format)
  )
  lines.append(
    row("bytes read and written", [x.bytes_accessed for x in found], gib)
  )
  once = [x.bytes_accessed_once for x in found]
  if any(once):
    lines.append(row("  a loop's body once (XLA)", once, gib))
  lines.append(
    row("bytes sent", [sum(x.bytes_sent.values()) for x in found], gib)
  )
  lines += [
    row(f"  {kind}", [x.bytes_sent[kind] for x in found], gib)
    for kind in hlo.KINDS
  ]
  if not all(x.loops_known for x in found):
    lines.append(
      "The bytes sent are a lower limit: XLA does not tell how often a loop "
      "runs, so each loop counts once."
    )
  return "\n".join(lines)


def gib(size: float) -> str:
  """Returns a number of bytes as a text in GiB."""
  return f"{size / topology.GIB:.3f} GiB"
