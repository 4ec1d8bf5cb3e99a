"""What the auxiliary is said to do, against dense weights and gradients."""

import json

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilora_jax import Factors
from train.data.objectives import CLASSIFICATION
from train.run import diagnostics, step


def _moved(tree, seed):
  keys = iter(jax.random.split(jax.random.key(seed), 1000))
  return jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), tree
  )


def _dense(pairs):
  flat = traverse_util.flatten_dict(
    pairs, is_leaf=lambda _, x: isinstance(x, Factors)
  )
  return {path: np.float64(pair.weight()) for path, pair in flat.items()}


def _cosine(left, right):
  x, y = (
    np.concatenate([np.ravel(tree[path]) for path in left])
    for tree in (left, right)
  )
  return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


def test_the_cosines_are_those_of_dense_weights_and_gradients(prepared, batch):
  ready = prepared()
  method = ready.method
  trained = _moved(method.init(jax.random.key(0), ready.variables), seed=1)
  before = _moved(trained["auxiliary"], seed=2)
  found = diagnostics.make(method, CLASSIFICATION)(
    ready.variables, trained, before, batch
  )

  @jax.jit
  def gradient(variables):
    def loss(params):
      logits = ready.model.apply(
        {"params": params}, *CLASSIFICATION.inputs(batch)
      )
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, batch["labels"]
      ).mean()

    return jax.grad(loss)(variables["params"])

  def of_kernels(variables):
    flat = traverse_util.flatten_dict(gradient(variables))
    return {path: np.float64(flat[path]) for path in own}

  own = _dense(trained["auxiliary"])
  # The plain model at W0 + primary, and with the auxiliary added by hand.
  without = method.adapted.merge(ready.variables, method.evaluated(trained))
  flat = traverse_util.flatten_dict(without["params"])
  flat |= {path: flat[path] + jnp.float32(own[path]) for path in own}
  present = {"params": traverse_util.unflatten_dict(flat)}
  assert found.cosine_sam == pytest.approx(
    _cosine(own, of_kernels(without)), abs=1e-4
  )
  assert found.cosine_present == pytest.approx(
    _cosine(own, of_kernels(present)), abs=1e-4
  )
  assert found.turnover == pytest.approx(
    1 - _cosine(own, _dense(before)), abs=1e-4
  )
  for overlap in (found.overlap_gradient, found.overlap_primary):
    assert 0 < overlap < 1


def test_a_run_logs_them_every_so_many_steps(run, tmp_path):
  folder = tmp_path / "run"
  assert run(folder, "--diagnose-every", "10") == 0
  rows = [
    json.loads(line)
    for line in (folder / "metrics.jsonl").read_text().splitlines()
  ]
  logged = {row["step"]: row for row in rows if "cosine_sam" in row}
  assert sorted(logged) == [10, 20]
  assert set(diagnostics.Diagnosis._fields) <= set(logged[10])
  # With itself, for want of an earlier one.
  assert logged[10]["turnover"] == pytest.approx(0, abs=1e-5)
  assert logged[20]["turnover"] > 0


def test_they_are_of_the_auxiliary_that_a_step_meets_on_the_step_s_own_rows(
  run, tmp_path, monkeypatch
):
  events = []

  def recorded(make, name):
    def make_recorded(*arguments):
      made = make(*arguments)

      def call(*inputs):
        events.append((name, np.asarray(inputs[-1]["tokens"]).tobytes()))
        return made(*inputs)

      return call

    return make_recorded

  for module, function in (
    (diagnostics, "make"),
    (step, "make_train_step"),
  ):
    original = getattr(module, function)
    monkeypatch.setattr(module, function, recorded(original, function))
  options = ("--diagnose-every", "10", "--no-baseline")
  assert run(tmp_path / "run", *options) == 0
  names = [name for name, _ in events]
  # Before the tenth step, and not after it.
  assert names[:11] == ["make_train_step"] * 9 + ["make", "make_train_step"]
  assert events[9][1] == events[10][1] != events[8][1]
