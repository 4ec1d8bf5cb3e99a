"""How well cheap perturbations point along the gradient of their batch.

  python -m studies.candidates            runs what is missing, then reports
  python -m studies.candidates --report   reports alone

SAM perturbs the weights along the gradient G of the batch at hand. A candidate
is another perturbation D of the adapted weights, and its cosine with G over all
of them is the share of SAM's first-order rise that it has at the same radius.

The protocol, written before any run (2026-11-28):

- LoRA of rank 8 trains MiniLM on 1,000 snippets of which 40% have the wrong
  label: noise.toml's main task, with the learning rate that won there, batches
  of 32 rows and six epochs. There are three seeds.
- At the steps 20, 60, 100, 140 and 170, G is the gradient of the next batch's
  loss by all adapted kernels, at the weights that the step meets.
- Candidates from the same batch: the best approximations of each rank, low-rank
  approximations from two sketches, projections onto few inputs, other balls.
- Candidates from other rows, which cost nothing: the other half of the batch,
  other batches at the same weights, moving averages over the steps before.
- The mean is over seeds and steps. Nothing is chosen by these figures.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
import json
import pathlib
import statistics
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilora_jax import Factors
from bilora_jax.variants import _sketches
from train import files, jsonl
from train.methods.trained import kernels
from train.run import assemble, step
from train.run import config as config_lib

FOLDER = pathlib.Path(__file__).with_name("candidates")
SEEDS = (0, 1, 2)
STEPS = (20, 60, 100, 140, 170)
OTHERS = 8
_OPTIONS = {
  "task": "snippets",
  "model": "minilm",
  "method": "lora",
  "label_noise": 0.4,
  "train_rows": 1000,
  "eval_rows": 100,
  "batch_size": 32,
  "epochs": 6,
  "max_length": 48,
  "learning_rate": 3e-4,
}
_DECAYS = (0.5, 0.9)

Kernels = Mapping[str, jax.Array]
"""An array (in, out) for each adapted kernel."""


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--report", action="store_true")
  options = parser.parse_args()
  FOLDER.mkdir(exist_ok=True)
  path = FOLDER / "runs.jsonl"
  rows = jsonl.read_log(path)
  if not options.report:
    for seed in SEEDS:
      if not any(row["seed"] == seed for row in rows):
        rows += measure(seed, _OPTIONS, STEPS)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        files.write_atomically(path, text)
  if not rows:
    parser.exit(2, f"error: {path} has no rows; leave out --report to run.\n")
  files.write_atomically(FOLDER / "report.md", report(rows))


def measure(
  seed: int, options: Mapping[str, Any], steps: tuple[int, ...]
) -> list[dict[str, Any]]:
  """The candidates' cosines in one run.

  Args:
    seed: of the run.
    options: of the program.
    steps: before which the cosines are taken.

  Returns:
    A row a step: `seed`, `step`, `loss` of the batch, and `cosines` by name.
  """
  with tempfile.TemporaryDirectory() as folder:
    config = config_lib.build({**options, "seed": seed, "run_dir": folder})
    prepared = assemble.prepare(config)
  method, objective = prepared.method, prepared.data.objective
  assert method.adapted is not None
  variables = prepared.variables
  state = step.init(method, jax.random.key(seed), variables)
  train_step: Any = step.make_train_step(method, objective)
  gradient = _gradient(method, objective)
  averages: dict[float, Any] = dict.fromkeys(_DECAYS)
  rows = []
  # The first batches of the next epochs are the other batches of this one.
  batches = _ahead(prepared.data.train_batches(), OTHERS)
  for number in range(max(steps) + 1):
    batch, others = next(batches)
    weights = method.evaluated(state.trained)
    now, loss = gradient(variables, weights, batch)
    if number in steps:
      halves = [
        gradient(variables, weights, half)[0] for half in _halves(batch)
      ]
      other = [gradient(variables, weights, x)[0] for x in others]
      found = _cosines(
        jax.random.fold_in(jax.random.key(seed), number),
        now,
        halves,
        other,
        averages,
        _bases(state.trained["primary"]),
        _sizes(method, variables, weights),
      )
      cosines = {name: float(x) for name, x in found.items()}
      rows.append(
        {"seed": seed, "step": number, "loss": float(loss), "cosines": cosines}
      )
      print(json.dumps(rows[-1]), flush=True)
    for decay, average in averages.items():
      old = now if average is None else average
      averages[decay] = optax.tree.update_moment(now, old, decay, 1)
    state, _ = train_step(variables, state, batch)
  return rows


def report(rows: list[dict[str, Any]]) -> str:
  """The page: a table of the candidates, means and ranges over the rows."""
  lines = [
    "# Candidates for the adversary",
    "",
    "The command is `python -m studies.candidates`, and its docstring has the "
    "protocol.",
    f"It has {len(rows)} points, of {len({x['seed'] for x in rows})} run(s) of "
    f"{len(SEEDS)}.",
    "",
    "| perturbation | cosine with the batch's gradient, mean | least | most |",
    "|---|---|---|---|",
  ]
  values_of = {
    name: [row["cosines"][name] for row in rows] for name in rows[0]["cosines"]
  }
  ordered = sorted(
    values_of.items(), key=lambda item: -statistics.mean(item[1])
  )
  for name, values in ordered:
    lines.append(
      f"| {name} | {statistics.mean(values):.2f} | {min(values):.2f} | "
      f"{max(values):.2f} |"
    )
  return "\n".join(lines) + "\n"


@jax.jit
def _cosines(
  key: jax.Array,
  now: Kernels,
  halves: list[Kernels],
  others: list[Kernels],
  averages: Mapping[float, Kernels],
  bases: Kernels,
  sizes: Kernels,
) -> dict[str, jax.Array]:
  """Cosines of the candidates with the gradient, by the candidates' names."""
  mean = jax.tree.map(lambda *x: sum(x) / len(x), *others)
  parts = _decomposed(now)
  found: dict[str, tuple[Kernels, Kernels]] = {
    f"same batch, best of rank {rank}": (_cut(parts, rank), now)
    for rank in (1, 2, 4, 8, 16, 32)
  }
  for rank in (4, 8, 16, 32):
    name = (
      f"same batch, from two random sketches of rank {rank}, core {rank // 2}"
    )
    found[name] = _sketched(key, now, rank), now
  for rank in (8, 16):
    name = f"same batch, onto {rank} random inputs (a frozen a)"
    found[name] = _projected(key, now, rank), now
  found["same batch, onto the inputs of the primary's a"] = (
    {name: bases[name] @ (bases[name].T @ g) for name, g in now.items()},
    now,
  )
  found["same batch, a ball for each layer"] = (
    {name: g / jnp.linalg.norm(g) for name, g in now.items()},
    now,
  )
  found["same batch, scaled by the weights (ASAM)"] = (
    {name: sizes[name] ** 2 * g for name, g in now.items()},
    now,
  )
  late = {
    "the other half of the batch, for a half": (halves[1], halves[0]),
    "another batch": (others[0], now),
    f"the mean of {len(others)} other batches": (mean, now),
  }
  late |= {
    f"a moving average of the steps before, decay {decay}": (average, now)
    for decay, average in averages.items()
  }
  found |= late
  name = f"the mean of {len(others)} other batches, of rank 8"
  found[name] = _cut(_decomposed(mean), 8), now
  return {name: _cosine(*pair) for name, pair in found.items()}


