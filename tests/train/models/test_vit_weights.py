"""A DINOv2 out of ONNX: tensors by node, parameters, refusals."""

import jax
import numpy as np
import pytest
import vit_cases

from train.models import load
from train.models.io import weights
from train.models.vit import model as vit
from train.models.vit import onnx_file
from train.models.vit import weights as vit_weights


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  folder = tmp_path_factory.mktemp("onnx")
  return vit_cases.write(folder / "tiny.onnx", vit_cases.tensors("backbone."))


def test_tensors_without_names_are_known_by_the_nodes_that_use_them(path):
  got, want = onnx_file.read(path), vit_cases.tensors()
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_a_model_of_its_own_has_no_prefix(tmp_path):
  want = vit_cases.tensors()
  got = onnx_file.read(vit_cases.write(tmp_path / "x.onnx", want))
  assert got.keys() == want.keys()


def test_the_sizes_are_told_by_the_tensors(path):
  assert onnx_file.config(onnx_file.read(path)) == vit_cases.CONFIG


def test_a_patch_and_a_position_are_where_the_model_looks_for_them():
  stored = vit_cases.tensors()
  params = vit_weights.vit_params(vit_cases.CONFIG, stored)
  found = params["embeddings"]
  image = np.random.default_rng(2).normal(size=(14, 14, 3))
  kernel = stored["embeddings.patch_embeddings.projection.weight"]
  np.testing.assert_allclose(
    image.reshape(-1) @ found["patch"]["kernel"],
    np.einsum("hwc,dchw->d", image, kernel),
    rtol=1e-4,
    atol=1e-4,
  )
  positions = stored["embeddings.position_embeddings"][0]
  np.testing.assert_array_equal(found["cls_position"], positions[0])
  grid = vit_cases.CONFIG.grid
  np.testing.assert_array_equal(
    found["position"][3, 1], positions[1 + 3 * grid + 1]
  )


def test_a_file_becomes_the_variables_of_its_classifier(path):
  found = load.open_pretrained(str(path))
  assert found.family.reads == "images"
  model = found.classifier(10)
  assert isinstance(model, vit.VitClassifier)
  variables = found.variables(model, 0)
  images = np.zeros((1, 28, 28, 3), np.float32)
  wanted = jax.eval_shape(model.init, jax.random.key(0), images)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
    lambda x: (x.shape, x.dtype), wanted
  )
  with pytest.raises(
    ValueError, match=r"tiny\.onnx is a ViT, which reads images and no texts"
  ):
    _ = found.tokenizer


def test_a_packages_onnx_file_is_found_without_an_import(
  tmp_path, monkeypatch, path
):
  folder = tmp_path / "carrier_of_a_vit" / "models"
  folder.mkdir(parents=True)
  init = folder.parent / "__init__.py"
  init.write_text("raise RuntimeError('imported')")
  (folder / "tiny.onnx").write_bytes(path.read_bytes())
  monkeypatch.syspath_prepend(tmp_path)
  found = weights.locate("package:carrier_of_a_vit")
  assert found == folder / "tiny.onnx"
  (folder / "other.onnx").touch()
  with pytest.raises(weights.WeightsError, match="nor one GGUF or ONNX file"):
    weights.locate("package:carrier_of_a_vit")


def test_tensors_that_do_not_fit_are_named_together():
  stored = vit_cases.tensors()
  del stored["layernorm.bias"]
  stored["encoder.layer.0.mlp.fc2.bias"] = np.zeros(3)
  stored["embeddings.register_tokens"] = np.zeros((1, 4, 128))
  stored["embeddings.mask_token"] = np.zeros((1, 128))  # not looked at
  with pytest.raises(weights.WeightsError) as caught:
    vit_weights.vit_params(vit_cases.CONFIG, stored)
  assert str(caught.value) == (
    "The tensors do not fit the ViT's configuration: layernorm.bias is "
    "missing; encoder.layer.0.mlp.fc2.bias has shape (3,), expected (128,); "
    "embeddings.register_tokens has no place in it."
  )


def test_sizes_that_cannot_be_told_are_named():
  stored = vit_cases.tensors()
  del stored["encoder.layer.0.mlp.fc1.bias"]
  stored["embeddings.position_embeddings"] = np.zeros((26, 128))
  with pytest.raises(weights.WeightsError) as caught:
    onnx_file.config(stored)
  assert str(caught.value) == (
    "The sizes of a DINOv2 cannot be told: embeddings.position_embeddings has "
    "shape (26, 128); encoder.layer.0.mlp.fc1.bias is missing."
  )
  odd = vit_cases.tensors()
  odd["embeddings.patch_embeddings.projection.weight"] = np.zeros((96, 3, 2, 2))
  with pytest.raises(weights.WeightsError, match=r"heads are 64 wide.*of 96"):
    onnx_file.config(odd)


def test_files_that_hold_no_dinov2_are_refused(tmp_path, path):
  other = vit_cases.write(tmp_path / "other.onnx", {"head.bias": np.zeros(2)})
  with pytest.raises(
    weights.WeightsError, match=r"must hold one DINOv2.*has 0"
  ):
    onnx_file.read(other)
  short = tmp_path / "short.onnx"
  short.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(weights.WeightsError, match=r"short\.onnx is not a whole"):
    onnx_file.read(short)
