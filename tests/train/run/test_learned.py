"""A run that learned nothing is no success."""

import math
import shutil

import jax.numpy as jnp
import numpy as np
import optax
from outcomes import files
import pytest
import safetensors.numpy

from train.data import scores as evaluate
from train.errors import RunError
from train.finished import finished as finished_lib
from train.models.io import stored
from train.run import config as config_lib
from train.run import kept, loop
from train.run.step import TrainState


def _state(skipped, steps):
  """After some steps, of which so many were skipped."""
  tx = optax.apply_if_finite(optax.sgd(0.1), 2**30)
  params = jnp.ones(2)
  opt_state = tx.init(params)
  for number in range(steps):
    gradient = params * (math.nan if number < skipped else 1.0)
    _, opt_state = tx.update(gradient, opt_state, params)
  return TrainState(jnp.int32(steps), params, opt_state, (), jnp.zeros(2))


def test_a_step_has_to_be_taken():
  best = {"numbers": {"loss": 0.5}}
  loop._require_learned(_state(2, 3), best)
  with pytest.raises(RunError, match="of all 3 steps was not finite"):
    loop._require_learned(_state(3, 3), best)


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_validation_has_to_have_a_finite_loss(loss):
  with pytest.raises(RunError, match="validation rows was never finite"):
    loop._require_learned(_state(0, 1), {"numbers": {"loss": loss}})
  with pytest.raises(RunError, match="never validated"):
    loop._require_learned(_state(0, 1), {"step": 0})
  # As runs of older versions have it.
  loop._require_learned(_state(0, 1), {"score": 0.5})


@pytest.mark.parametrize("worst", [math.nan, math.inf, -1e15, 2.0**24])
def test_weights_have_to_be_of_use(worst):
  loop.require_useful({"a": jnp.ones(2), "b": jnp.full(3, 1e6)})
  with pytest.raises(RunError, match="the largest weight that was trained is"):
    loop.require_useful({"a": jnp.ones(2), "b": jnp.array([1.0, worst])})


def test_a_run_that_was_never_finite_ends_in_an_error_each_time(
  run, tmp_path, monkeypatch, capsys
):
  folder = tmp_path / "run"

  def predictor(prepared):
    return lambda evaluated, split: evaluate.Evaluation(
      {"accuracy": 0.5}, math.nan, 1, 4
    )

  monkeypatch.setattr(loop, "predictor", predictor)
  for _ in range(2):
    assert run(folder) == 1
    said = capsys.readouterr()
    assert "error: nothing was learned: the loss of" in said.err
    assert "test accuracy" not in said.out
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("more", [(), ("--start", "pissa"), ("--mesh",)])
def test_a_base_that_is_not_finite_is_refused(
  run, tiny_model, tmp_path, capsys, value, more
):
  model = shutil.copytree(tiny_model, tmp_path / "model")
  _spoil(
    model / "model.safetensors",
    "encoder.layer.0.attention.self.query.weight",
    value,
  )
  if more == ("--mesh",):
    more = ("--mesh", "data=8", "--base-dtype", "bfloat16")
  assert run(tmp_path / "run", "--model", str(model), *more) == 1
  said = capsys.readouterr().err
  assert f"The weights of {model} are not finite" in said
  assert "encoder/layer_0/query/kernel has NaN or infinity" in said
  assert not (tmp_path / "run").exists()


def _spoil(path, name, value):
  found = safetensors.numpy.load_file(path)
  with safetensors.safe_open(path, "np") as file:
    metadata = file.metadata()
  found[name].flat[0] = value
  safetensors.numpy.save_file(found, path, metadata)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("place", [0, 2**20, 3 * 2**20 - 1])
def test_a_value_that_is_not_finite_is_found_anywhere(dtype, place):
  def read(index):
    return array[index]

  def make(path, shape, dtype, read, /):
    return read((slice(None),) * len(shape))

  array = np.ones((3, 2**20), jnp.dtype(dtype))
  checked = stored.finite(make, "it")
  assert checked(("a",), array.shape, array.dtype, read) is not None
  array.flat[place] = math.inf
  with pytest.raises(RunError, match="The weights of it are not"):
    checked(("a",), array.shape, array.dtype, read)
  array = np.asfortranarray(array)
  with pytest.raises(RunError, match="a has NaN or infinity"):
    checked(("a",), array.shape, array.dtype, read)


def test_adapters_that_are_not_finite_are_refused(finished, tmp_path):
  folder = shutil.copytree(finished, tmp_path / "run")
  path = folder / "adapters" / "adapters.safetensors"
  name = next(iter(safetensors.numpy.load_file(path)))
  _spoil(path, name, math.nan)
  with pytest.raises(RunError, match="adapters are not finite"):
    finished_lib.open_run(folder).adapters  # noqa: B018
  kept.save_parameters(tmp_path, {"a": np.array([1.0, math.inf], np.float32)})
  with pytest.raises(RunError, match="a has values that are not finite"):
    kept.load_parameters(tmp_path)


def test_a_decay_that_takes_away_more_than_there_is_is_refused(
  run, tmp_path, capsys
):
  before = files(tmp_path)
  assert run(tmp_path / "run", "--weight-decay", "1e5") == 2
  assert "got 0.01 times 100000" in capsys.readouterr().err
  assert files(tmp_path) == before
  config_lib.check(config_lib.build({"weight_decay": 100.0}))
