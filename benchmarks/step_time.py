"""Measures time and memory of a step of LoRA, Bi-LoRA and other methods.

  python -m benchmarks.step_time --workload minilm

Each round runs every method on the same batch, in a new random order. Machines
are noisy, so a method's time is divided by LoRA's time in the same round. The
result is the median of these ratios over the rounds. If the device counts its
memory, as GPUs do, each method also runs in a process of its own. The memory is
then the peak of this process, which includes making the weights and compiling.
On a CPU, the memory is the memory that the compiler plans for a step.
"""

import argparse
from collections.abc import Callable
from concurrent import futures
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import rounds, variants, workloads
from train.run import step

# Dense bfloat16 operations a second, from the makers' data sheets.
_PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


def main() -> None:
  options = _options()
  if options.memory_of:
    print(_peak_bytes(options))
    return
  with tempfile.TemporaryDirectory() as cache:
    # First, because this process will take the whole device.
    peaks = _peaks(options, cache) if _backend() != "cpu" else {}
    jax.config.update("jax_compilation_cache_dir", cache)
    result = measure(options, peaks)
  print(_table(result))
  every = "_all" if options.all_methods else ""
  name = f"step_time_{options.workload}{every}_{jax.default_backend()}.json"
  rounds.write(options.out or rounds.RESULTS / name, result)


def measure(
  options: argparse.Namespace, peaks: dict[str, int | None]
) -> dict[str, Any]:
  """Times every method.

  Args:
    options: the options of the command line.
    peaks: peak bytes by method, from processes of their own.
  """
  workload = workloads.from_options(options)
  variables = workload.variables()
  batch = jax.device_put(workload.batch)
  turns, planned = {}, {}
  for name in _names(options):
    turns[name], planned[name] = compiled_turn(
      name, workload, variables, batch, options.steps
    )
  rows = rounds.compared(
    rounds.interleaved(turns, options.rounds, options.warmup), variants.BASE
  )
  kind = jax.devices()[0].device_kind
  in_bfloat16 = jnp.dtype(workload.dtype) == jnp.bfloat16
  peak_flops = _PEAK_FLOPS.get(kind) if in_bfloat16 else None
  for row in rows:
    row["median_seconds"] /= options.steps
    row["tokens_per_second"] = workload.tokens / row["median_seconds"]
    row["model_flop_utilisation"] = peak_flops and (
      workload.model_flops / row["median_seconds"] / peak_flops
    )
    row["planned_bytes"] = planned[row["name"]]
    row["peak_bytes"] = peaks.get(row["name"])
    row["gradients"] = variants.gradients(row["name"])
  return rounds.circumstances(
    "benchmarks.step_time",
    device=kind,
    workload=options.workload,
    unrolled=options.unrolled,
    batch=list(workload.batch["tokens"].shape),
    rounds=options.rounds,
    steps_a_turn=options.steps,
    model_flops=workload.model_flops,
    peak_flops=peak_flops,
    rows=rows,
  )


def _options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  workloads.add_options(parser)
  parser.add_argument("--rounds", type=int, default=30)
  parser.add_argument("--warmup", type=int, default=3, help="rounds not kept")
  parser.add_argument(
    "--steps",
    type=int,
    default=1,
    help="steps of a method in a round; more where one is a few milliseconds",
  )
  parser.add_argument("--out", type=pathlib.Path)
  parser.add_argument(
    "--memory-jobs",
    type=int,
    default=1,
    help="processes at once whose peaks are taken: as many as the device holds",
  )
  parser.add_argument(
    "--methods", nargs="+", choices=variants.ALL, help="some, LoRA r=8 first"
  )
  parser.add_argument(
    "--all-methods",
    action="store_true",
    help="every method of the program, and not the main five alone",
  )
  parser.add_argument(
    "--memory-of", choices=variants.ALL, help=argparse.SUPPRESS
  )
  return parser.parse_args()


