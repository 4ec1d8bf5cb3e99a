"""Converts Hugging Face's tensors to parameters of `vit.Vit`.

The names may lack the prefix of the tower, as in a folder of a model without a
head. Text towers, poolers and heads are left out, because this project's
classifier has its own head.
"""

from collections.abc import Mapping
import re
from typing import Any, NamedTuple

from flax import traverse_util
import numpy as np

from bilora_jax import peft

from ..io import stored
from ..io import tensors as tensors_
from .config import CHANNELS, VitConfig


class _Names(NamedTuple):
  """How a kind of checkpoint names its tensors.

  Attributes:
    first: from our name of each token before the patches to its tensor.
    registers: the tensor of the register tokens.
    positions: the tensor of all positions.
    patch: the module of the product with a patch.
    layer: the format string of a layer's prefix, for its number.
    denses: from each linear module within a layer to our module.
    norms: from each norm within a layer to our module.
    scales: from each scale of a branch within a layer to our module.
    before: the norm before the layers.
    after: the norm after the layers.
    unused: the tower's tensors that our model lacks.
    left_out: the unused tensors that transformers' classifiers lack too.
    renamed: from parts of tensors' names to the parts of modules' names in
      transformers 5, which adapters use.
  """

  first: dict[str, str]
  positions: str
  patch: str
  layer: str
  denses: dict[str, str]
  norms: dict[str, str]
  after: str
  unused: re.Pattern[str]
  left_out: re.Pattern[str]
  registers: str = ""
  before: str = ""
  scales: Mapping[str, str] = {}
  renamed: Mapping[str, str] = {}


_FIRST = {
  "cls": "embeddings.cls_token",
  "distillation": "embeddings.distillation_token",
}
_ATTENTION = {
  "attention.attention.query": "query",
  "attention.attention.key": "key",
  "attention.attention.value": "value",
  "attention.output.dense": "attention_out",
}
_RENAMED = {
  ".attention.attention.query": ".attention.q_proj",
  ".attention.attention.key": ".attention.k_proj",
  ".attention.attention.value": ".attention.v_proj",
  ".attention.output.dense": ".attention.o_proj",
}
_BY_KIND = {
  "vit": _Names(
    first=_FIRST,
    positions="embeddings.position_embeddings",
    patch="embeddings.patch_embeddings.projection",
    layer="encoder.layer.{}",
    denses={
      **_ATTENTION,
      "intermediate.dense": "intermediate",
      "output.dense": "output",
    },
    norms={
      "layernorm_before": "attention_norm",
      "layernorm_after": "output_norm",
    },
    after="layernorm",
    unused=re.compile(r"pooler\..*|embeddings\.mask_token"),
    left_out=re.compile(r".*"),
    renamed={
      "encoder.layer.": "layers.",
      **_RENAMED,
      ".intermediate.dense": ".mlp.fc1",
      ".output.dense": ".mlp.fc2",
    },
  ),
  "dinov2": _Names(
    first=_FIRST,
    registers="embeddings.register_tokens",
    positions="embeddings.position_embeddings",
    patch="embeddings.patch_embeddings.projection",
    layer="encoder.layer.{}",
    denses={**_ATTENTION, "mlp.fc1": "intermediate", "mlp.fc2": "output"},
    norms={"norm1": "attention_norm", "norm2": "output_norm"},
    scales={
      "layer_scale1.lambda1": "attention_scale",
      "layer_scale2.lambda1": "output_scale",
    },
    after="layernorm",
    # The token that replaces a masked patch in pre-training.
    unused=re.compile(r"embeddings\.mask_token"),
    left_out=re.compile(r""),
    renamed=_RENAMED,
  ),
  "clip": _Names(
    first={"cls": "embeddings.class_embedding"},
    positions="embeddings.position_embedding.weight",
    patch="embeddings.patch_embedding",
    layer="encoder.layers.{}",
    denses={
      "self_attn.q_proj": "query",
      "self_attn.k_proj": "key",
      "self_attn.v_proj": "value",
      "self_attn.out_proj": "attention_out",
      "mlp.fc1": "intermediate",
      "mlp.fc2": "output",
    },
    norms={"layer_norm1": "attention_norm", "layer_norm2": "output_norm"},
    before="pre_layrnorm",
    after="post_layernorm",
    unused=re.compile(r"head\..*|post_layernorm\..*|embeddings\.position_ids"),
    left_out=re.compile(r"embeddings\.position_ids"),
  ),
}


