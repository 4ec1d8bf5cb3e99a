"""Folders that others have quantised: the values that PyTorch reads."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as st_numpy
import tokenizers
from tokenizers import models

from train.models import load
from train.models.io import quantised, tensors, weights

DATA = pathlib.Path(__file__).with_name("data")
DTYPES = {
  "fp8_blocks": np.float32,
  "nf4_double": jnp.bfloat16,
  "nf4_single": np.float32,
}
GATE = "model.layers.0.mlp.gate_proj.weight"
# The first rows begin within a byte and within a block of four bits.
PARTS = [
  (slice(None), slice(None)),
  (slice(3, 8), slice(5, 29)),
  (slice(1, 2), slice(0, 1)),
  (slice(9, 9), slice(None)),
]


def _open(folder):
  config = json.loads((folder / "config.json").read_text())
  read = quantised.reader(folder, config)
  return read(folder, tensors.open_safetensors(folder))


@pytest.mark.parametrize("name", DTYPES)
def test_every_part_of_a_weight_is_pytorch_s_to_the_bit(name):
  found = _open(DATA / name)
  with np.load(DATA / name / "reference.npz", allow_pickle=False) as file:
    want = dict(file)
  assert len(want) == 7
  for path, array in want.items():
    tensor = found[path]
    assert tensor.shape == array.shape
    assert tensor.dtype == DTYPES[name]
    for part in PARTS:
      got = tensor[part]
      assert got.dtype == tensor.dtype
      np.testing.assert_array_equal(got.astype(np.float32), array[part])


def test_blocks_at_the_edge_may_be_smaller(tmp_path):
  """As those of DeepSeek's compressed keys are: 576 rows in blocks of 128."""
  random = np.random.default_rng(0)
  codes = random.normal(size=(7, 8)).astype(jnp.float8_e4m3fn)
  scales = random.uniform(1, 2, (3, 2)).astype(np.float32)
  read = quantised.reader(
    tmp_path,
    {
      "quantization_config": {
        "quant_method": "fp8",
        "weight_block_size": [3, 5],
      }
    },
  )
  found = read(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scales})
  want = codes.astype(np.float32) * scales.repeat(3, 0)[:7].repeat(5, 1)[:, :8]
  np.testing.assert_array_equal(found["a.weight"][:, :], want)
  with pytest.raises(weights.WeightsError, match=r"has scales of \(3, 2\)"):
    read(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scales[:2]})


@pytest.fixture(params=DTYPES)
def folder(request, tmp_path):
  """A whole folder, with a tokenizer."""
  folder = tmp_path / "model"
  shutil.copytree(DATA / request.param, folder)
  vocabulary = {f"w{i}": i for i in range(19)}
  tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(
    str(folder / "tokenizer.json")
  )
  return folder


def test_a_model_is_opened_and_exported_as_one_of_floats(folder):
  opened = load.open_pretrained(str(folder))
  model = opened.language_model()
  variables = opened.variables(model)
  kernel = variables["params"]["layers_0"]["mlp"]["gate_proj"]["kernel"]
  with np.load(folder / "reference.npz", allow_pickle=False) as file:
    np.testing.assert_array_equal(kernel, file[GATE].T)
  found = opened.tensors_of(model, variables["params"])
  assert "quantization_config" in opened.hf_config
  assert "quantization_config" not in opened.exported_config(model, found)


@pytest.mark.parametrize(
  ("end", "change", "fault"),
  [
    ("absmax", lambda x: x[:-1], "arrays beside it are not of a weight"),
    ("quant_map", lambda x: x[:-1], "arrays beside it are not of a weight"),
    ("quant_map", None, "KeyError: 'quant_map'"),
    ("quant_state.bitsandbytes__nf4", lambda x: x[:9], "JSONDecodeError"),
  ],
)
def test_a_state_that_does_not_fit_is_one_sentence(
  tmp_path, end, change, fault
):
  folder = tmp_path / "model"
  shutil.copytree(DATA / "nf4_double", folder)
  path = folder / "model.safetensors"
  own = st_numpy.load_file(path)
  name = f"{GATE}.{end}"
  value = own.pop(name)
  if change:
    own[name] = np.ascontiguousarray(change(value))
  st_numpy.save_file(own, path)
  with pytest.raises(weights.WeightsError, match=fault) as caught:
    _open(folder)
  assert "gate_proj.weight.quant_state" in str(caught.value)
