"""Writes tests/train/models/data: small decoders, and what PyTorch computes.

Run it in an environment of its own, on Python 3.11, from anywhere:

  pip install torch==2.13.0
  pip install transformers==5.24.0 safetensors numpy
  python tests/parity/make_decoder_references.py

Each case is a folder with the config.json and model.safetensors that
transformers saves of a model of random weights, and reference.npz: rows of
tokens, their logits and the likeliest answer, in float32 with eager attention,
one row at a time, so that no padding takes part. The files are committed; CI
needs no PyTorch.
"""

import pathlib

import numpy as np
import torch
import transformers

OUT = pathlib.Path(__file__).parents[1] / "train" / "models" / "data"
LENGTHS = (9, 24, 17)
ANSWER = 12

_SIZES = {
  "vocab_size": 67,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "intermediate_size": 40,
  "max_position_embeddings": 64,
  # So that attention looks somewhere: at 0.02 it would be nearly uniform.
  "initializer_range": 0.25,
  "pad_token_id": None,
  "bos_token_id": None,
  "eos_token_id": None,
}


def _cases() -> dict[str, transformers.PretrainedConfig]:
  return {
    # Grouped queries, a tied head, heads whose width is not D / H.
    "llama_tied": transformers.LlamaConfig(
      **_SIZES,
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=10,
      tie_word_embeddings=True,
      rms_norm_eps=1e-5,
    ),
    # The original context is short, so that all three bands of frequencies
    # are met within a few tokens.
    "llama3_scaled": transformers.LlamaConfig(
      **_SIZES,
      num_attention_heads=4,
      num_key_value_heads=4,
      rms_norm_eps=1e-6,
      rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 20.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
      },
    ),
    "qwen2": transformers.Qwen2Config(
      **_SIZES, num_attention_heads=4, num_key_value_heads=2
    ),
    # Norms of queries and keys; a window in the second layer alone.
    "qwen3": transformers.Qwen3Config(
      **_SIZES,
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=10,
      tie_word_embeddings=True,
      use_sliding_window=True,
      sliding_window=5,
      max_window_layers=1,
    ),
    # A window in all layers; some pairs keep their frequency, some are scaled,
    # and one is between.
    "mistral": transformers.MistralConfig(
      **_SIZES,
      num_attention_heads=4,
      num_key_value_heads=2,
      sliding_window=6,
      rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 50.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 2.0,
        "beta_slow": 0.5,
      },
    ),
    # A layer without positions, and biases everywhere.
    "smollm3": transformers.SmolLM3Config(
      **_SIZES,
      num_attention_heads=4,
      num_key_value_heads=1,
      no_rope_layer_interval=2,
      attention_bias=True,
      mlp_bias=True,
      rope_parameters={
        "rope_type": "linear",
        "rope_theta": 30.0,
        "factor": 3.0,
      },
    ),
    **_gemmas(),
    # Learned positions, joint weights as (in, out), norms with biases.
    "gpt2": transformers.GPT2Config(
      vocab_size=67,
      n_embd=32,
      n_layer=2,
      n_head=4,
      n_inner=40,
      n_positions=64,
      initializer_range=0.25,
      bos_token_id=None,
      eos_token_id=None,
    ),
    **_qwens_with_images(),
  }


def _gemmas() -> dict[str, transformers.PretrainedConfig]:
  own = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
  # Low enough that scores and logits of weights this large are bent.
  softcaps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}
  # A window in the first layer, and other rotary frequencies.
  third = {
    **own,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
      "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
      "full_attention": {
        "rope_type": "linear",
        "rope_theta": 90.0,
        "factor": 3.0,
      },
    },
  }
  sight = transformers.SiglipVisionConfig(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
  )
  return {
    "gemma": transformers.GemmaConfig(**_SIZES, **own),
    "gemma2": transformers.Gemma2Config(
      **_SIZES, **own, **softcaps, query_pre_attn_scalar=24, sliding_window=5
    ),
    "gemma3_text": transformers.Gemma3TextConfig(**_SIZES, **third),
    "gemma3": transformers.Gemma3Config(
      text_config=transformers.Gemma3TextConfig(**_SIZES, **third),
      vision_config=sight,
      mm_tokens_per_image=4,
      boi_token_index=60,
      eoi_token_index=61,
      image_token_index=62,
    ),
  }


