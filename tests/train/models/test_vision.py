"""Folders of vision transformers: PyTorch's logits, exports, and refusals."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors import numpy as st_numpy

from train.models import load
from train.models.io import weights
from train.models.vit import config as configs

DATA = pathlib.Path(__file__).with_name("data")
NAMES = ("clip", "deit", "dinov2", "dinov2_registers", "siglip", "vit")
ARCHITECTURES = {
  "clip": "CLIPForImageClassification",
  "siglip": "SiglipForImageClassification",
}


@functools.cache
def _open(name):
  return load.open_pretrained(str(DATA / f"vision_{name}"))


@functools.cache
def _reference(name):
  with np.load(DATA / f"vision_{name}" / "reference.npz") as file:
    return dict(file)


@functools.cache
def _classifier(name):
  """A model and its parameters, with the head of PyTorch's classifier."""
  found, reference = _open(name), _reference(name)
  model = found.classifier(3)
  variables = found.variables(model)
  # Of DINOv2's head half of the inputs are the mean of the patches.
  width = found.config.hidden_size
  head = {"kernel": reference["kernel"].T[:width], "bias": reference["bias"]}
  return model, {"params": {**variables["params"], "head": head}}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_pytorch(name):
  model, variables = _classifier(name)
  reference = _reference(name)
  rest = reference["kernel"][:, model.config.hidden_size :]
  count = sum(key.startswith("images_") for key in reference)
  assert count == (1 if name == "clip" else 2)

  @jax.jit
  def apply(images):
    return model.apply(variables, images), model.apply(
      variables, images, method=lambda m, x: m.encoder(x)
    )

  for i in range(count):
    images = reference[f"images_{i}"]
    got, hidden = apply(images)
    if rest.size:
      patches = hidden[:, 1 + model.config.registers :].mean(1)
      got = got + patches @ rest.T
    want = reference[f"logits_{i}"]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_prepared_as_the_folder_says(name):
  config = _open(name).config
  assert config.side == 16
  assert config.mean == (0.5, 0.4, 0.3)
  assert config.deviation == (0.5, 0.6, 0.7)


@pytest.mark.parametrize("name", NAMES)
def test_an_export_is_the_folder_again_with_its_head(name):
  found = _open(name)
  model, variables = _classifier(name)
  tensors = found.tensors_of(model, variables["params"])
  own = st_numpy.load_file(DATA / f"vision_{name}" / "model.safetensors")
  prefix = found.config.tower.prefix
  bare = not any(key.startswith(prefix) for key in own)
  for key, value in tensors.items():
    if not key.startswith("classifier."):
      stored = own[key.removeprefix(prefix) if bare else key]
      np.testing.assert_array_equal(value, stored, err_msg=key)
  # What our model has not, and transformers' has, is carried along.
  tower = {key for key in own if bare or key.startswith(prefix)}
  missing = {key.removeprefix(prefix) for key in tower}
  missing -= {key.removeprefix(prefix) for key in tensors}
  assert not missing - {"classifier.weight", "classifier.bias"}
  width = found.config.hidden_size
  head = _reference(name)["kernel"]
  np.testing.assert_array_equal(
    tensors["classifier.weight"][:, :width], head[:, :width]
  )
  assert tensors["classifier.weight"].shape == head.shape
  exported = found.exported_config(model, tensors, ["a", "b", "c"])
  again = configs.VitConfig.from_hf(exported)
  assert again.grid == found.config.grid
  assert again.registers == found.config.registers
  assert exported["architectures"] == [found.config.tower.architecture]
  if name in ARCHITECTURES:
    assert exported["architectures"] == [ARCHITECTURES[name]]
    assert exported["model_type"] == name


