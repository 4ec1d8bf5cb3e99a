"""Measures errors and times of attention kernels on this machine.

`python -m benchmarks.attention --out attention.json` compares each kernel's
output and gradients with float32 products of the highest precision. Then it
times a forward and a backward pass in interleaved rounds. It uses bfloat16 and
long rows on a GPU or TPU, and float32 and short rows on a CPU.
"""

import argparse
from collections.abc import Callable
import functools
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rounds
from train.models import attention

# The shapes (B, L, H, J, K) of MiniLM, SmolLM2-135M and Llama 3.1-8B, and a
# small shape for CPUs.
_SHAPES = ((64, 64, 12, 12, 32), (8, 1024, 9, 3, 64), (1, 8192, 32, 8, 128))
_SMALL = ((2, 64, 4, 2, 16),)
_CHECKED = (2, 512, 4, 2, 64)
# The most segments of a row, by case. cuDNN's ragged layout keeps a number for
# each segment, query and head.
_CASES = {
  "encoder": 1,
  "causal": 1,
  "padded": 1,
  "packed in 8": 8,
  "packed in 32": 32,
}

Kernel = Callable[..., jax.Array]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, help="a file for the figures")
  parser.add_argument("--rounds", type=int, default=10)
  parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
  parser.add_argument(
    "--shapes", help="B,L,H,J,K, more of them after a space each"
  )
  options = parser.parse_args()
  on_cpu = jax.default_backend() == "cpu"
  dtype = jnp.dtype(options.dtype or ("float32" if on_cpu else "bfloat16"))
  shapes = _SMALL if on_cpu else _SHAPES
  if options.shapes:
    shapes = [
      tuple(int(x) for x in shape.split(","))
      for shape in options.shapes.split()
    ]
  checked = _SMALL[0] if on_cpu else _CHECKED
  rows = []
  for case in _CASES:
    rows += _errors(case, checked, dtype)
  _print(rows, ("output", "dq", "dk", "dv"))
  for shape in shapes:
    for case in _CASES:
      found = _times(case, shape, dtype, options.rounds)
      _print(found, ("median_seconds", "ratio_to_xla", "temporary_bytes"))
      rows += found
  if options.out:
    device = jax.devices()[0].device_kind
    result = rounds.circumstances(
      "benchmarks.attention", device=device, dtype=dtype.name, rows=rows
    )
    rounds.write(options.out, result)


def _errors(case: str, shape: Any, dtype: Any) -> list[dict[str, Any]]:
  """Returns each kernel's largest error, divided by the largest value."""
  inputs, lengths = _inputs(case, shape, dtype)
  wide = [x.astype(jnp.float32) for x in inputs]
  reference = functools.partial(
    _reference, lengths=lengths, causal=case != "encoder"
  )
  wanted = _passes(reference)(*wide)
  rows = []
  for name, kernel in _kernels(case, shape, dtype, lengths).items():
    row: dict[str, Any] = {"case": case, "shape": shape, "kernel": name}
    try:
      found = _passes(kernel)(*inputs)
      for what, x, y in zip(("output", "dq", "dk", "dv"), found, wanted):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        row[what] = float(np.abs(x - y).max() / np.abs(y).max())
    except Exception as error:  # a missing kernel is a result, too
      row["error"] = _words(error)
    rows.append(row)
  return rows


def _times(
  case: str, shape: Any, dtype: Any, count: int
) -> list[dict[str, Any]]:
  inputs, lengths = _inputs(case, shape, dtype)
  rows, runs = [], {}
  for name, kernel in _kernels(case, shape, dtype, lengths).items():
    row: dict[str, Any] = {"case": case, "shape": shape, "kernel": name}
    rows.append(row)
    try:
      compiled = _passes(kernel).lower(*inputs).compile()
      memory = compiled.memory_analysis()
      if memory is not None:
        row["temporary_bytes"] = memory.temp_size_in_bytes
      jax.block_until_ready(compiled(*inputs))
    except Exception as error:  # missing or out of memory: a result, too
      row["error"] = _words(error)
      continue
    runs[name] = lambda run=compiled: jax.block_until_ready(run(*inputs))
  times = rounds.interleaved(runs, count, 2)
  for row in rows:
    if row["kernel"] in times:
      row["median_seconds"] = statistics.median(times[row["kernel"]])
    if row["kernel"] in times and "xla" in times:
      ratios = [x / y for x, y in zip(times[row["kernel"]], times["xla"])]
      row["ratio_to_xla"] = statistics.median(ratios)
  return rows


