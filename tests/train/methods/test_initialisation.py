"""`--start`: runs whose primary starts elsewhere than at LoRA's own draw."""

import signal

import jax
import numpy as np
from outcomes import adapters as saved
from outcomes import assert_same_bits
import pytest

import bilora_jax
from train.run import checkpoints, step

TAKEN_OUT = ("pissa", "olora", "lora_ga")


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", *TAKEN_OUT])
def test_a_run_starts_at_the_model_as_it_came(prepared, batch, start):
  plain, ready = prepared(), prepared(start=start)
  inputs = plain.data.objective.inputs(batch)
  state = step.init(ready.method, jax.random.key(0), ready.variables)
  wanted = plain.model.apply(plain.variables, *inputs)
  for logits in (
    ready.method.apply(ready.variables, state.trained, *inputs),
    ready.model.apply(ready.pretrained(), *inputs),
  ):
    # In float32, of logits of order 1, after layers whose weights are split.
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5)
  kernel = "params", "encoder", "layer_0", "query", "kernel"
  ours, theirs = ready.variables, plain.variables
  for name in kernel:
    ours, theirs = ours[name], theirs[name]
  assert np.array_equal(ours, theirs) is (start not in TAKEN_OUT)
  drawn = step.init(plain.method, jax.random.key(0), plain.variables)
  primary = ("primary", "encoder", "layer_0", "query", "kernel")
  ours, theirs = state.trained, drawn.trained
  for name in primary:
    ours, theirs = ours[name], theirs[name]
  assert not np.allclose(ours.a, theirs.a)


def test_the_auxiliary_starts_where_it_is_told_to(prepared):
  fields = {"auxiliary_start": "scattered"}
  own, others = (
    step.init(x.method, jax.random.key(0), x.variables).trained["auxiliary"]
    for x in (prepared(**fields), prepared(**fields, start="gaussian"))
  )
  jax.tree.map(np.testing.assert_array_equal, own, others)
  assert any(np.any(x) for x in jax.tree.leaves(own))


def test_an_interrupted_run_resumes_and_keeps_adapters_for_the_original(
  prepared, run, tmp_path, batch, monkeypatch, capsys, signal_at
):
  """And what it tested is what its adapters do beside the weights as read."""
  options = ("--start", "lora_ga", "--no-baseline")
  assert run(tmp_path / "whole", *options) == 0

  signal_at(signal.SIGTERM, 7)
  assert run(tmp_path / "run", *options) == 0
  monkeypatch.undo()
  assert run(tmp_path / "run", *options) == 0
  assert "resumed after step 7" in capsys.readouterr().out
  assert_same_bits(saved(tmp_path / "run"), saved(tmp_path / "whole"))

  plain = prepared()
  inputs = plain.data.objective.inputs(batch)
  folder = tmp_path / "run" / "adapters"
  spec = bilora_jax.load_spec(folder)
  assert spec.rank == 2 * plain.config.adapter.rank
  adapted = bilora_jax.adapt(plain.model, spec, *inputs)
  loaded = bilora_jax.load_adapters(folder, adapted)
  logits = adapted.apply(plain.variables, loaded, *inputs)

  ready = prepared(start="lora_ga")
  best = _best(ready, tmp_path / "run")
  wanted = ready.method.apply(ready.variables, best, *inputs)
  np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5)
  moved = plain.model.apply(plain.variables, *inputs) - logits
  assert np.abs(moved).max() > 1e-2


def _best(ready, folder):
  """What a run's best checkpoint holds."""
  state = step.init(ready.method, jax.random.key(0), ready.variables)
  store = checkpoints.Checkpoints(folder / "checkpoints")
  newest = max(int(p.name) for p in (folder / "checkpoints/best").iterdir())
  try:
    return store.best(newest, ready.method.evaluated(state.trained))
  finally:
    store.close()


@pytest.mark.parametrize(
  ("more", "part"),
  [
    (
      ("--method", "full", "--start", "pissa"),
      "--start is an option of adapters",
    ),
    (("--start", "pissa", "--mesh", "data=8"), "got it with --mesh"),
    (("--start", "olora", "--base-dtype", "nf4"), "got it with --base-dtype"),
    (("--start", "lora_ga", "--dora"), "got it with --dora"),
    (("--start", "lora_ga", "--rank", "12"), "encoder/layer_0"),
  ],
)
def test_a_start_that_cannot_be_is_refused(run, tmp_path, capsys, more, part):
  assert run(tmp_path / "run", *more) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert part in line
  assert not list(tmp_path.iterdir())
