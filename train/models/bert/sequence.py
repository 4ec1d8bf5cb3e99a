"""A BERT with transformers' head for sequences, `classifier` on its pooler.

This is transformers' `BertForSequenceClassification`. PEFT calls its adapters
SEQ_CLS.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
from jax import typing
import jax.numpy as jnp
import numpy as np

from .. import encoder_layers
from ..family import Family, Kind
from ..io import stored
from ..io import tensors as tensors_
from . import family, weights
from . import model as bert

_POOLER = "bert.pooler.dense"


class SequenceBert(encoder_layers.Classifier):
  """BERT, its pooler, and a linear head.

  The pooler is a linear layer and a tanh on the first token (Devlin et al.,
  NAACL 2019, section 3); the layer is in the compute dtype.
  """

  def setup(self):
    self.encoder = bert.Bert(self.config, self.dtype, self.remat)
    self.pooler = nn.Dense(
      self.config.hidden_size, dtype=self.dtype or jnp.float32
    )
    self.head = nn.Dense(self.num_classes, dtype=jnp.float32)

  def features(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the pooler's output for the first token, float32 (B, D)."""
    x_BxD = self.encoder(tokens, mask, token_types)[:, 0]
    return jnp.tanh(self.pooler(x_BxD).astype(jnp.float32))


def _plan(config: bert.BertConfig) -> dict[stored.Path, stored.Source]:
  width = config.hidden_size
  return {
    ("pooler", "kernel"): stored.Source(
      (f"{_POOLER}.weight",), (width, width), True, False
    ),
    ("pooler", "bias"): stored.Source(
      (f"{_POOLER}.bias",), (width,), False, False
    ),
  }


def _pooler(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the pooler's tensors, by their names in a whole model."""
  short = _POOLER.removeprefix("bert.")
  return {
    name.replace(short, _POOLER) if name.startswith(short) else name: x
    for name, x in tensors.items()
    if short in name
  }


def _classifier(
  config: bert.BertConfig,
  labels: int,
  *,
  dtype: typing.DTypeLike | None = None,
  remat: str = "none",
  **_: Any,
) -> SequenceBert:
  # `param_dtype` has no effect, because weights keep the dtype of the reading.
  return SequenceBert(config, labels, dtype, remat)


def _check(
  config: bert.BertConfig, tensors: Mapping[str, tensors_.Tensor]
) -> None:
  weights.check(config, tensors)
  stored.check(_plan(config), _pooler(tensors), lambda _: False, "BERT")


def _params(model, tensors, dtype, place) -> dict[str, Any]:
  _check(model.config, tensors)
  encoder = weights.params(model.config, tensors, dtype=dtype, place=place)
  plan = _plan(model.config)
  return encoder | stored.read(plan, _pooler(tensors), dtype, place)


def _kind(model: SequenceBert) -> Kind:
  names: dict[str, Any] = dict(weights.modules(model.config))
  names |= stored.modules(_plan(model.config))
  names |= dict.fromkeys(("head/kernel", "head/bias"), "classifier")
  return Kind("BertForSequenceClassification", names, "bert.", "SEQ_CLS")


def _tensors(
  model: SequenceBert, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  return {
    **weights.tensors(model.config, params),
    **stored.tensors(_plan(model.config), params),
    "classifier.weight": np.asarray(params["head"]["kernel"]).T,
    "classifier.bias": np.asarray(params["head"]["bias"]),
  }


FAMILY = Family(
  name="BERT with a head for sequences",
  reads="texts",
  answers="head",
  config=bert.BertConfig,
  modules=(SequenceBert,),
  sequence_types=("bert",),
  complete=family.FAMILY.complete,
  classifier=_classifier,
  params=_params,
  check=_check,
  # The inputs are tokens and their mask.
  example_inputs=lambda _: (jax.ShapeDtypeStruct((1, 2), "int32"),) * 2,
  logical_axes=bert.logical_axes,
  kind=_kind,
  tensors=_tensors,
)
