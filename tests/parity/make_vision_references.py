"""Writes tests/train/models/data/vision_*: towers, and what PyTorch computes.

Run it in an environment of its own, on Python 3.11, from anywhere:

  pip install torch==2.13.0
  pip install transformers==5.24.0 safetensors numpy
  python tests/parity/make_vision_references.py

Each case is a folder that transformers saves of a small model of random
weights, with the file of its image processor; and reference.npz: images, and
the logits of transformers' classifier with the same tower, in float32. The
files are committed; CI needs no PyTorch.
"""

import json
import pathlib
from typing import Any

import numpy as np
import torch
import transformers

OUT = pathlib.Path(__file__).parents[1] / "train" / "models" / "data"
CLASSES = 3

_SIZES: dict[str, Any] = {
  "hidden_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 20,
  "image_size": 16,
  "patch_size": 4,
}
_TEXT = {**_SIZES, "vocab_size": 5, "max_position_embeddings": 4}
_DINOV2 = {
  **{k: v for k, v in _SIZES.items() if k != "intermediate_size"},
  "mlp_ratio": 2,
}
# The config, and whether the folder is that of an image tower alone.
CASES: dict[str, tuple[Any, bool]] = {
  "vit": (transformers.ViTConfig(**_SIZES, qkv_bias=False), False),
  "deit": (transformers.DeiTConfig(**_SIZES), False),
  "dinov2": (transformers.Dinov2Config(**_DINOV2), True),
  "dinov2_registers": (
    transformers.Dinov2WithRegistersConfig(**_DINOV2, num_register_tokens=3),
    False,
  ),
  "clip": (
    transformers.CLIPConfig(
      text_config=_TEXT, vision_config=_SIZES, projection_dim=4
    ),
    False,
  ),
  # 18 pixels are four patches and a half.
  "siglip": (
    transformers.SiglipConfig(
      text_config=_TEXT, vision_config={**_SIZES, "image_size": 18}
    ),
    True,
  ),
}
_CLASSES = {
  "vit": "ViTForImageClassification",
  "deit": "DeiTForImageClassification",
  "dinov2": "Dinov2ForImageClassification",
  "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
  "clip": "CLIPForImageClassification",
  "siglip": "SiglipForImageClassification",
}


def _randomised(model: torch.nn.Module) -> torch.nn.Module:
  """A mistake in any weight would show."""
  with torch.no_grad():
    for name, value in model.named_parameters():
      is_scale = "lambda" in name or ("norm" in name and "weight" in name)
      scale = 0.3 if value.ndim < 2 else 1.2 * value[0].numel() ** -0.5
      value.copy_(float(is_scale) + scale * torch.randn_like(value))
  return model.eval()


def main() -> None:
  for name, (config, alone) in CASES.items():
    torch.manual_seed(0)
    config.num_labels = CLASSES
    config.architectures = [_CLASSES[config.model_type]]
    auto = getattr(transformers, _CLASSES[config.model_type])
    model = _randomised(auto(config))
    folder = OUT / f"vision_{name}"
    whole, tower = model, getattr(model, model.base_model_prefix, None)
    if name in ("clip", "siglip"):
      tower = model.vision_model
    if name == "clip":
      # As published: with a text tower, and without a classifier.
      whole = _randomised(transformers.CLIPModel(config))
      whole.vision_model.load_state_dict(model.vision_model.state_dict())
    (tower if alone else whole).save_pretrained(folder)
    sides = {"height": 16, "width": 16}
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (folder / "preprocessor_config.json").write_text(
      json.dumps({**processor, "size": sides}) + "\n"
    )
    arrays = {
      "kernel": model.classifier.weight.detach().numpy(),
      "bias": model.classifier.bias.detach().numpy(),
    }
    random = np.random.default_rng(0)
    side = 18 if name == "siglip" else 16
    # More patches than the stored grid has, where transformers resizes it.
    sizes = [side] + [24] * (name not in ("clip",))
    for i, size in enumerate(sizes):
      images = random.normal(size=(2, size, size, 3)).astype(np.float32)
      more = {} if size == side else {"interpolate_pos_encoding": True}
      if name.startswith("dinov2"):
        more = {}
      with torch.no_grad():
        found = model(torch.tensor(images.transpose(0, 3, 1, 2)), **more)
      arrays[f"images_{i}"] = images[:, : size // 4 * 4, : size // 4 * 4]
      arrays[f"logits_{i}"] = found.logits.numpy()
    np.savez_compressed(folder / "reference.npz", **arrays)
    bytes_ = sum(path.stat().st_size for path in folder.iterdir())
    spread = arrays["logits_0"].std()
    print(f"{name}: {bytes_} bytes, logits of standard deviation {spread:.2f}")


if __name__ == "__main__":
  main()
