"""Runs of the program on small encoders, and what they export."""

import json
import shutil

import encoder_cases
import numpy as np
import outcomes
import pytest
from safetensors import numpy as st_numpy

from train import __main__ as program
from train.models import load


@pytest.fixture(scope="module", params=encoder_cases.RUN)
def ended(request, run, tmp_path_factory):
  """The name of a case, and the folder of a run of two steps on it."""
  place = tmp_path_factory.mktemp("encoders")
  folder, model = place / "run", place / request.param
  shutil.copytree(encoder_cases.DATA / request.param, model)
  few = ("--train-rows", "16", "--eval-rows", "8", "--epochs", "1")
  more = ("--group-by-length", "0", "--log-every", "1", "--eval-every", "2")
  assert run(folder, "--model", str(model), *few, *more, "--no-baseline") == 0
  return request.param, folder


@pytest.fixture(scope="module")
def exported(ended, tmp_path_factory):
  """The case's tensors, and folders with the run's adapters and its model."""
  name, folder = ended
  out = tmp_path_factory.mktemp("exported")
  for part, more in (("adapter", []), ("model", ["--merged"])):
    options = ["--run", str(folder), "--out", str(out / part), *more]
    assert program.main(["export", *options]) == 0
  stored = encoder_cases.DATA / name / "model.safetensors"
  return st_numpy.load_file(stored), out


def test_two_steps_move_every_adapter(ended):
  _, folder = ended
  losses = [row["loss"] for row in outcomes.rows(folder) if "loss" in row]
  assert len(losses) == 2 and np.isfinite(losses).all()
  # Of those that start at zero, none has stayed there.
  for name, factor in outcomes.adapters(folder).items():
    assert np.abs(factor).max() > 0, name


def test_a_merged_model_is_the_sum_of_transformers_tensors_and_of_pefts(
  ended, exported
):
  stored, out = exported
  merged = st_numpy.load_file(out / "model" / "model.safetensors")
  assert {*merged} == {*stored}
  config = json.loads((out / "adapter" / "adapter_config.json").read_text())
  scale = config["lora_alpha"] / config["r"]
  adapter = {
    name.removeprefix("base_model.model."): value
    for name, value in st_numpy.load_file(
      out / "adapter" / "adapter_model.safetensors"
    ).items()
  }
  changed = set()
  for name, value in merged.items():
    module = name.removesuffix(".weight")
    if name.startswith("classifier."):
      np.testing.assert_array_equal(value, adapter.pop(name))
      continue
    wanted = stored[name]
    if f"{module}.lora_A.weight" in adapter:
      changed.add(name)
      a, b = (adapter.pop(f"{module}.lora_{x}.weight") for x in "AB")
      wanted = wanted + scale * b @ a
    np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-6, err_msg=name)
  # All that PEFT has was found, and every linear layer has some of it.
  assert not adapter
  load.open_pretrained(str(out / "model"))
  case = encoder_cases.load_case(ended[0])
  names = case.pretrained.kind(case.model).names.items()
  kernels = {f"{x}.weight" for path, x in names if path.endswith("/kernel")}
  assert changed == kernels - {"classifier.weight"}


def test_an_exported_model_says_what_it_is(ended, exported):
  name, (_, out) = ended[0], exported
  wanted = json.loads((encoder_cases.DATA / name / "config.json").read_text())
  found = json.loads((out / "model" / "config.json").read_text())
  assert found["architectures"] == wanted["architectures"]
  card = (out / "model" / "README.md").read_text()
  assert ("logits.mean(0)" in card) == ("Token" in wanted["architectures"][0])


def test_a_run_stays_with_its_vocabulary_and_pooling(ended, capsys):
  name, folder = ended
  if name != "electra":
    return  # one is enough, and another has no vocab.txt or its own pooling
  model = folder.with_name(name)
  path = model / "vocab.txt"
  path.write_text(path.read_text() + "more\n")
  modules = [{"type": "models.Pooling", "path": "1_Pooling"}]
  (model / "modules.json").write_text(json.dumps(modules))
  (model / "1_Pooling").mkdir()
  config = json.dumps({"pooling_mode": "cls"})
  (model / "1_Pooling" / "config.json").write_text(config)
  assert program.main(["evaluate", "--run", str(folder)]) == 2
  said = capsys.readouterr().err
  assert f"vocab.txt of --model {model}" in said
  assert f"the pooling of --model {model} (it was mean, and is cls)" in said
