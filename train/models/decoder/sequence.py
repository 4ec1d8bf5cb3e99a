"""A decoder with transformers' head for sequences, `score` on the last token.

This is transformers' `LlamaForSequenceClassification` and similar classes. PEFT
calls adapters of these classes SEQ_CLS.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
from jax import typing
import jax.numpy as jnp
import numpy as np

from ..family import Family, Kind, Pretrained
from ..io import tensors as tensors_
from . import config as configs
from . import family, weights
from . import model as decoder

# The heads that a folder may have; the model does not read them.
_HEADS = ("lm_head.weight", "score.weight", "score.bias")


class SequenceDecoder(nn.Module):
  """A decoder, and a linear head without a bias on its last real token.

  Attributes:
    config: the sizes; the decoder's own head is absent.
    num_classes: the outputs of the head; 1 for regression.
    dtype: as of `Decoder`, and the further attributes too; the head is float32.
  """

  config: configs.DecoderConfig
  num_classes: int
  dtype: typing.DTypeLike | None = None
  param_dtype: typing.DTypeLike = jnp.float32
  remat: str = "none"
  scan: bool = False

  def setup(self):
    self.decoder = decoder.Decoder(
      self.config,
      self.dtype,
      param_dtype=self.param_dtype,
      remat=self.remat,
      scan=self.scan,
    )
    self.head = nn.Dense(self.num_classes, use_bias=False, dtype=jnp.float32)

  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """Returns logits, float32 (B, num_classes).

    Args:
      tokens: the tokens of the texts, int (B, L), padded at the end.
      mask: 1 at a real token, 0 at padding, (B, L).
      token_types: ignored; only encoders have them.
    """
    return self.head(self.features(tokens, mask, token_types))

  def features(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the hidden state of the last real token, float32 (B, D)."""
    del token_types
    lengths_Bx1 = mask.astype(jnp.int32).sum(1, keepdims=True)
    x_BxLxD = self.decoder.hidden(tokens, lengths=lengths_Bx1)
    last_B = jnp.maximum(lengths_Bx1[:, 0] - 1, 0)
    x_BxD = jnp.take_along_axis(x_BxLxD, last_B[:, None, None], 1)[:, 0]
    return x_BxD.astype(jnp.float32)


def _headless(config: configs.DecoderConfig) -> configs.DecoderConfig:
  """Returns the sizes without a head, because a tied head has no parameters."""
  return dataclasses.replace(config, tied=True)


def _body(tensors: Mapping[str, Any]) -> dict[str, Any]:
  return {name: x for name, x in tensors.items() if name not in _HEADS}


def _classifier(
  config: configs.DecoderConfig, labels: int, **options: Any
) -> SequenceDecoder:
  return SequenceDecoder(_headless(config), labels, **options)


def _check(
  config: configs.DecoderConfig, tensors: Mapping[str, tensors_.Tensor]
) -> None:
  weights.check(_headless(config), _body(tensors))


def _params(model, tensors, dtype, place) -> dict[str, Any]:
  return {
    "decoder": weights.params(
      model.config, _body(tensors), scan=model.scan, dtype=dtype, place=place
    )
  }


def _complete(found: Pretrained) -> Pretrained:
  complete = family.FAMILY.complete(found)
  # The model answers without words, so the head of the file and the end token
  # do not matter.
  notes = weights.left_out(found.config, found.tensors)
  return dataclasses.replace(complete, config=found.config, notes=notes)


def _kind(model: SequenceDecoder) -> Kind:
  names: dict[str, Any] = {
    f"decoder/{path}": name
    for path, name in weights.modules(model.config, model.scan).items()
  }
  names["head/kernel"] = "score"
  return Kind(
    model.config.sequence_architecture,
    names,
    model.config.bare_prefix,
    "SEQ_CLS",
  )


def _tensors(
  model: SequenceDecoder, params: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  found = weights.tensors(model.config, params["decoder"], scan=model.scan)
  return {**found, "score.weight": np.asarray(params["head"]["kernel"]).T}


FAMILY = Family(
  name="decoder with a head for sequences",
  reads="texts",
  answers="head",
  config=configs.DecoderConfig,
  modules=(SequenceDecoder,),
  sequence_types=configs.SEQUENCE_TYPES,
  complete=_complete,
  classifier=_classifier,
  params=_params,
  check=_check,
  # The inputs are tokens and their mask.
  example_inputs=lambda _: (jax.ShapeDtypeStruct((1, 2), "int32"),) * 2,
  logical_axes=decoder.logical_axes,
  scans=True,
  splits_rows=True,
  head_bias=False,
  kind=_kind,
  tensors=_tensors,
)
