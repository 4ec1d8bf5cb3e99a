"""The study of other adapters measures and reports what it says."""

import functools
import json
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilora_jax
from studies import adapters as study
from train.models.bert import model as bert

_CONFIG = bert.BertConfig(
  vocab_size=30,
  hidden_size=8,
  num_layers=3,
  num_heads=2,
  intermediate_size=12,
)
_FIRST = 2
_LENGTH = 5
_UPPER: Any = study.Upper(_CONFIG, 2, _FIRST)


def _split(rows: int, seed: int = 0) -> study.Split:
  keys = jax.random.split(jax.random.key(seed), 2)
  return study.Split(
    jax.random.normal(keys[0], (rows, _LENGTH, _CONFIG.hidden_size)),
    jnp.arange(_LENGTH) < 1 + jnp.arange(rows)[:, None] % _LENGTH,
    jax.random.randint(keys[1], (rows,), 0, 2),
  )


@functools.cache
def _whole() -> tuple[Any, Any]:
  model = bert.BertClassifier(_CONFIG, 2)
  tokens = jnp.zeros((1, _LENGTH), jnp.int32)
  return model, jax.jit(model.init)(jax.random.key(0), tokens, tokens + 1)


def test_the_cached_form_has_the_whole_models_logits():
  first = 1
  model, variables = _whole()
  mask = _split(6).mask
  tokens = jax.random.randint(jax.random.key(1), mask.shape, 0, 30) * mask
  below = bert.BertConfig(**{**vars(_CONFIG), "num_layers": first})
  x = jax.jit(study.lower, static_argnums=0)(below, variables, tokens, mask)
  got: Any = jax.jit(study.Upper(_CONFIG, 2, first).apply)(
    study.upper_variables(variables, first), x, mask
  )
  # The layers are the same programs.
  np.testing.assert_allclose(
    got, jax.jit(model.apply)(variables, tokens, mask), rtol=1e-6, atol=1e-6
  )
  assert np.ptp(np.asarray(got)) > 1e-3


def _started(arm: study.Arm) -> tuple[study.Method, dict, dict]:
  variables = study.upper_variables(_whole()[1], _FIRST)
  own = study.method(arm, _UPPER)
  return own, variables, jax.jit(own.init)(jax.random.key(2), variables)


@pytest.mark.parametrize(
  "arm",
  [
    study.Arm(study.LORA, "LoHa"),
    study.Arm(study.LORA, study.SHARED),
    study.Arm(study.PROMPT, study.PROMPT),
    study.Arm(study.BOTTLENECK, study.BOTTLENECK),
  ],
  ids=lambda x: x.name,
)
def test_an_arm_begins_at_the_model_and_at_the_arm_alone(arm):
  own, variables, params = _started(arm)
  alone = _started(study.Arm(arm.primary))[2]
  kept = bilora_jax.without_auxiliary(params)
  jax.tree.map(np.testing.assert_array_equal, kept, alone)
  if arm.primary == study.PROMPT:
    return  # its first tokens are no zeros
  rows = _split(4)
  np.testing.assert_allclose(
    jax.jit(own.logits)(variables, params, rows.x, rows.mask),
    jax.jit(_UPPER.apply)(variables, rows.x, rows.mask),
    rtol=1e-6,
    atol=1e-6,
  )


def _by_path(tree: Any) -> dict[Any, Any]:
  return traverse_util.flatten_dict(
    tree, is_leaf=lambda _, x: hasattr(x, "squared_norm")
  )


def _gradient_norm(variables, params, batch):
  """The norm of the gradient in the adapted kernels, at the primary alone."""
  nodes = _by_path(params["primary"])
  others = _by_path(variables["params"]) | _by_path(params["extra"])
  kernels = {
    path: others[path] * (1 + node.gain)
    if hasattr(node, "gain")
    else others[path] + node.weight()
    for path, node in nodes.items()
  }

  def loss_fn(kernels):
    merged = traverse_util.unflatten_dict(others | kernels)
    logits = _UPPER.apply({"params": merged}, batch.x, batch.mask)
    return study.loss(logits, batch.labels)

  return optax.tree.norm(jax.jit(jax.grad(loss_fn))(kernels))


@pytest.mark.parametrize(
  "arm",
  [
    study.Arm(study.LORA, study.LORA),
    study.Arm("(IA)^3", "(IA)^3"),
  ],
  ids=lambda x: x.name,
)
def test_the_cosine_is_the_slope_along_the_auxiliary(arm):
  own, variables, params = _started(arm)

  def moved(path, x):
    # Norms of kernels are data, and no step moves them.
    if getattr(path[-1], "name", "") == "norms":
      return x
    return x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)

  params = jax.tree_util.tree_map_with_path(moved, params)
  batch = _split(4)

  def loss_at(t):
    auxiliary = jax.tree_util.tree_map_with_path(
      lambda path, x: x * t if path[-1].name in ("b", "gain") else x,
      params["auxiliary"],
    )
    both = {**params, "auxiliary": auxiliary}
    logits = own.logits(variables, both, batch.x, batch.mask)
    return study.loss(logits, batch.labels)

  slope = jax.jit(jax.grad(loss_at))(0.0)
  programs = study.programs(arm, _UPPER, 1)
  sizes = programs.norm(params) * _gradient_norm(variables, params, batch)
  np.testing.assert_allclose(
    programs.cosine(variables, params, batch), slope / sizes, rtol=1e-3
  )


