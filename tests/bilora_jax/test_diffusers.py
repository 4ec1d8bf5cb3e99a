"""LoRA files of diffusers, without diffusers: tests/parity has it."""

import json

import numpy as np
import pytest
import safetensors.numpy

from bilora_jax import diffusers

_CONFIG = {
  "peft_type": "LORA",
  "r": 2,
  "lora_alpha": 6,
  "target_modules": ["attn.to_q", "attn.to_k"],
}


def _tensors() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    f"attn.{name}.{end}.weight": rng.normal(size=shape).astype(np.float32)
    for name in ("to_q", "to_k")
    for end, shape in (("lora_A", (2, 5)), ("lora_B", (4, 2)))
  }


def _folder(path, config=None, **more):
  path.mkdir()
  named = {f"base_model.model.{k}": v for k, v in (_tensors() | more).items()}
  safetensors.numpy.save_file(named, path / "adapter_model.safetensors")
  (path / "adapter_config.json").write_text(
    json.dumps(_CONFIG | (config or {}))
  )
  return path


def _read(folder):
  found = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
  config = json.loads((folder / "adapter_config.json").read_text())
  return {
    k.removeprefix("base_model.model."): v for k, v in found.items()
  }, config


def test_a_folder_comes_back_and_other_models_stay_in_the_file(tmp_path):
  folder = _folder(tmp_path / "folder")
  file = tmp_path / "both.safetensors"
  diffusers.from_peft(folder, file, "text_encoder")
  diffusers.from_peft(folder, file, "unet")
  diffusers.from_peft(folder, file, "unet")
  for model in ("unet", "text_encoder"):
    diffusers.to_peft(file, tmp_path / model, model)
    found, config = _read(tmp_path / model)
    assert config == _CONFIG
    assert set(found) == set(_tensors())
    for name, value in _tensors().items():
      np.testing.assert_array_equal(found[name], value)


def test_old_names_and_alphas_are_read(tmp_path):
  named = {}
  for name, value in _tensors().items():
    new = name.replace("attn.to_q", "attn.processor.to_q_lora")
    new = new.replace("attn.to_k", "attn.to_k.lora")
    new = new.replace("lora_A", "down").replace("lora_B", "up")
    named["unet." + new] = value
  named["unet.attn.to_k.alpha"] = np.array(8, np.float32)
  safetensors.numpy.save_file(named, tmp_path / diffusers.NAME)
  diffusers.to_peft(tmp_path, tmp_path / "folder")
  found, config = _read(tmp_path / "folder")
  assert set(found) == set(_tensors())
  assert config["r"] == config["lora_alpha"] == 2
  assert config["alpha_pattern"] == {r"attn\.to_k": 8}


@pytest.mark.parametrize(
  "names, parts",
  [
    (["unet.attn.to_q.weight"], ["no LoRA's", "unet.attn.to_q.weight"]),
    (["lora_unet_attn_to_q.lora_down.weight"], ["kohya", "save_lora_weights"]),
    (["text_encoder.q.lora_A.weight"], ["no LoRA of 'unet'", "text_encoder"]),
    (["unet.a.alpha", "unet.b.lora_A.weight"], ["alphas without", "a"]),
  ],
)
def test_a_file_of_something_else_is_refused(tmp_path, names, parts):
  tensors = {name: np.ones((1, 1), np.float32) for name in names}
  tensors = {
    k: v.reshape(()) if k.endswith("alpha") else v for k, v in tensors.items()
  }
  file = tmp_path / "file.safetensors"
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(ValueError) as error:
    diffusers.to_peft(file, tmp_path / "folder")
  assert all(part in str(error.value) for part in parts)
  assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
  "changes, more",
  [
    ({"modules_to_save": ["head"]}, {"head.weight": np.ones((2, 2))}),
    ({"bias": "all"}, {"attn.to_q.bias": np.ones(2)}),
    ({"bias": "all"}, {}),
  ],
)
def test_a_folder_with_more_than_a_lora_is_refused(tmp_path, changes, more):
  folder = _folder(tmp_path / "folder", changes, **more)
  with pytest.raises(ValueError, match="nothing but pairs"):
    diffusers.from_peft(folder, tmp_path / "file.safetensors")
  assert not (tmp_path / "file.safetensors").exists()


def test_damaged_files_and_names_are_refused(tmp_path):
  folder = _folder(tmp_path / "folder")
  file = tmp_path / "file.safetensors"
  with pytest.raises(ValueError, match="a name in a pipeline"):
    diffusers.from_peft(folder, file, "unet.")
  with pytest.raises(ValueError, match="is missing"):
    diffusers.to_peft(file, tmp_path / "out")
  diffusers.from_peft(folder, file)
  whole = file.read_bytes()
  file.write_bytes(whole[:-5])
  with pytest.raises(ValueError, match="not a whole safetensors"):
    diffusers.to_peft(file, tmp_path / "out")
  with pytest.raises(ValueError, match="not a whole safetensors"):
    diffusers.from_peft(folder, file)
  blob = safetensors.numpy.save(
    {"unet.a.lora_A.weight": np.ones((1, 1))}, {"lora_adapter_metadata": "[1]"}
  )
  file.write_bytes(blob)
  with pytest.raises(ValueError, match="a JSON object"):
    diffusers.to_peft(file, tmp_path / "out")