def test_adapters_have_the_modules_of_transformers():
  kind = _open("vit").kind(_classifier("vit")[0])
  assert kind.names["encoder/layer_1/query/kernel"] == (
    "vit.layers.1.attention.q_proj"
  )
  assert kind.names["encoder/layer_0/output/kernel"] == "vit.layers.0.mlp.fc2"
  kind = _open("clip").kind(_classifier("clip")[0])
  assert kind.names["encoder/layer_1/attention_out/kernel"] == (
    "vision_model.encoder.layers.1.self_attn.out_proj"
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "swin"}, "model_type must be one of vit, deit, .* 'swin'"),
    ({"hidden_act": "selu"}, "hidden_act must be one of gelu, .* got 'selu'"),
    ({"num_channels": 1}, "num_channels must be 3, all .* got 1"),
    ({"hidden_size": 25}, "hidden_size must be a multiple of num_heads"),
    ({"patch_size": 0}, "patch_size must be a positive integer, got 0"),
    ({"image_size": [1]}, r"image_size must be a positive integer, got \[1\]"),
    (
      {"model_type": "dinov2", "use_swiglu_ffn": True},
      "use_swiglu_ffn must be False",
    ),
    ({"model_type": "dinov2", "mlp_ratio": "4"}, "mlp_ratio must be a number"),
    (
      {"model_type": "dinov2_with_registers", "num_register_tokens": -1},
      "num_register_tokens must be an integer from 0 on, got -1",
    ),
    (
      {"model_type": "clip", "vision_config": 3},
      "vision_config must be",
    ),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, message):
  config = json.loads((DATA / "vision_vit" / "config.json").read_text())
  with pytest.raises(ValueError, match=message):
    configs.VitConfig.from_hf({**config, **changes})


def test_what_a_config_leaves_out_is_as_transformers_has_it():
  config = configs.VitConfig.from_hf(
    {"model_type": "clip", "vision_config": {}}
  )
  assert (config.patch_size, config.grid, config.hidden_size) == (32, 7, 768)
  assert (config.activation, config.layer_norm_eps) == ("quick_gelu", 1e-5)
  config = configs.VitConfig.from_hf({"model_type": "siglip_vision_model"})
  assert (config.patch_size, config.activation) == (16, "gelu_pytorch_tanh")
  assert configs.VitConfig.from_hf({"model_type": "dinov2"}).grid == 16


@pytest.fixture
def folder(tmp_path):
  return shutil.copytree(DATA / "vision_vit", tmp_path / "model")


@pytest.mark.parametrize(
  ("values", "side"),
  [
    ({"size": 12}, 12),
    ({"size": {"shortest_edge": 24}, "crop_size": {"height": 8}}, 8),
    ({"size": {"height": 8}, "crop_size": 12, "do_center_crop": False}, 8),
    # The last pixels are no whole patch.
    ({"size": {"height": 15, "width": 15}}, 12),
    ({}, 16),
  ],
)
def test_the_side_is_what_a_processor_cuts_out(folder, values, side):
  (folder / "preprocessor_config.json").write_text(json.dumps(values))
  config = load.open_pretrained(str(folder)).config
  assert config.side == side
  assert (config.mean, config.deviation) == configs.IMAGENET


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"size": {"height": -1}}, "size must have a positive number of pixels"),
    ({"image_mean": [0.5]}, "image_mean must be a list of 3 numbers"),
    ({"image_std": [1, 1, 0]}, "image_std must be positive"),
    ({"do_normalize": "no"}, "do_normalize must be true or false, got 'no'"),
  ],
)
def test_a_processor_that_cannot_be_is_refused(folder, values, message):
  (folder / "preprocessor_config.json").write_text(json.dumps(values))
  with pytest.raises(weights.WeightsError, match=message):
    load.open_pretrained(str(folder))


def test_tensors_that_do_not_fit_are_named_together(folder):
  path = folder / "model.safetensors"
  own = st_numpy.load_file(path)
  own["vit.encoder.layer.2.output.dense.bias"] = np.zeros(24, np.float32)
  del own["vit.layernorm.bias"]
  st_numpy.save_file(own, path)
  with pytest.raises(
    weights.WeightsError,
    match=r"layernorm\.bias is missing; encoder\.layer\.2.* has no place",
  ):
    load.open_pretrained(str(folder))