def test_a_run_ends_in_the_ball_and_is_tested_without_the_auxiliary():
  arm, rho = study.Arm(study.LORA, "(IA)^3"), 0.005
  variables = study.upper_variables(_whole()[1], _FIRST)
  rows, held_out = _split(12), _split(7, seed=1)
  batches = np.arange(12).reshape(2, 2, 3)
  run = study.Run("final", "clean labels", arm, 0.05, rho, 3)
  own, alone = (
    study.programs(x, _UPPER, batches[..., 0].size)
    for x in (arm, study.Arm(study.LORA))
  )
  asked = []

  def right(variables, params, split):
    asked.append((sorted(params), len(split.labels)))
    return alone.right(variables, params, split)

  measured = study.train(
    own, alone._replace(right=right), variables, rows, held_out, batches, run
  )
  assert asked == [(["extra", "primary"], 7)]
  assert measured.norm_over_rho is not None
  assert 0.5 < measured.norm_over_rho < 1 + 1e-4
  assert measured.cosine is not None and abs(measured.cosine) <= 1


def _measure(run: study.Run) -> study.Measured:
  """As if the second of a grid were best, and auxiliaries gained."""
  point = run.rho or run.learning_rate
  grid = study.RHOS if run.arm.auxiliary else study.RATES[run.arm.primary]
  gain = 0.02 if run.arm.auxiliary else 0.0
  accuracy = 0.5 + 0.1 * (point == grid[1]) + 0.01 * (run.seed % 3) + gain
  return study.Measured(accuracy, 0.4, *((1.0, 0.1) if gain else (None, None)))


@pytest.fixture
def small(monkeypatch):
  """Two kinds of primaries, three auxiliaries and two seeds."""
  rates = {x: study.RATES[x] for x in (study.LORA, "(IA)^3")}
  monkeypatch.setattr(study, "RATES", rates)
  monkeypatch.setattr(study, "ALONE", tuple(map(study.Arm, rates)))
  duals = [study.Arm(x, x) for x in rates]
  duals.append(study.Arm(study.LORA, "(IA)^3"))
  monkeypatch.setattr(study, "DUAL", tuple(duals))
  monkeypatch.setattr(study, "FINAL", (0, 1))


def test_runs_are_appended_and_not_repeated(small, tmp_path: pathlib.Path):
  path = tmp_path / "runs.jsonl"
  asked: list[str] = []

  def measure(run):
    asked.append(run.key)
    if len(asked) == 5:
      raise KeyboardInterrupt
    return _measure(run)

  with pytest.raises(KeyboardInterrupt):
    study.run_all(path, measure, 1e3)
  assert len(study.finished(path)) == 4
  with path.open("a") as file:
    file.write('{"key": "cut by a kill')
  study.run_all(path, measure, 1e3)
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  keys = [row["key"] for row in rows]
  assert asked[:4] + asked[5:] == keys
  assert asked[5] == asked[4]
  # Two regimes of two kinds with three rates, of three auxiliaries with two
  # radii, and of five arms to test; each with two seeds.
  assert len(keys) == len(set(keys)) == 2 * 2 * (2 * 3 + 3 * 2 + 5)
  study.run_all(path, measure, 1e3)
  assert len(asked) == len(keys) + 1
  tested = [row for row in rows if row["stage"] == "final"]
  assert {row["learning_rate"] for row in tested} == {1.5e-3, 1.5e-2}
  assert {row["rho"] for row in tested} == {0.0, study.RHOS[1]}


def test_the_report_is_made_of_the_rows(small, tmp_path: pathlib.Path):
  path = tmp_path / "runs.jsonl"
  study.run_all(path, _measure, 1e3)
  rows = study.finished(path)
  text = study.report(rows)
  line = "| LoRA + LoRA | 0.0015 | 0.5 | 2 | 62.50 ± 6.35 | +2.00 ± 0.00 | "
  # Both signs of two equal differences: the least p is a half.
  line += "0.500 | 1.000 | 0.400 ± 0.000 | 1.00 ± 0.00 | 0.10 ± 0.00 |"
  assert text.count(line) == 2
  assert "| LoRA + nothing | 0.0015 |  | 2 | 60.50 ± 6.35 |  |  |  | " in text
  # A test row of a point that did not win does not count.
  lost = next(x for x in rows.values() if x["stage"] == "final")
  other = {**lost, "key": lost["key"].replace("0.0015", "0.005"), "accuracy": 0}
  assert study.finals({**rows, other["key"]: other}) == study.finals(rows)
  # A seed that the primary alone lacks is no pair.
  fewer = {key: row for key, row in rows.items() if row is not lost}
  paired = study.gains(study.finals(fewer), lost["regime"])
  assert len(paired[study.Arm(study.LORA, study.LORA)]) == 1
  assert study.figure(rows).axes


def test_the_committed_report_is_that_of_the_committed_rows():
  rows = study.finished(study.FOLDER / "runs.jsonl")
  assert (study.FOLDER / "report.md").read_text() == study.report(rows)
  # Runs of one key would be one run, and keys say what was run.
  assert {run.key for run in study.plan(rows)} >= set(rows)
