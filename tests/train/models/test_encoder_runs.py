"""Runs of the program on small encoders, and what they export."""

import json

import encoder_cases
import jax
import numpy as np
import outcomes
import pytest
from safetensors import numpy as st_numpy

from train import __main__ as program
from train.finished import finished
from train.models import load


@pytest.fixture(scope="module", params=encoder_cases.RUN)
def ended(request, run, tmp_path_factory):
  """The name of a case, and the folder of a run of two steps on it."""
  folder = tmp_path_factory.mktemp("encoders") / request.param
  model = str(encoder_cases.DATA / request.param)
  few = ("--train-rows", "16", "--eval-rows", "8", "--epochs", "1")
  more = ("--group-by-length", "0", "--log-every", "1", "--eval-every", "2")
  assert run(folder, "--model", model, *few, *more, "--no-baseline") == 0
  return request.param, folder


def _export(folder, out, *more):
  options = ["--run", str(folder), "--out", str(out), *more]
  assert program.main(["export", *options]) == 0


def test_two_steps_move_every_adapter(ended):
  _, folder = ended
  losses = [row["loss"] for row in outcomes.rows(folder) if "loss" in row]
  assert len(losses) == 2 and np.isfinite(losses).all()
  # Of those that start at zero, none has stayed there.
  for name, factor in outcomes.adapters(folder).items():
    assert np.abs(factor).max() > 0, name


def test_exported_adapters_are_of_modules_of_transformers(ended, tmp_path):
  name, folder = ended
  _export(folder, tmp_path / "adapter")
  found = st_numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
  # A folder that transformers wrote, of a classifier.
  stored = st_numpy.load_file(encoder_cases.DATA / name / "model.safetensors")
  for key, value in found.items():
    module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
    if part == "A.weight":
      assert value.shape[1] == stored[f"{module}.weight"].shape[1]
    elif part == "B.weight":
      assert value.shape[0] == stored[f"{module}.weight"].shape[0]
    else:
      assert module in ("classifier.weight", "classifier.bias")


def test_a_merged_model_computes_what_the_run_did(ended, tmp_path):
  name, folder = ended
  _export(folder, tmp_path / "model", "--merged")
  case = encoder_cases.load_case(name)
  stored = st_numpy.load_file(encoder_cases.DATA / name / "model.safetensors")
  found = st_numpy.load_file(tmp_path / "model" / "model.safetensors")
  assert {*found} == {*stored}
  config = json.loads((tmp_path / "model" / "config.json").read_text())
  assert (
    config["architectures"]
    == json.loads((encoder_cases.DATA / name / "config.json").read_text())[
      "architectures"
    ]
  )
  merged = load.open_pretrained(str(tmp_path / "model"))
  ended_run = finished.open_run(str(folder))
  model = merged.classifier(2)
  variables = merged.variables(model)
  variables["params"]["head"] = {
    "kernel": found["classifier.weight"].T,
    "bias": found["classifier.bias"],
  }
  wanted = jax.jit(ended_run.adapted.apply)(
    ended_run.variables, ended_run.adapters, *case.inputs
  )
  got = jax.jit(model.apply)(variables, *case.inputs)
  np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
