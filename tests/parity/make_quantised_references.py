"""Writes tests/train/models/data: quantised folders, and what PyTorch reads.

Run it in an environment of its own, on Python 3.11, from anywhere:

  pip install torch==2.13.0
  pip install transformers==5.24.0 bitsandbytes==0.50.2 accelerate safetensors
  python tests/parity/make_quantised_references.py

Each case is a folder that transformers saves of a small Llama of random
weights, quantised; and reference.npz: the weights as PyTorch dequantises them.
The files are committed; CI needs no PyTorch.
"""

import json
import pathlib
import tempfile

from bitsandbytes import functional
import numpy as np
from safetensors import torch as st_torch
import torch
import transformers
from transformers.integrations import finegrained_fp8

OUT = pathlib.Path(__file__).parents[1] / "train" / "models" / "data"
# Of the odd sizes, rows begin within a byte and within a block.
_SIZES = {
  "vocab_size": 19,
  "hidden_size": 36,
  "num_hidden_layers": 1,
  "num_attention_heads": 6,
  "num_key_value_heads": 3,
  "max_position_embeddings": 32,
  "initializer_range": 0.25,
  "bos_token_id": None,
  "eos_token_id": None,
}
_BLOCK = (9, 3)


def _model(dtype: torch.dtype, inner: int = 45) -> torch.nn.Module:
  torch.manual_seed(0)
  config = transformers.LlamaConfig(**_SIZES, intermediate_size=inner)
  return transformers.LlamaForCausalLM(config).to(dtype)


def _nf4(folder: pathlib.Path, dtype: torch.dtype, nested: bool) -> None:
  with tempfile.TemporaryDirectory() as plain:
    # More than one block of scales, which are quantised in blocks of 256.
    _model(dtype, 480 if nested else 45).save_pretrained(plain)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
      plain,
      dtype=dtype,
      device_map="cpu",
      quantization_config=transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
      ),
    )
  quantised.save_pretrained(folder)
  arrays = {}
  for name, module in quantised.named_modules():
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is not None:
      weight = functional.dequantize_4bit(module.weight.data, state)
      assert weight.dtype == dtype
      arrays[f"{name}.weight"] = weight.float().numpy()
  assert len(arrays) == 7
  _finish(folder, arrays)


def _fp8(folder: pathlib.Path) -> None:
  """As DeepSeek's and Qwen's files are: transformers does not write them."""
  model = _model(torch.bfloat16)
  tensors, arrays = {}, {}
  for name, value in model.state_dict().items():
    if ".layers." not in name or "norm" in name:
      tensors[name] = value
      continue
    rows, columns = _BLOCK
    blocks = value.float().reshape(
      value.shape[0] // rows, rows, value.shape[1] // columns, columns
    )
    scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    codes = (blocks / scales[:, None, :, None]).reshape(value.shape)
    tensors[name] = codes.to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = scales
    weight = finegrained_fp8.Fp8Dequantize(None)._dequantize_one(
      tensors[name], scales
    )
    arrays[name] = weight.numpy()
  assert len(arrays) == 7
  folder.mkdir(exist_ok=True)
  st_torch.save_file(tensors, folder / "model.safetensors")
  model.config.architectures = ["LlamaForCausalLM"]
  model.config.save_pretrained(folder)
  path = folder / "config.json"
  config = json.loads(path.read_text())
  config["quantization_config"] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(_BLOCK),
  }
  path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
  _finish(folder, arrays)


def _finish(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  (folder / "generation_config.json").unlink(missing_ok=True)
  np.savez_compressed(folder / "reference.npz", **arrays)
  size = sum(path.stat().st_size for path in folder.iterdir())
  print(f"{folder.name}: {size} bytes")


def main() -> None:
  _nf4(OUT / "nf4_double", torch.bfloat16, nested=True)
  _nf4(OUT / "nf4_single", torch.float32, nested=False)
  _fp8(OUT / "fp8_blocks")


if __name__ == "__main__":
  main()