def _inputs(case: str, shape: Any, dtype: Any) -> tuple[Any, jax.Array]:
  """Returns q, k, v and cotangents; and the lengths of segments, (B, M)."""
  batch, length, heads, groups, size = shape
  random = np.random.default_rng(0)
  count = _CASES[case]
  cuts = np.sort(random.integers(1, length, (batch, count - 1)), 1)
  stops = np.full((batch, 1), length)
  if case != "causal":
    stops = random.integers(length // 2, length, (batch, 1))
    cuts = np.minimum(cuts, stops)
  lengths = np.diff(np.concatenate([cuts, stops], 1), axis=1, prepend=0)
  arrays = [
    random.standard_normal((batch, length, x, size))
    for x in (heads, groups, groups, heads)
  ]
  # Padding has no weight in the loss, so its cotangents are zero.
  arrays[3] *= (np.arange(length) < stops)[..., None, None]
  return [jnp.asarray(x, dtype) for x in arrays], jnp.asarray(
    lengths, jnp.int32
  )


def _kernels(
  case: str, shape: Any, dtype: Any, lengths: jax.Array
) -> dict[str, Kernel]:
  """Returns the kernels that this machine can run, by name."""
  length, size = shape[1], shape[-1]

  def kernel(choice, seen=None):
    if case == "encoder":
      real = jnp.arange(length) < lengths
      seen = attention.real(choice, real)
    seen = seen or attention.causal(choice, length, lengths)
    return functools.partial(attention.attention, seen=seen)

  found = {"xla": kernel("xla")}
  backend = jax.default_backend()
  if backend == "cpu" or case == "causal":
    found["matmul"] = kernel("matmul")
  if backend == "tpu":
    found["splash"] = kernel("splash")
  if backend != "gpu":
    return found
  if case in ("causal", "packed in 8"):
    found["triton"] = functools.partial(_triton, lengths=lengths)
  if attention.without_cudnn(dtype, size):
    return found
  found["cudnn"] = kernel("cudnn")
  if case == "padded":
    seen = attention.Seen("cudnn", causal=True, lengths=lengths)
    found["cudnn, lengths"] = kernel("cudnn", seen)
  if _CASES[case] > 1:
    mask = attention.causal("xla", length, lengths).mask
    found["cudnn, mask"] = kernel("cudnn", attention.Seen("cudnn", mask=mask))
  return found


def _triton(q, k, v, lengths):
  """Calls JAX's Triton kernel, which is deprecated since JAX 0.11."""
  import warnings

  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas.ops.gpu import attention as pallas
  groups = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, groups, 2) for x in (k, v))
  segments = None
  if lengths.shape[1] > 1:
    segments = attention.ids(lengths, q.shape[1])
  return pallas.mha(
    q, k, v, segments, sm_scale=q.shape[-1] ** -0.5, causal=True
  )


def _reference(q, k, v, lengths, causal):
  length, groups = q.shape[1], q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, groups, 2) for x in (k, v))
  segments = attention.ids(lengths, length)
  seen = segments[:, None, :, None] == segments[:, None, None]
  if causal:
    seen &= jnp.tri(length, dtype=bool)
  product = functools.partial(jnp.einsum, precision="highest")
  scores = product("blhk,bshk->bhls", q, k) * q.shape[-1] ** -0.5
  probs = jax.nn.softmax(jnp.where(seen, scores, -1e9))
  return product("bhls,bshk->blhk", probs, v)


def _passes(kernel: Kernel) -> Any:
  """Returns a function that computes the output and the gradients.

  The output is 0 at padding. The gradients are those of a weighted sum of the
  output.
  """

  def run(q, k, v, weights):
    y, gradients = jax.vjp(kernel, q, k, v)
    return jnp.where(weights != 0, y, 0), *gradients(weights)

  return jax.jit(run)


def _words(error: Exception) -> str:
  return f"{type(error).__name__}: {str(error)[:300]}"


def _print(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
  def cell(row, column):
    if "error" in row:
      return row["error"][:60] if column == columns[0] else ""
    value = row.get(column)
    return "" if value is None else f"{value:.3g}"

  head = ("case", "shape", "kernel")
  print(
    rounds.table(
      (*head, *columns),
      [
        [str(row[x]) for x in head] + [cell(row, x) for x in columns]
        for row in rows
      ],
    ),
    flush=True,
  )


if __name__ == "__main__":
  main()
