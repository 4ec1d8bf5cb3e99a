"""Hugging Face's BERT tensors as the parameters of `bert.Bert`."""

import collections.abc
from typing import Any

from flax import traverse_util
import jax.numpy as jnp
import numpy as np

from ..io import weights
from . import model as bert

# Hugging Face's module within a layer -> ours.
_DENSES = {
  "attention.self.query": "query",
  "attention.self.key": "key",
  "attention.self.value": "value",
  "attention.output.dense": "attention_out",
  "intermediate.dense": "intermediate",
  "output.dense": "output",
}
_NORMS = {
  "attention.output.LayerNorm": "attention_norm",
  "output.LayerNorm": "output_norm",
}
# Buffers, not weights; old checkpoints saved them.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def bert_params(
  config: bert.BertConfig,
  tensors: collections.abc.Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Parameters of `bert.Bert` from a Hugging Face checkpoint's tensors.

  Names may carry the prefix 'bert.', and layer norms the older names gamma and
  beta. The pooler and any head (names outside embeddings and encoder) are
  left out: this project's classifier pools by itself and trains its own head.

  Args:
    config: the sizes.
    tensors: arrays by name; a linear weight is (out, in).

  Returns:
    A tree of float32 arrays; a Dense kernel is (in, out).

  Raises:
    WeightsError: tensors are missing, of another shape than the configuration
      says, or in the encoder and unknown to it; all are named together.
  """
  tensors = {_plain_name(name): value for name, value in tensors.items()}
  plan = _plan(config)
  faults = _faults(plan, tensors)
  if faults:
    raise weights.WeightsError(
      "The tensors do not fit the BERT configuration: "
      + "; ".join(faults)
      + "."
    )
  params: dict[str, Any] = {}
  for name, (path, _) in plan.items():
    value = np.asarray(tensors[name], np.float32)
    if path[-1] == "kernel":
      value = value.T
    node = params
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = jnp.asarray(value)
  return params


def bert_tensors(
  config: bert.BertConfig, params: collections.abc.Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Undoes `bert_params`: tensors by the names that they have in a BertModel.

  Args:
    config: the sizes.
    params: of `bert.Bert`.

  Returns:
    Arrays on the host, in the dtype of the parameters; a linear weight is
    (out, in).
  """
  flat = {
    path: np.asarray(value)
    for path, value in traverse_util.flatten_dict(dict(params)).items()
  }
  return {
    name: flat[path].T if path[-1] == "kernel" else flat[path]
    for name, (path, _) in _plan(config).items()
  }


def modules(config: bert.BertConfig) -> dict[str, str]:
  """The path of each kernel, and its module in a BertModel."""
  return {
    "/".join(path): name.removesuffix(".weight")
    for name, (path, _) in _plan(config).items()
    if path[-1] == "kernel"
  }


def _plan(
  config: bert.BertConfig,
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
  """Tensor name -> path in the parameter tree, and the tensor's shape."""
  width, inner = config.hidden_size, config.intermediate_size
  plan: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}

  def norm(source: str, *path: str) -> None:
    plan[f"{source}.weight"] = ((*path, "scale"), (width,))
    plan[f"{source}.bias"] = ((*path, "bias"), (width,))

  for ours, rows in (
    ("word", config.vocab_size),
    ("position", config.max_positions),
    ("token_type", config.type_vocab_size),
  ):
    plan[f"embeddings.{ours}_embeddings.weight"] = (
      ("embeddings", ours, "embedding"),
      (rows, width),
    )
  norm("embeddings.LayerNorm", "embeddings", "norm")
  for i in range(config.num_layers):
    source, layer = f"encoder.layer.{i}", f"layer_{i}"
    for theirs, ours in _DENSES.items():
      out = inner if ours == "intermediate" else width
      into = inner if ours == "output" else width
      plan[f"{source}.{theirs}.weight"] = ((layer, ours, "kernel"), (out, into))
      plan[f"{source}.{theirs}.bias"] = ((layer, ours, "bias"), (out,))
    for theirs, ours in _NORMS.items():
      norm(f"{source}.{theirs}", layer, ours)
  return plan


def _faults(
  plan: collections.abc.Mapping[str, tuple[Any, tuple[int, ...]]],
  tensors: collections.abc.Mapping[str, np.ndarray],
) -> list[str]:
  faults = [f"{name} is missing" for name in plan if name not in tensors]
  faults += [
    f"{name} has shape {tensors[name].shape}, expected {shape}"
    for name, (_, shape) in plan.items()
    if name in tensors and tensors[name].shape != shape
  ]
  # A seventh layer beside a configuration of six would be dropped in silence.
  faults += [
    f"{name} has no place in it"
    for name in tensors
    if name.startswith(("embeddings.", "encoder."))
    and name not in plan
    and name not in _BUFFERS
  ]
  return faults


def _plain_name(name: str) -> str:
  name = name.removeprefix("bert.")
  for old, new in (("gamma", "weight"), ("beta", "bias")):
    if name.endswith(f".LayerNorm.{old}"):
      name = name.removesuffix(old) + new
  return name
