"""ModernBERT's encoder and classifier in Flax Linen.

Shapes: B batch, L length, N = B·L tokens, D width, H heads, K = D/H.
"""

from typing import Any

from flax import linen as nn
from flax.linen import spmd
import jax
from jax import typing
import jax.numpy as jnp
import numpy as np

from .. import (
  activations,
  attention,
  encoder_layers,
  float32,
  remat,
)
from .config import ModernBertConfig

_AXES = {
  **encoder_layers.AXES,
  "qkv": ("embed", "heads"),
  "dense": ("embed", None),
}


class ModernBert(nn.Module):
  """ModernBERT's encoder: pre-norm, with rotary positions and windows.

  It has no dropout.

  Attributes:
    config: the sizes.
    dtype: the dtype of matrix products; None is float32. The softmax, the
      norms, the residual sums and the parameters are always float32.
    remat: what a layer's backward pass computes again; see `remat.layer`.
  """

  config: ModernBertConfig
  dtype: typing.DTypeLike | None = None
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the normed hidden states of the last layer.

    Args:
      tokens: token ids, int (B, L).
      mask: 1 or True at a real token, 0 or False at padding, (B, L).
      token_types: ignored, because the model has no segments.

    Returns:
      (B, L, D) in the compute dtype. The values at padding are finite, but have
      no meaning.

    Raises:
      ValueError: a shape is wrong.
    """
    encoder_layers.check_shapes(tokens, mask, token_types, None, "ModernBERT")
    c, length = self.config, tokens.shape[1]
    dtype = self.dtype or jnp.float32
    embed = nn.Embed(
      c.vocab_size,
      c.hidden_size,
      embedding_init=nn.initializers.normal(0.02),
      name="word",
    )
    x_NxD = embed(tokens).reshape(-1, c.hidden_size)
    x_NxD = _norm(c, "embedding_norm")(x_NxD).astype(dtype)
    full, local = _seen(c, dtype, mask.astype(bool))
    layer = remat.layer(_Layer, self.remat)
    # Activations stay 2-D between layers: see train/models/bert/model.py.
    for i in range(c.num_layers):
      is_local = c.is_local(i)
      # On a mesh, devices keep their rows and gather the weights.
      x_NxD = spmd.with_logical_constraint(x_NxD, ("batch", None))
      theta = c.local_theta if is_local else c.full_theta
      # The first layer needs no norm, because the embeddings are normed.
      x_NxD = layer(c, length, theta, i > 0, dtype, name=f"layer_{i}")(
        x_NxD, local if is_local else full
      )
    x_NxD = _norm(c, "final_norm")(x_NxD).astype(dtype)
    return x_NxD.reshape(*tokens.shape, -1)


class ModernBertClassifier(encoder_layers.Classifier):
  """ModernBERT with a linear head on the pooled states of the real tokens.

  If the folder has the pretraining's head, this head is between the pooling and
  the linear head, as in transformers' sequence classifier.
  """

  def setup(self):
    self.encoder = ModernBert(self.config, self.dtype, self.remat)
    if self.config.prediction:
      self.prediction = _Prediction(self.config)
    self.head = nn.Dense(self.num_classes, dtype=jnp.float32)

  def features(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the input of the linear head, float32 (B, D)."""
    x_BxD = super().features(tokens, mask, token_types)
    return self.prediction(x_BxD) if self.config.prediction else x_BxD


def logical_axes(variables: Any) -> Any:
  """Returns the names of the variables' axes, as `encoder_layers` does."""
  return encoder_layers.logical_axes(variables, _AXES)


class _Prediction(nn.Module):
  """The pretraining's head, without its last layer, the logits of words."""

  config: ModernBertConfig

  @nn.compact
  def __call__(self, x_BxD: jax.Array) -> jax.Array:
    c = self.config
    dense = encoder_layers.dense(c.hidden_size, jnp.float32, "dense", False)
    x_BxD = activations.BY_NAME[c.prediction_act](dense(x_BxD))
    return _norm(c, "norm")(x_BxD)


class _Layer(nn.Module):
  """Self-attention and a gated feed-forward layer, pre-norm.

  Attributes:
    config: the sizes.
    length: L.
    theta: the base of the rotary wavelengths.
    normed: whether there is a norm before the attention.
    dtype: the dtype of matrix products.
  """

  config: ModernBertConfig
  length: int
  theta: float
  normed: bool
  dtype: typing.DTypeLike

  @nn.compact
  def __call__(self, x_NxD: jax.Array, seen: attention.Seen) -> jax.Array:
    c = self.config
    y_NxD = x_NxD
    if self.normed:
      y_NxD = _norm(c, "attention_norm")(x_NxD).astype(self.dtype)
    qkv_NxD3 = self._dense(3 * c.hidden_size, "qkv")(y_NxD)
    shape = (-1, self.length, 3, c.num_heads, c.head_size)
    q, k, v = jnp.moveaxis(qkv_NxD3.reshape(shape), 2, 0)
    q, k = (_rotated(x_BxLxHxK, self.theta) for x_BxLxHxK in (q, k))
    y_BxLxHxK = attention.attention(q, k, v, seen)
    y_NxD = y_BxLxHxK.reshape(-1, c.hidden_size)
    y_NxD = self._dense(c.hidden_size, "attention_out")(y_NxD)
    x_NxD = float32.residual(x_NxD, y_NxD)

    y_NxD = _norm(c, "mlp_norm")(x_NxD).astype(self.dtype)
    y_NxF2 = self._dense(2 * c.intermediate_size, "intermediate")(y_NxD)
    y_NxF, gate_NxF = jnp.split(y_NxF2, 2, axis=-1)
    y_NxF = activations.BY_NAME[c.hidden_act](y_NxF) * gate_NxF
    y_NxD = self._dense(c.hidden_size, "output")(y_NxF)
    return float32.residual(x_NxD, y_NxD)

  def _dense(self, features: int, name: str) -> nn.Dense:
    return encoder_layers.dense(features, self.dtype, name, use_bias=False)


def _norm(config: ModernBertConfig, name: str) -> nn.LayerNorm:
  return encoder_layers.norm(config.norm_eps, name, use_bias=False)


def _seen(
  config: ModernBertConfig, dtype: typing.DTypeLike, mask_BxL: jax.Array
) -> tuple[attention.Seen, attention.Seen]:
  """Returns what a global layer sees, and what a local layer sees."""
  length = mask_BxL.shape[1]
  kernel = attention.chosen("auto", dtype, config.head_size, length)
  full = attention.real(kernel, mask_BxL)
  if length <= config.window + 1:
    return full, full
  places = np.arange(length)
  near_LxL = np.abs(places[:, None] - places) <= config.window
  mask_BxLxL = mask_BxL[:, None] & near_LxL
  return full, attention.masked(kernel, mask_BxLxL)


def _rotated(x_BxLxHxK: jax.Array, theta: float) -> jax.Array:
  """Rotates pairs of a head's two halves (Su et al., arXiv 2104.09864)."""
  length, _, size = x_BxLxHxK.shape[1:]
  frequencies = np.float64(theta) ** -(np.arange(0, size, 2) / size)
  # float32 rounds the angles of far positions, as in the model's training.
  places = np.arange(length, dtype=np.float32)[:, None, None]
  angles = places * frequencies.astype(np.float32)
  cos, sin = np.cos(angles), np.sin(angles)
  first, second = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
  turned = first * cos - second * sin, second * cos + first * sin
  return jnp.concatenate(turned, -1).astype(x_BxLxHxK.dtype)
