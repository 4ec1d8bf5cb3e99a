"""Families of models: a contributor's, and what all have to be."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import qwix
from safetensors import numpy as st_numpy
import toy_family

import bilora_jax
from train.models import load, registry
from train.models.io import stored, weights
from train.models.options import ModelOptions

WIDTH = 4


@pytest.fixture
def bag(tmp_path, tiny_model):
  """A folder of the toy family."""
  tokenizer = json.loads((tiny_model / "tokenizer.json").read_text())
  size = len(tokenizer["model"]["vocab"])
  draws = np.random.default_rng(0)
  shapes = {
    "word.weight": (size, WIDTH),
    "inner.weight": (WIDTH, WIDTH),
    "inner.bias": (WIDTH,),
  }
  own = {
    name: draws.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }
  shutil.copyfile(tiny_model / "tokenizer.json", tmp_path / "tokenizer.json")
  st_numpy.save_file(own, tmp_path / "model.safetensors")
  config = {"model_type": "bag", "vocab_size": size, "hidden_size": WIDTH}
  (tmp_path / "config.json").write_text(json.dumps(config))
  return tmp_path


def test_a_family_of_one_file_opens_and_builds_a_classifier(bag):
  found = load.open_pretrained(str(bag))
  assert found.family is toy_family.FAMILY
  model = found.classifier(3, **ModelOptions().of_module)
  variables = found.variables(model, key=0)
  inputs = found.example_inputs()
  wanted = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, wanted)
  tokens = np.array([[1, 2, 0]])
  assert model.apply(variables, tokens, tokens > 0).shape == (1, 3)
  axes = found.logical_axes(wanted)
  inner = axes["params"]["encoder"]["inner"]
  assert tuple(inner["kernel"]) == ("embed", "mlp")
  assert jax.tree.all(
    jax.tree.map(lambda x, names: x.ndim == len(names), wanted, axes)
  )


def test_a_run_trains_a_family_of_one_file(bag, run, tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs") / "bag"
  assert run(folder, "--model", str(bag), "--method", "bilora") == 0
  adapters = st_numpy.load_file(folder / "adapters" / "adapters.safetensors")
  assert any("inner" in name for name in adapters)
  assert any("head" in name for name in adapters)


def test_what_a_family_cannot_do_is_a_sentence(bag):
  found = load.open_pretrained(str(bag))
  model = found.classifier(2)
  for call, part in (
    (lambda: found.classifier(2, scan=True), "--scan-layers"),
    (lambda: found.language_model(), "no language model"),
    (lambda: found.generator(model, model.apply), "does not generate"),
    (lambda: found.kind(model), "transformers has no Bag"),
  ):
    with pytest.raises(ValueError, match=part):
      call()


def test_a_model_type_that_none_opens_is_told_those_that_are(bag):
  (bag / "config.json").write_text(json.dumps({"model_type": "bloom"}))
  with pytest.raises(
    weights.WeightsError,
    match=r"config\.json: model_type must be one of bert, .*llama, .*bag, got",
  ):
    load.open_pretrained(str(bag))


def test_two_families_do_not_open_the_same():
  other = dataclasses.replace(toy_family.FAMILY, name="other")
  with pytest.raises(ValueError, match=r"other would open what bag of .*: bag"):
    registry.register(other)
  assert other not in registry.families()


def test_a_model_of_no_family_is_named():
  with pytest.raises(ValueError, match="A Encoder is of no registered family"):
    registry.family_of(toy_family.Encoder(toy_family.BagConfig(3, 2)))


def test_weights_are_quantised_one_by_one_as_they_are_read(
  tiny_model, monkeypatch
):
  found = load.open_pretrained(str(tiny_model))
  options = ModelOptions(base_dtype="nf4", dtype="bfloat16")
  model = found.classifier(2, **options.of_module)
  spec = bilora_jax.LoraSpec(
    rank=1, targets=".*query", base_dtype=options.quantised
  )
  adapted = bilora_jax.adapt(model, spec, *found.example_inputs())
  done = []
  quantise = bilora_jax.Adapted.quantize_leaf

  def quantising(self, path, array):
    done.append(("quantised", path))
    return quantise(self, path, array)

  def place(path, shape, dtype, read):
    done.append(("read", "/".join(path)))
    assert dtype == "bfloat16"
    return stored.on_one_device(path, shape, dtype, read)

  monkeypatch.setattr(bilora_jax.Adapted, "quantize_leaf", quantising)
  variables = found.variables(
    model, 0, options.param_dtype, place, adapted=adapted
  )
  paths = [path for kind, path in done if kind == "read"]
  assert done == [(x, path) for path in paths for x in ("read", "quantised")]
  layer = variables["params"]["encoder"]["layer_0"]
  assert isinstance(layer["query"]["kernel"], qwix.QArray)
  assert layer["key"]["kernel"].dtype == "bfloat16"
