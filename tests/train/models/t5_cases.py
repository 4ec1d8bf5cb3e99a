"""Small T5s whose logits and answers PyTorch computed, to test ours by."""

import functools
import json
from typing import Any, NamedTuple

from decoder_cases import DATA
import jax
import jax.numpy as jnp
import numpy as np

from train.models.io import tensors
from train.models.t5 import config as t5_config
from train.models.t5 import model as t5

NAMES = ("t5_v1_0", "t5_v1_1", "mt5")

TINY = t5_config.T5Config(
  vocab_size=13,
  hidden_size=8,
  num_layers=2,
  num_decoder_layers=1,
  num_heads=2,
  head_dim=6,
  intermediate_size=12,
  feed_forward="gated-gelu",
  tied=False,
  scaled=False,
  num_buckets=8,
  max_distance=6,
)


class Row(NamedTuple):
  """A source (S,), a target (L,), its logits (L, V), and a greedy answer."""

  source: np.ndarray
  target: np.ndarray
  logits: np.ndarray
  greedy: np.ndarray


class Case(NamedTuple):
  """A checkpoint, rows, and the buckets of distances -200 to 200, (2, 401)."""

  config: t5_config.T5Config
  tensors: Any
  rows: list[Row]
  buckets: np.ndarray


@functools.cache
def load(name: str) -> Case:
  folder = DATA / name
  text = (folder / "config.json").read_text()
  with np.load(folder / "reference.npz", allow_pickle=False) as file:
    rows = [
      Row(*(file[f"{field}_{i}"] for field in Row._fields)) for i in range(3)
    ]
    buckets = file["buckets"]
  return Case(
    t5_config.T5Config.from_hf(json.loads(text)),
    tensors.open_safetensors(folder),
    rows,
    buckets,
  )


def padded(
  rows: list[np.ndarray], width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of one width, with what no row has at the end, and their mask."""
  width = width or max(map(len, rows))
  tokens = np.full((len(rows), width), 7, np.int32)
  mask = np.zeros((len(rows), width), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)], mask[i, : len(row)] = row, 1
  return tokens, mask


def random_variables(model: t5.T5, *inputs: Any, scale: float = 0.4) -> Any:
  """Every parameter drawn, norms and biases too, so that none hides."""
  inputs = inputs or (jnp.ones((1, 1), int),) * 3
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype),
    shapes,
  )


def stacked(params: Any) -> Any:
  """Parameters, or adapters, of an unrolled T5 as those of a scanned one."""
  found = dict(params)
  for stack in ("encoder", "decoder"):
    parts = dict(params[stack])
    names = sorted(name for name in parts if name.startswith("layers_"))
    layers = [parts.pop(name) for name in names]
    parts["layers"] = jax.tree.map(lambda *x: np.stack(x), *layers)
    found[stack] = parts
  return found
