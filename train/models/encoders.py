"""What the families of encoders of texts have in common."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import numpy as np

from . import pooling
from .family import Kind, Pretrained
from .io import tensors as tensors_
from .io import tokenizer, weights


def complete(found: Pretrained) -> Pretrained:
  """Adds how the folder pools, and the token that pads."""
  how = pooling.read(found.path, found.hf_config)
  return dataclasses.replace(
    found,
    config=dataclasses.replace(found.config, pooling=how),
    pad_id=tokenizer.pad_id(found.tokenizer),
  )


def example_inputs(config: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Shapes of tokens and of their mask."""
  del config
  return (jax.ShapeDtypeStruct((1, 2), "int32"),) * 2


def token_classifier(
  architecture: str, names: Mapping[str, Any], prefix: str, how: str
) -> Kind:
  """A classifier of tokens in transformers, of which ours is a part.

  Its logits, pooled as our hidden states are, are ours, for a linear head and a
  mean may change places.

  Args:
    architecture: its class.
    names: from paths of the encoder's kernels to modules.
    prefix: of the encoder.
    how: our model pools; one of `pooling.CHOICES`.

  Raises:
    ValueError: if it pools by the maximum, which is not linear.
  """
  if how == "max":
    raise ValueError(
      "transformers has no classifier that pools by the maximum of the hidden "
      "states, as this model's sentence-transformers configuration says."
    )
  heads = dict.fromkeys(("head/kernel", "head/bias"), "classifier")
  return Kind(
    architecture,
    {**names, **heads},
    prefix,
    "TOKEN_CLS",
    first=how == "cls",
    # The last hidden states need no pooler.
    idle=("pooler.dense",),
  )


def head(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The tensors of a classifier's new head."""
  return {
    "classifier.weight": np.asarray(params["head"]["kernel"]).T,
    "classifier.bias": np.asarray(params["head"]["bias"]),
  }


def by_full_name(
  tensors: Mapping[str, tensors_.Tensor],
  prefix: str,
  parts: tuple[str, ...],
  model: str,
) -> dict[str, tensors_.Tensor]:
  """Tensors of an encoder by the names that a classifier's folder has.

  Bare models lack the prefix, and layer norms have the older names gamma and
  beta.

  Args:
    tensors: by name.
    prefix: of the encoder.
    parts: what names of a bare model's tensors begin with.
    model: its name for the sentence.

  Raises:
    WeightsError: if one is there by two names.
  """
  found: dict[str, str] = {}
  for name in tensors:
    full = prefix + name if name.startswith(parts) else name
    for old, new in (("gamma", "weight"), ("beta", "bias")):
      if full.endswith(f".LayerNorm.{old}"):
        full = full.removesuffix(old) + new
    other = found.setdefault(full, name)
    if other != name:
      raise weights.WeightsError(
        f"The tensors do not fit the {model}'s configuration: {other} and "
        f"{name} are two names of one."
      )
  return {full: tensors[name] for full, name in found.items()}
