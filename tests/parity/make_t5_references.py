"""Writes tests/train/models/data/t5_*: small T5s, and what PyTorch computes.

Run it in an environment of its own, on Python 3.11, from anywhere:

  pip install torch==2.13.0
  pip install transformers==5.24.0 safetensors numpy
  python tests/parity/make_t5_references.py

Each case is a folder with a config.json, a model.safetensors of random weights
and a reference.npz: rows of a source and a target, with the target's logits in
float32 and the tokens that greedy decoding gives, one row at a time, so that no
padding takes part. `buckets` are those of distances key - query from -200 to
200, in the encoder and in the decoder. The files are committed; CI needs no
PyTorch.
"""

import json
import pathlib
from typing import Any

import numpy as np
from safetensors import numpy as st_numpy
import torch
import transformers
from transformers.models.t5 import modeling_t5

OUT = pathlib.Path(__file__).parents[1] / "train" / "models" / "data"
LENGTHS = ((9, 4), (30, 26), (17, 1))
NEW_TOKENS = 12
REACH = 200

# What is given, as config.json has it; a head's width is not D / H, and the
# distances are short, so that ranges of them are met within a few tokens.
_SIZES: dict[str, Any] = {
  "vocab_size": 41,
  "d_model": 24,
  "d_kv": 10,
  "d_ff": 36,
  "num_layers": 2,
  "num_heads": 2,
  "relative_attention_num_buckets": 8,
  "relative_attention_max_distance": 20,
  "layer_norm_epsilon": 1e-6,
  "pad_token_id": 0,
  "eos_token_id": 1,
  "decoder_start_token_id": 0,
}
CASES: dict[str, dict[str, Any]] = {
  "t5_v1_0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
  "t5_v1_1": {
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "num_decoder_layers": 3,
  },
  # Its config.json is silent about what every mT5 has.
  "mt5": {"model_type": "mt5"},
}


def model(seed: int, **changes: Any) -> torch.nn.Module:
  """A T5 whose random weights are such that a mistake in any would show."""
  torch.manual_seed(seed)
  changes = {"model_type": "t5", **changes}
  kind = changes.pop("model_type")
  config = transformers.AutoConfig.for_model(kind, **(_SIZES | changes))
  made = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
  if kind == "mt5" or not changes.get("tie_word_embeddings", True):
    # transformers 5 ties every new T5; published v1.1's heads are their own.
    made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.clone())
  with torch.no_grad():
    for name, value in made.named_parameters():
      if "layer_norm" in name:
        value += 0.3 * torch.randn_like(value)
      elif "bias" in name:  # of positions
        value.copy_(torch.randn_like(value))
      else:
        scale = (
          0.25 if name == "shared.weight" else 1.4 * value.shape[1] ** -0.5
        )
        if name.endswith(".q.weight"):
          # Attention is not scaled: T5's own first weights of queries are.
          scale *= config.d_kv**-0.5
        value.copy_(scale * torch.randn_like(value))
  return made


def save(made: torch.nn.Module, folder: pathlib.Path, **changes: Any) -> None:
  """As published: config.json as transformers 4 wrote it, and safetensors."""
  folder.mkdir(parents=True, exist_ok=True)
  config = {"model_type": "t5", **_SIZES, **changes}
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  # Tied weights are one parameter here, under one name.
  arrays = {n: x.detach().numpy() for n, x in made.named_parameters()}
  st_numpy.save_file(arrays, folder / "model.safetensors")


def logits(made: torch.nn.Module, source: Any, target: Any) -> np.ndarray:
  """Of one row, float32 (L, V)."""
  with torch.no_grad():
    found = made(
      input_ids=torch.tensor(source)[None], labels=torch.tensor(target)[None]
    )
  return found.logits[0].numpy()


def greedy(made: torch.nn.Module, source: Any) -> np.ndarray:
  """Of one row, NEW_TOKENS or, with the end, less."""
  with torch.no_grad():
    found = made.generate(
      torch.tensor(source)[None],
      attention_mask=torch.ones((1, len(source)), dtype=torch.long),
      max_new_tokens=NEW_TOKENS,
      do_sample=False,
      num_beams=1,
      # transformers makes it as deep as the encoder.
      use_cache=False,
    )
  return found[0, 1:].numpy()


def buckets(count: int, farthest: int, both_ways: bool) -> np.ndarray:
  """Of distances key - query from -REACH to REACH."""
  found = modeling_t5.T5Attention._relative_position_bucket(
    torch.arange(-REACH, REACH + 1),
    bidirectional=both_ways,
    num_buckets=count,
    max_distance=farthest,
  )
  return found.numpy()


def main() -> None:
  rng = np.random.default_rng(0)
  for name, changes in CASES.items():
    folder = OUT / name
    made = model(0, **changes)
    save(made, folder, **changes)
    arrays = {
      "buckets": np.stack(
        [buckets(32, 128, both_ways) for both_ways in (True, False)]
      ).astype(np.int32)
    }
    for i, (length, answer) in enumerate(LENGTHS):
      source = rng.integers(2, _SIZES["vocab_size"], length)
      target = rng.integers(2, _SIZES["vocab_size"], answer)
      arrays[f"source_{i}"] = source.astype(np.int32)
      arrays[f"target_{i}"] = target.astype(np.int32)
      arrays[f"logits_{i}"] = logits(made, source, target)
      arrays[f"greedy_{i}"] = greedy(made, source).astype(np.int32)
    np.savez_compressed(folder / "reference.npz", **arrays)
    size = sum(path.stat().st_size for path in folder.iterdir())
    spread = np.std(np.concatenate([arrays[f"logits_{i}"] for i in range(3)]))
    print(f"{name}: {size} bytes, logits of standard deviation {spread:.2f}")
    print(*(arrays[f"greedy_{i}"].tolist() for i in range(3)), sep="\n")


if __name__ == "__main__":
  main()
