"""Functions that all families of text encoders share."""

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
  """Adds the pooling of the model's folder, and the padding token."""
  how = pooling.read(found.path, found.hf_config)
  return dataclasses.replace(
    found,
    config=dataclasses.replace(found.config, pooling=how),
    pad_id=tokenizer.pad_id(found.tokenizer),
  )


def example_inputs(config: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Returns the shapes of tokens and of their mask."""
  del config
  return (jax.ShapeDtypeStruct((1, 2), "int32"),) * 2


def token_classifier(
  architecture: str, names: Mapping[str, Any], prefix: str, how: str
) -> Kind:
  """Returns transformers' token classifier that is equivalent to our model.

  Our model pools the hidden states and then applies the head. transformers'
  token classifier applies the head to each token. A linear head and a mean can
  change places, so pooling these logits gives our logits.

  Args:
    architecture: the class in transformers.
    names: from paths of the encoder's kernels to modules.
    prefix: the prefix of the encoder's names.
    how: the pooling of our model, one of `pooling.CHOICES`.

  Raises:
    ValueError: if the model pools by the maximum, which is not linear.
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
    # The last hidden states do not depend on the pooler.
    idle=("pooler.dense",),
  )


def head(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the tensors of a classifier's new head."""
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
  """Returns an encoder's tensors by the names of a classifier's folder.

  Folders of bare models lack the prefix. Old folders have layer norms with the
  names gamma and beta.

  Args:
    tensors: the tensors by name.
    prefix: the prefix of the encoder's names.
    parts: the first parts of names in a bare model's folder.
    model: the model's name in the message.

  Raises:
    WeightsError: if a tensor is there by two names.
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
