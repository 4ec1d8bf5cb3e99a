"""diffusers loads our LoRA files and we read its, to the same outputs.

Run by `make test-parity`.
"""

import json

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
import numpy as np
import peft as torch_peft
import pytest
import safetensors
import safetensors.numpy
import torch

from bilora_jax import diffusers

pytestmark = pytest.mark.filterwarnings("default")
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]


def _unet() -> UNet2DConditionModel:
  torch.manual_seed(0)
  return UNet2DConditionModel(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    layers_per_block=1,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=12,
    attention_head_dim=4,
  ).eval()


def _output(unet) -> np.ndarray:
  rng = np.random.default_rng(1)
  x, text = (
    torch.tensor(rng.normal(size=shape), dtype=torch.float32)
    for shape in ((2, 4, 8, 8), (2, 5, 12))
  )
  with torch.no_grad():
    return unet(x, torch.tensor([1, 7]), text)[0].numpy()


def _config(**changes) -> torch_peft.LoraConfig:
  return torch_peft.LoraConfig(
    **{"r": 3, "lora_alpha": 5, "target_modules": _TARGETS, **changes},
    init_lora_weights=False,
  )


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 7}},
  ],
  ids=["plain", "rslora", "dora", "patterns"],
)
def test_diffusers_loads_what_we_write(tmp_path, changes):
  model = torch_peft.get_peft_model(_unet(), _config(**changes))
  model.save_pretrained(tmp_path)
  diffusers.from_peft(tmp_path, tmp_path / "pipeline")
  loaded = _unet()
  tensors, configs = StableDiffusionPipeline.lora_state_dict(
    str(tmp_path / "pipeline"), return_lora_metadata=True
  )[::2]
  StableDiffusionPipeline.load_lora_into_unet(
    tensors, None, loaded, metadata=configs
  )
  plain, wanted = _output(_unet()), _output(model)
  assert np.abs(wanted - plain).max() > 1e-2
  np.testing.assert_allclose(_output(loaded), wanted, atol=1e-5)


@pytest.mark.parametrize("with_configs", [True, False])
def test_peft_loads_what_diffusers_wrote(tmp_path, with_configs):
  unet = _unet()
  # Without a configuration diffusers takes an alpha that equals the rank.
  config = _config() if with_configs else _config(lora_alpha=3)
  unet.add_adapter(config)
  StableDiffusionPipeline.save_lora_weights(
    tmp_path,
    unet_lora_layers=torch_peft.get_peft_model_state_dict(unet),
    unet_lora_adapter_metadata=(
      unet.peft_config["default"].to_dict() if with_configs else None
    ),
  )
  diffusers.to_peft(tmp_path, tmp_path / "folder")
  loaded = torch_peft.PeftModel.from_pretrained(_unet(), tmp_path / "folder")
  np.testing.assert_allclose(_output(loaded), _output(unet), atol=1e-5)


def test_names_of_old_files_are_those_that_diffusers_makes_of_them(tmp_path):
  unet = _unet()
  names = [name for name, _ in unet.named_modules() if name.endswith("to_q")]
  rng = np.random.default_rng(2)
  tensors = {}
  for name in names:
    width = unet.get_submodule(name).in_features
    attention = name.removesuffix(".to_q")
    for old in ("to_q", "to_out"):
      start = f"unet.{attention}.processor.{old}_lora"
      tensors[f"{start}.down.weight"] = rng.normal(size=(2, width))
      tensors[f"{start}.up.weight"] = rng.normal(size=(width, 2))
  tensors = {k: v.astype(np.float32) for k, v in tensors.items()}
  safetensors.numpy.save_file(tensors, tmp_path / diffusers.NAME)
  found, alphas = StableDiffusionPipeline.lora_state_dict(str(tmp_path))
  StableDiffusionPipeline.load_lora_into_unet(found, alphas, unet)
  diffusers.to_peft(tmp_path, tmp_path / "folder")
  loaded = torch_peft.PeftModel.from_pretrained(_unet(), tmp_path / "folder")
  np.testing.assert_allclose(_output(loaded), _output(unet), atol=1e-5)


def test_the_configuration_is_where_diffusers_has_it(tmp_path):
  torch_peft.get_peft_model(_unet(), _config()).save_pretrained(tmp_path)
  diffusers.from_peft(tmp_path, tmp_path, model="transformer")
  with safetensors.safe_open(tmp_path / diffusers.NAME, "np") as file:
    configs = json.loads(file.metadata()["lora_adapter_metadata"])
    assert all(name.startswith("transformer.") for name in file.keys())  # noqa: SIM118
  assert configs["transformer.lora_alpha"] == 5
