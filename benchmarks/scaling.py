"""Measures how the cost of a step grows with the size of the model.

  python -m benchmarks.scaling

The sizes are the number of layers, the width, the length, the rank and the
number of adapted layers. One size grows at a time, from a small decoder like
Llama, in float32 and without a scan over layers. LoRA has rank r, and Bi-LoRA
has ranks r and r. Their steps are timed in interleaved rounds. The seconds to
compile include tracing and XLA, once for each program. The memory is the memory
that the compiler plans for a step.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib import figure

from benchmarks import rounds, step_time, workloads
from train.models.decoder import config as decoder_config
from train.models.decoder import model as decoder
from train.run import assemble, step
from train.run import config as config_lib
from train.study import plots

_PAGE = pathlib.Path(__file__).parents[1] / "docs" / "scaling.md"
_BEGIN, _END = "<!-- benchmarks.scaling -->", "<!-- end -->"
# By name: the method of the program, and its options that set a rank.
_METHODS = {
  "LoRA": ("lora", ("rank",)),
  "Bi-LoRA": ("bilora", ("rank", "auxiliary_rank")),
}
_HEAD_SIZE, _VOCABULARY = 16, 512


@dataclasses.dataclass(frozen=True)
class Size:
  """The size of a step.

  Attributes:
    layers: the number of layers of the decoder.
    width: the width of its hidden states; a multiple of 32.
    length: tokens in a row.
    rank: the rank of LoRA, and of both adapters of Bi-LoRA.
    adapted: how many of the first layers have adapters; None: all layers.
    rows: rows in a batch.
  """

  layers: int = 4
  width: int = 128
  length: int = 128
  rank: int = 8
  adapted: int | None = None
  rows: int = 4


_START = Size()
_GROWTH: Mapping[str, Sequence[int]] = {
  "layers": (2, 4, 8, 16),
  "width": (64, 128, 256, 512),
  "length": (64, 128, 256, 512),
  "rank": (4, 8, 16, 32),
  "adapted": (1, 2, 3, 4),
}
# The numbers that are shown of a row: a label with a unit, and the size of this
# unit.
_SHOWN = {
  "compile_seconds": ("compile (s)", 1.0),
  "planned_bytes": ("planned memory (MiB)", 2.0**20),
  "median_seconds": ("step (ms)", 1e-3),
}


def main() -> None:
  options = _options()
  # The first compilation of a process also starts XLA, so it is not reported.
  measure(_START, 1, 0)
  rows = [
    {"axis": axis, "value": value, **row}
    for axis, values in _GROWTH.items()
    for value in values
    for row in measure(
      dataclasses.replace(_START, **{axis: value}),
      options.rounds,
      options.warmup,
    )
  ]
  result = rounds.circumstances(
    "benchmarks.scaling",
    device=jax.devices()[0].device_kind,
    start=dataclasses.asdict(_START),
    rounds=options.rounds,
    rows=rows,
  )
  name = f"scaling_{jax.default_backend()}.json"
  rounds.write(options.out or rounds.RESULTS / name, result)
  plots.save(_drawn(rows), options.page.with_suffix(".svg"))
  _put(options.page, _told(result))


def measure(size: Size, count: int, warmup: int) -> list[dict[str, Any]]:
  """Returns the rows of `rounds.compared`, with compile time and memory.

  Args:
    size: the size of the step.
    count: the number of rounds that are kept.
    warmup: the number of earlier rounds that are not kept.
  """
  workload = _workload(size)
  variables, batch = workload.variables(), jax.device_put(workload.batch)
  turns, more = {}, {}
  for name, (method_name, ranks) in _METHODS.items():
    last = size.layers if size.adapted is None else size.adapted
    layers = "|".join(map(str, range(last)))
    config = config_lib.build(
      {
        "method": method_name,
        **dict.fromkeys(ranks, size.rank),
        "targets": f"layers_({layers})/.*_proj",
        "warmup_ratio": 0.0,
      }
    )
    method = assemble.method_of(
      config, workload.model, workload.inputs, 1000, workload.objective
    )
    state = step.init(method, jax.random.key(0), variables)
    jitted: Any = step.make_train_step(method, workload.objective)
    start = time.perf_counter()
    train_step = jitted.lower(variables, state, batch).compile()
    more[name] = {
      "compile_seconds": time.perf_counter() - start,
      "planned_bytes": step_time.planned_bytes(train_step),
    }
    turns[name] = step_time.turn(train_step, variables, state, batch, 1)
  times = rounds.interleaved(turns, count, warmup)
  return [
    row | more[row["name"]] for row in rounds.compared(times, next(iter(times)))
  ]


def _workload(size: Size) -> workloads.Workload:
  heads = size.width // _HEAD_SIZE
  model = decoder.Decoder(
    decoder_config.DecoderConfig(
      vocab_size=_VOCABULARY,
      hidden_size=size.width,
      num_layers=size.layers,
      num_heads=heads,
      num_kv_heads=heads // 2,
      head_dim=_HEAD_SIZE,
      intermediate_size=3 * size.width,
      max_positions=size.length,
      tied=True,
    )
  )
  variables = jax.jit(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  )
  return workloads.of_decoder(model, variables, size.rows, size.length)


def _options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument("--warmup", type=int, default=2, help="rounds not kept")
  parser.add_argument("--out", type=pathlib.Path, help="of the JSON")
  parser.add_argument(
    "--page",
    type=pathlib.Path,
    default=_PAGE,
    help="a page with the comments that the table is put between; the plot is "
    "put beside it",
  )
  return parser.parse_args()


def _told(result: Mapping[str, Any]) -> str:
  """Returns the text for the page."""
  start = ", ".join(
    f"{name} {value}" for name, value in result["start"].items() if value
  )
  head = ["grows", "to"]
  head += [
    f"{shown}, {name}" for shown, _ in _SHOWN.values() for name in _METHODS
  ]
  head.append("step over LoRA's (quartiles)")
  lines = []
  by_size: dict[Any, list[Mapping[str, Any]]] = {}
  for row in result["rows"]:
    by_size.setdefault((row["axis"], row["value"]), []).append(row)
  for (axis, value), pair in by_size.items():
    cells = [
      f"{row[key] / unit:.1f}"
      for key, (_, unit) in _SHOWN.items()
      for row in pair
    ]
    lines.append([axis, str(value), *cells, rounds.ratio(pair[-1])])
  return "\n\n".join(
    [
      f"`{result['command']}`, {result['date']}, {result['cores']} cores "
      f"({result['machine']}), load average {result['load_average']}, jax "
      f"{result['versions']['jax']}. It starts at: {start}.",
      "![How a step grows](scaling.svg)",
      rounds.table(head, lines),
    ]
  )


def _put(page: pathlib.Path, told: str) -> None:
  """Puts text between the page's two comments."""
  before, _, rest = page.read_text().partition(_BEGIN)
  _, end, after = rest.partition(_END)
  if not end:
    raise SystemExit(f"{page} is to have {_BEGIN} and {_END}, in this order.")
  page.write_text(f"{before}{_BEGIN}\n\n{told}\n\n{_END}{after}")


def _drawn(rows: Sequence[Mapping[str, Any]]) -> figure.Figure:
  """Draws a grid: a column for each size that grows, a row for each cost."""
  names = list(dict.fromkeys(row["axis"] for row in rows))
  with plots.styled():
    canvas = figure.Figure((2 * len(names), 5), layout="constrained")
    grid = canvas.subplots(len(_SHOWN), len(names), sharey="row", squeeze=False)
    for i, (key, (shown, unit)) in enumerate(_SHOWN.items()):
      grid[i, 0].set_ylabel(shown)
      for place, axis in zip(grid[i], names):
        for name in _METHODS:
          found = [x for x in rows if (x["axis"], x["name"]) == (axis, name)]
          place.plot(
            [x["value"] for x in found],
            [x[key] / unit for x in found],
            marker="o",
            markersize=3,
            label=name,
          )
        place.set(xscale="log", yscale="log")
        place.set_xticks([], minor=True)
        values = [x["value"] for x in rows if x["axis"] == axis]
        place.set_xticks(values, map(str, values))
    for place, axis in zip(grid[-1], names):
      place.set_xlabel(axis)
    grid[0, 0].legend()
  return canvas


if __name__ == "__main__":
  main()