def _cosine(x: Kernels, y: Kernels) -> jax.Array:
  def dot(x, y):
    return sum(jnp.vdot(x[name], y[name]) for name in x)

  return dot(x, y) / jnp.sqrt(dot(x, x) * dot(y, y))


def _decomposed(gradient: Kernels) -> dict[str, Any]:
  return {
    name: jnp.linalg.svd(g, full_matrices=False) for name, g in gradient.items()
  }


def _cut(parts: Mapping[str, Any], rank: int) -> Kernels:
  """The best approximation of a rank, from a singular value decomposition."""
  return {
    name: (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    for name, (u, sigma, vt) in parts.items()
  }


def _sketched(key: jax.Array, gradient: Kernels, rank: int) -> Kernels:
  """What `nystroem_ascent` makes of the gradient, by the library's code."""
  like = {
    name: Factors(jnp.zeros((g.shape[0], 1)), jnp.zeros((1, g.shape[1])), 1.0)
    for name, g in gradient.items()
  }
  pairs = _sketches.drawn(key, like, rank)
  grads = {
    name: Factors(gradient[name] @ pair.b.T, pair.a.T @ gradient[name], 1.0)
    for name, pair in pairs.items()
  }
  ascent = _sketches.ascent(pairs, grads, None, 1.0)
  return {name: pair.weight() for name, pair in ascent.items()}


def _projected(key: jax.Array, gradient: Kernels, rank: int) -> Kernels:
  def one(i, g):
    draw = jax.random.normal(jax.random.fold_in(key, i), (g.shape[0], rank))
    basis = jnp.linalg.qr(draw)[0]
    return basis @ (basis.T @ g)

  return {
    name: one(i, g) for i, (name, g) in enumerate(sorted(gradient.items()))
  }


def _bases(primary: Any) -> Kernels:
  """Orthonormal bases of the columns of the primary's a."""
  pairs = _named(primary, lambda x: isinstance(x, Factors))
  return {name: jnp.linalg.qr(pair.a)[0] for name, pair in pairs.items()}


def _sizes(method: Any, variables: Any, weights: Any) -> Kernels:
  merged = method.adapted.merge(variables, weights)
  named = _named(kernels(method.adapted)(merged))
  return {name: jnp.abs(x) for name, x in named.items()}


def _gradient(method: Any, objective: Any) -> Callable[..., Any]:
  """`(variables, trained, batch)` to the kernels' gradient and the loss."""
  dense = method._replace(weights=kernels(method.adapted))

  @jax.jit
  def gradient(variables, trained, batch):
    def loss_fn(weights):
      params = {"trained": trained, "weights": weights}
      own, all_variables = dense.unpacked(params, variables)
      answer = method.apply(all_variables, own, *objective.inputs(batch))
      items = objective.items(answer, batch)
      return items.mean(items.losses)

    loss, grads = jax.value_and_grad(loss_fn)(dense.weights(variables))
    return _named(grads), loss

  return gradient


def _named(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return {jax.tree_util.keystr(path): x for path, x in leaves}


def _halves(batch: Any) -> list[Any]:
  return [
    jax.tree.map(lambda x: x[0::2], batch),
    jax.tree.map(lambda x: x[1::2], batch),
  ]


def _ahead(batches: Iterator[Any], count: int) -> Iterator[tuple[Any, list]]:
  """Each batch, with those that come after it."""
  window = [next(batches) for _ in range(count + 1)]
  while True:
    yield window[0], window[1:]
    window = [*window[1:], next(batches)]


if __name__ == "__main__":
  main()