def _qwens_with_images() -> dict[str, transformers.PretrainedConfig]:
  own = {"num_attention_heads": 4, "num_key_value_heads": 2}
  sight = {
    "depth": 1,
    "num_heads": 2,
    "patch_size": 4,
    "intermediate_size": 8,
    "spatial_merge_size": 1,
  }
  tokens = {
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
  }
  return {
    "qwen2_5_vl": transformers.Qwen2_5_VLConfig(
      text_config={
        **_SIZES,
        **own,
        "rope_parameters": {
          "rope_type": "default",
          "mrope_section": [1, 1, 2],
          "rope_theta": 50.0,
        },
      },
      vision_config={**sight, "hidden_size": 8, "out_hidden_size": 32},
      **tokens,
    ),
    "qwen2_vl": transformers.Qwen2VLConfig(
      text_config={
        **_SIZES,
        **own,
        "rope_parameters": {
          "rope_type": "default",
          "mrope_section": [2, 1, 1],
          "rope_theta": 50.0,
        },
      },
      vision_config={
        "depth": 1,
        "num_heads": 2,
        "patch_size": 4,
        "mlp_ratio": 1,
        "spatial_merge_size": 1,
        "embed_dim": 8,
        "hidden_size": 32,
      },
      **tokens,
    ),
    # Norms of queries and keys, and a head that is the embedding.
    "qwen3_vl": transformers.Qwen3VLConfig(
      text_config={
        **_SIZES,
        **own,
        "head_dim": 10,
        "rope_parameters": {
          "rope_type": "default",
          "mrope_section": [1, 2, 2],
          "rope_theta": 50.0,
        },
      },
      vision_config={
        **sight,
        "hidden_size": 8,
        "out_hidden_size": 32,
        "num_position_embeddings": 4,
        "deepstack_visual_indexes": [0],
      },
      tie_word_embeddings=True,
      **tokens,
    ),
  }


def _model(config: transformers.PretrainedConfig) -> torch.nn.Module:
  torch.manual_seed(0)
  auto = transformers.AutoModelForCausalLM
  if config.model_type.endswith("_vl"):
    auto = transformers.AutoModelForImageTextToText
  model = auto.from_config(
    config, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  # Norms start at one and biases at zero, where a mistake would not show.
  with torch.no_grad():
    for name, value in model.named_parameters():
      if name.endswith("bias") or "norm" in name or "ln_" in name:
        value += 0.3 * torch.randn_like(value)
  return model


def _answer(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
  """The likeliest tokens after a row, one at a time, int32 (T,)."""
  with torch.no_grad():
    row = model.generate(
      torch.tensor(tokens)[None], max_new_tokens=ANSWER, do_sample=False
    )
  return row[0, len(tokens) :].numpy().astype(np.int32)


def main() -> None:
  rng = np.random.default_rng(0)
  for name, config in _cases().items():
    folder = OUT / name
    model = _model(config)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    arrays = {}
    for i, length in enumerate(LENGTHS):
      # No tokens of images, which are the last.
      tokens = rng.integers(0, _SIZES["vocab_size"], length)
      for key in ("boi_token_index", "image_token_id"):
        tokens %= getattr(config, key, _SIZES["vocab_size"])
      with torch.no_grad():
        logits = model(torch.tensor(tokens)[None]).logits[0]
      arrays[f"tokens_{i}"] = tokens.astype(np.int32)
      arrays[f"logits_{i}"] = logits.numpy()
      arrays[f"answer_{i}"] = _answer(model, tokens)
    np.savez_compressed(folder / "reference.npz", **arrays)
    size = sum(path.stat().st_size for path in folder.iterdir())
    spread = np.std(np.concatenate([arrays[f"logits_{i}"] for i in range(3)]))
    print(f"{name}: {size} bytes, logits of standard deviation {spread:.2f}")


if __name__ == "__main__":
  main()