def _names(options: argparse.Namespace) -> tuple[str, ...]:
  if options.methods:
    return tuple(options.methods)
  return variants.ALL if options.all_methods else variants.NAMES


def compiled_turn(
  name: str,
  workload: workloads.Workload,
  variables: Any,
  batch: Any,
  steps: int,
) -> tuple[Callable[[], None], int | None]:
  """Returns a function that runs some steps, and the planned bytes of one."""
  method = variants.method(name, workload)
  state = step.init(method, jax.random.key(0), variables)
  jitted: Any = step.make_train_step(method, workload.objective)
  train_step = jitted.lower(variables, state, batch).compile()
  return (
    turn(train_step, variables, state, batch, steps),
    planned_bytes(train_step),
  )


def turn(
  train_step: Any, variables: Any, state: Any, batch: Any, steps: int
) -> Callable[[], None]:
  """Returns a function that runs the next steps and waits for them."""

  def run():
    nonlocal state
    metrics = None
    for _ in range(steps):
      state, metrics = train_step(variables, state, batch)
    jax.block_until_ready((state, metrics))

  return run


def planned_bytes(compiled: jax.stages.Compiled) -> int | None:
  """Returns the bytes that the compiler plans for a program, if known."""
  memory = compiled.memory_analysis()
  return memory and (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )


def _backend() -> str:
  """Returns JAX's default backend, from a process that then frees it."""
  code = "import jax; print(jax.default_backend())"
  return subprocess.run(
    [sys.executable, "-c", code], check=True, capture_output=True, text=True
  ).stdout.split()[-1]


def _peaks(options: argparse.Namespace, cache: str) -> dict[str, int | None]:
  """Returns the peak bytes of each method, from a process of its own.

  Several processes can run at once, because each counts only its own memory. A
  thread waits for each of them.
  """
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": cache,
    # With preallocation, the peak would be the size of the pool at the start.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }

  def peak(name: str) -> int | None:
    print(f"memory of {name}", file=sys.stderr, flush=True)
    alone = subprocess.run(
      [
        *(sys.executable, "-m", "benchmarks.step_time"),
        *(*sys.argv[1:], "--memory-of", name),
      ],
      env=environment,
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
    return json.loads(alone.stdout.splitlines()[-1])

  names = _names(options)
  with futures.ThreadPoolExecutor(options.memory_jobs) as threads:
    return dict(zip(names, threads.map(peak, names)))


def _peak_bytes(options: argparse.Namespace) -> str:
  workload = workloads.from_options(options)
  turn, _ = compiled_turn(
    options.memory_of,
    workload,
    workload.variables(),
    jax.device_put(workload.batch),
    steps=3,
  )
  turn()
  statistics = jax.devices()[0].memory_stats() or {}
  return json.dumps(statistics.get("peak_bytes_in_use"))


def _table(result: dict[str, Any]) -> str:
  measured = any(row["peak_bytes"] for row in result["rows"])
  head = [
    f"{result['workload']}, {' x '.join(map(str, result['batch']))} tokens",
    "gradients a step",
    "median step (s)",
    "over LoRA r=8 (quartiles)",
    "tokens/s",
    "model FLOP utilisation",
    "peak memory (GiB)" if measured else "planned memory (GiB)",
  ]
  rows = []
  for row in result["rows"]:
    utilisation = row["model_flop_utilisation"]
    memory = row["peak_bytes"] if measured else row["planned_bytes"]
    rows.append(
      [
        row["name"],
        f"{row['gradients']:g}",
        f"{row['median_seconds']:.4f}",
        rounds.ratio(row),
        f"{row['tokens_per_second']:,.0f}",
        f"{utilisation:.1%}" if utilisation else "",
        f"{memory / 2**30:.2f}" if memory else "",
      ]
    )
  return rounds.table(head, rows)


if __name__ == "__main__":
  main()
