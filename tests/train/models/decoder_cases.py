"""Small decoders whose logits PyTorch computed, for the tests of ours."""

import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.models.decoder import config as decoder_config
from train.models.decoder import model as decoder
from train.models.io import tensors

DATA = pathlib.Path(__file__).with_name("data")
NAMES = (
  "llama_tied",
  "llama3_scaled",
  "mistral",
  "qwen2",
  "qwen3",
  "smollm3",
  "gemma",
  "gemma2",
  "gemma3_text",
  "gemma3",
  "gpt2",
  "qwen2_vl",
  "qwen2_5_vl",
  "qwen3_vl",
)
# Of the others the layers differ.
SCANNED = tuple(
  name
  for name in NAMES
  if name not in ("qwen3", "gemma2", "gemma3_text", "gemma3")
)

TINY = decoder_config.DecoderConfig(
  vocab_size=13,
  hidden_size=8,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  intermediate_size=12,
  max_positions=16,
  tied=True,
)


class Case(NamedTuple):
  """A checkpoint folder, and what PyTorch computes.

  Attributes:
    config: the sizes.
    tensors: weights by name.
    rows: tokens (L,) and their logits (L, V).
    answers: of each row, the likeliest tokens after it (T,).
  """

  config: decoder_config.DecoderConfig
  tensors: Any
  rows: list[tuple[np.ndarray, np.ndarray]]
  answers: list[np.ndarray]


@functools.cache
def load(name: str) -> Case:
  folder = DATA / name
  text = (folder / "config.json").read_text()
  with np.load(folder / "reference.npz", allow_pickle=False) as file:
    rows = [(file[f"tokens_{i}"], file[f"logits_{i}"]) for i in range(3)]
    answers = [file[f"answer_{i}"] for i in range(3)]
  return Case(
    decoder_config.DecoderConfig.from_hf(json.loads(text)),
    tensors.open_safetensors(folder),
    rows,
    answers,
  )


def random_variables(model: decoder.Decoder, scale: float = 0.4) -> Any:
  """Every parameter drawn, biases and norms too, so that none hides."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype),
    shapes,
  )


def stacked(params: Any, layers: int) -> Any:
  """Parameters of an unrolled decoder as those of a scanned one."""
  rest = {k: v for k, v in params.items() if not k.startswith("layers_")}
  parts = [params[f"layers_{i}"] for i in range(layers)]
  return {**rest, "layers": jax.tree.map(lambda *x: np.stack(x), *parts)}