def vit_params(
  config: VitConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Returns the parameters of `vit.Vit` from the tensors of a checkpoint.

  Args:
    config: the sizes.
    tensors: arrays by Hugging Face's names.

  Returns:
    A tree of float32 arrays on the host; a Dense kernel is (in, out).

  Raises:
    WeightsError: tensors are missing, have a wrong shape, are not floats, or
      are unknown. One message lists the first of them.
  """
  check(config, tensors)
  names, found = _names(config), _own(config, tensors)
  first = config.tower.first
  flat: dict[tuple[str, ...], np.ndarray] = {}
  for path, source in _plan(config).items():
    (name,) = source.names
    value = np.asarray(found[name], np.float32)
    if name == names.positions:
      value = value.reshape(-1, config.hidden_size)
      for token, row in zip(first, value):
        flat["embeddings", f"{token}_position"] = row
      value = value[len(first) :].reshape(config.grid, config.grid, -1)
    elif name == f"{names.patch}.weight":
      # From (D, C, P, P) to a patch's pixels row by row, with channels last.
      value = value.transpose(2, 3, 1, 0).reshape(-1, config.hidden_size)
    elif name == names.registers:
      value = value[0]
    elif path[-1] in first:
      value = value.reshape(-1)
    elif source.transposed:
      value = value.T
    flat[path] = value
  return traverse_util.unflatten_dict(flat)


def check(config: VitConfig, tensors: Mapping[str, tensors_.Tensor]) -> None:
  """Refuses tensors that `vit_params` cannot read.

  Raises:
    WeightsError: as `vit_params`.
  """
  unused = _names(config).unused
  stored.check_layers(config.num_layers, tensors, "ViT")
  stored.check(
    _plan(config),
    _own(config, tensors),
    lambda name: unused.fullmatch(name) is not None,
    "ViT",
  )


def vit_tensors(
  config: VitConfig, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns the tensors by their names in the tower; undoes `vit_params`.

  Args:
    config: the sizes.
    params: the parameters of `vit.Vit`.

  Returns:
    Arrays on the host, in the dtype of the parameters.
  """
  names = _names(config)
  flat = {
    path: np.asarray(value)
    for path, value in traverse_util.flatten_dict(dict(params)).items()
  }
  found = {}
  for path, source in _plan(config).items():
    (name,) = source.names
    value = flat[path]
    if name == names.positions:
      first = [
        flat["embeddings", f"{token}_position"][None]
        for token in config.tower.first
      ]
      value = np.concatenate([*first, value.reshape(-1, config.hidden_size)])
    elif name == f"{names.patch}.weight":
      side = config.patch_size
      value = value.reshape(side, side, CHANNELS, -1).transpose(3, 2, 0, 1)
    elif source.transposed:
      value = value.T
    found[name] = value.reshape(source.tensor_shape)
  return found


def carried(
  config: VitConfig, tensors: Mapping[str, tensors_.Tensor]
) -> dict[str, np.ndarray]:
  """Returns the tower's tensors that only an export needs.

  An example is a SigLIP's pooling head. `vit_params` leaves these tensors out.

  Args:
    config: the sizes.
    tensors: the tensors by Hugging Face's names.

  Returns:
    Arrays by their names in a classifier.
  """
  names, plan = _names(config), _plan(config)
  planned = {source.names[0] for source in plan.values()}
  return {
    config.tower.prefix + name: tensor[(slice(None),) * len(tensor.shape)]
    for name, tensor in _own(config, tensors).items()
    if name not in planned
    and names.unused.fullmatch(name)
    and not names.left_out.fullmatch(name)
  }


def modules(config: VitConfig) -> dict[str, str | peft.Convolution]:
  """Returns the path of each kernel, and its module in the tower.

  The modules have transformers 5's names. Some of these differ from the names
  of their weights in checkpoints.
  """
  side, names = config.patch_size, _names(config)
  found: dict[str, str | peft.Convolution] = {}
  for path, source in _plan(config).items():
    if path[-1] == "kernel":
      module = source.names[0].removesuffix(".weight")
      is_patch = module == names.patch
      for old, new in names.renamed.items():
        module = module.replace(old, new)
      found["/".join(path)] = (
        peft.Convolution(module, side, side) if is_patch else module
      )
  return found


def _names(config: VitConfig) -> _Names:
  return _BY_KIND[config.tower.names]


def _own(config: VitConfig, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the tower's tensors, by their names in the tower."""
  prefix = config.tower.prefix
  if not any(name.startswith(prefix) for name in tensors):
    return tensors
  return {
    name.removeprefix(prefix): tensor
    for name, tensor in tensors.items()
    if name.startswith(prefix)
  }


def _plan(config: VitConfig) -> dict[stored.Path, stored.Source]:
  """Returns the plan: from a parameter's path to its tensor's name and shape.

  The tensors of positions, patches and tokens have other shapes than their
  parameters.
  """
  names, tower = _names(config), config.tower
  width, inner = config.hidden_size, config.intermediate_size
  side, count = config.patch_size, len(tower.first) + config.grid**2
  plan: dict[stored.Path, stored.Source] = {}

  def add(path: stored.Path, name: str, *shape: int) -> None:
    plan[path] = stored.Source((name,), shape, path[-1] == "kernel", False)

  def norm(module: str, *path: str) -> None:
    add((*path, "scale"), f"{module}.weight", width)
    add((*path, "bias"), f"{module}.bias", width)

  # CLIP's tokens are vectors; the other kinds have shape (1, 1, width).
  ones = (1, 1) if tower.names != "clip" else ()
  for token in tower.first:
    add(("embeddings", token), names.first[token], *ones, width)
  if config.registers:
    shape = (1, config.registers, width)
    add(("embeddings", "registers"), names.registers, *shape)
  add(("embeddings", "position"), names.positions, *ones[:1], count, width)
  patch = ("embeddings", "patch")
  shape = (width, CHANNELS, side, side)
  add((*patch, "kernel"), f"{names.patch}.weight", *shape)
  if tower.patch_bias:
    add((*patch, "bias"), f"{names.patch}.bias", width)
  if tower.norm_before:
    norm(names.before, "norm_before")
  if tower.norm_after:
    norm(names.after, "norm")
  for i in range(config.num_layers):
    source, layer = names.layer.format(i), f"layer_{i}"
    for theirs, ours in names.denses.items():
      out = inner if ours == "intermediate" else width
      into = inner if ours == "output" else width
      add((layer, ours, "kernel"), f"{source}.{theirs}.weight", out, into)
      if config.qkv_bias or ours not in ("query", "key", "value"):
        add((layer, ours, "bias"), f"{source}.{theirs}.bias", out)
    for theirs, ours in names.norms.items():
      norm(f"{source}.{theirs}", layer, ours)
    for theirs, ours in names.scales.items():
      add((layer, ours), f"{source}.{theirs}", width)
  return plan
