"""DeBERTa's encoder and classifier in Flax Linen.

Shapes: B batch, L length, N = B·L tokens, D width, H heads, K = D/H, and
P = 2L - 1 distances between two tokens.
"""

from typing import Any

from flax import linen as nn
from flax.linen import spmd
import jax
from jax import typing
import jax.numpy as jnp
import numpy as np

from .. import encoder_layers, remat
from .config import DebertaConfig

# A finite value keeps the softmax finite when all keys of a query are masked.
_MASKED = -1e9
_AXES = {
  **encoder_layers.AXES,
  "qkv": ("embed", "heads"),
  "position_key": ("embed", "heads"),
  "position_query": ("embed", "heads"),
}


class Deberta(nn.Module):
  """DeBERTa's encoder, without dropout and without the pooler.

  Attributes:
    config: the sizes.
    dtype: the dtype of matrix products; None is float32. The softmax, the layer
      norms, the residual sums and the parameters are always float32.
    remat: what a layer's backward pass computes again; see `remat.layer`.
  """

  config: DebertaConfig
  dtype: typing.DTypeLike | None = None
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the hidden states of the last layer.

    Args:
      tokens: token ids, int (B, L).
      mask: 1 or True at a real token, 0 or False at padding, (B, L).
      token_types: segment ids, int (B, L); None: all are 0. A model without
        segments ignores them.

    Returns:
      (B, L, D) in the compute dtype. The values at padding are finite, but have
      no meaning.

    Raises:
      ValueError: a shape is wrong, or L exceeds the learned positions.
    """
    c, length = self.config, tokens.shape[-1]
    encoder_layers.check_shapes(tokens, mask, token_types, c.longest, "DeBERTa")
    dtype = self.dtype or jnp.float32
    if token_types is None:
      token_types = jnp.zeros_like(tokens)
    x_NxD = _Embeddings(c, dtype, name="embeddings")(tokens, token_types)
    distances_PxD = _embed(c, 2 * c.span, "distance")(_rows(c, length))
    if c.norms_positions:
      norm = encoder_layers.norm(c.layer_norm_eps, "distance_norm")
      distances_PxD = norm(distances_PxD)
    distances_PxD = distances_PxD.astype(dtype)
    layer = remat.layer(_Layer, self.remat)
    # Activations stay 2-D between layers: see train/models/bert/model.py.
    for i in range(c.num_layers):
      # On a mesh, devices keep their rows and gather the weights.
      x_NxD = spmd.with_logical_constraint(x_NxD, ("batch", None))
      x_NxD = layer(c, dtype, name=f"layer_{i}")(
        x_NxD, distances_PxD, mask.astype(bool)
      )
    return x_NxD.reshape(*tokens.shape, -1)


class DebertaClassifier(encoder_layers.Classifier):
  """DeBERTa with a linear head on the pooled states of the real tokens."""

  def setup(self):
    self.encoder = Deberta(self.config, self.dtype, self.remat)
    self.head = nn.Dense(self.num_classes, dtype=jnp.float32)


def logical_axes(variables: Any) -> Any:
  """Returns the names of the variables' axes, as `encoder_layers` does."""
  return encoder_layers.logical_axes(variables, _AXES)


def _embed(config: DebertaConfig, rows: int, name: str) -> nn.Embed:
  init = nn.initializers.normal(0.02)
  return nn.Embed(rows, config.hidden_size, embedding_init=init, name=name)


class _Embeddings(nn.Module):
  """The normed sum of the word, position and segment embeddings, (N, D)."""

  config: DebertaConfig
  dtype: typing.DTypeLike

  @nn.compact
  def __call__(self, tokens: jax.Array, token_types: jax.Array) -> jax.Array:
    c = self.config
    x = _embed(c, c.vocab_size, "word")(tokens)
    if c.has_positions:
      places = jnp.arange(tokens.shape[1])
      x += _embed(c, c.max_positions, "position")(places)
    if c.type_vocab_size is not None:
      x += _embed(c, c.type_vocab_size, "token_type")(token_types)
    norm = encoder_layers.norm(c.layer_norm_eps, "norm")
    return norm(x.reshape(-1, c.hidden_size)).astype(self.dtype)


class _Layer(nn.Module):
  """Disentangled self-attention and a feed-forward layer, post-norm.

  A score is the sum of q_i·k_j, q_i·r_ij and k_j·s_ij. The vectors r_ij and
  s_ij are projections of the embedding of the distance i - j (He et al., ICLR
  2021, equation 4).
  """

  config: DebertaConfig
  dtype: typing.DTypeLike

  @nn.compact
  def __call__(
    self, x_NxD: jax.Array, distances_PxD: jax.Array, mask_BxL: jax.Array
  ) -> jax.Array:
    c, shape, row = self.config, mask_BxL.shape, (1, len(distances_PxD))
    if c.model_type == "deberta":
      q_BxHxLxK, k_BxHxLxK, v_BxHxLxK = self._joined_heads(x_NxD, shape)
      key = self._dense("position_key", use_bias=False)
      query = self._dense("position_query")
    else:
      query, key = self._dense("query"), self._dense("key")
      q_BxHxLxK = self._split(query(x_NxD), shape)
      k_BxHxLxK = self._split(key(x_NxD), shape)
      v_BxHxLxK = self._split(self._dense("value")(x_NxD), shape)
      if not c.shares_projections:
        key = self._dense("position_key")
        query = self._dense("position_query")
    scores_BxHxLxL = _products(q_BxHxLxK, k_BxHxLxK)
    if "c2p" in c.attends:
      r_HxPxK = self._split(key(distances_PxD), row)[0]
      scores_BxHxLxL += _by_distance(_products(q_BxHxLxK, r_HxPxK))
    if "p2c" in c.attends:
      # The distances are reversed, because a row has the queries of one key.
      s_HxPxK = self._split(query(distances_PxD[::-1]), row)[0]
      by_key = _by_distance(_products(k_BxHxLxK, s_HxPxK))
      scores_BxHxLxL += by_key.swapaxes(2, 3)
    scores_BxHxLxL *= (c.head_size * (1 + len(c.attends))) ** -0.5
    scores_BxHxLxL += jnp.where(mask_BxL, 0.0, _MASKED)[:, None, None]
    probs_BxHxLxL = jax.nn.softmax(scores_BxHxLxL).astype(self.dtype)
    y_BxHxLxK = jnp.matmul(probs_BxHxLxL, v_BxHxLxK)
    y_NxD = y_BxHxLxK.swapaxes(1, 2).reshape(-1, c.hidden_size)
    return encoder_layers.after_attention(c, x_NxD, y_NxD)

  def _joined_heads(
    self, x_NxD: jax.Array, shape: tuple[int, ...]
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the first DeBERTa's queries, keys and values, (B, H, L, K)."""
    c = self.config
    # In this one product, each head has its query, key and value together.
    qkv = encoder_layers.dense(3 * c.hidden_size, self.dtype, "qkv", False)
    q, k, v = jnp.split(self._split(qkv(x_NxD), shape), 3, axis=-1)

    def biased(name, y):
      bias_D = self.param(name, nn.initializers.zeros, (c.hidden_size,))
      return y + bias_D.reshape(c.num_heads, 1, -1).astype(y.dtype)

    return biased("q_bias", q), k, biased("v_bias", v)

  def _dense(self, name: str, use_bias: bool = True) -> nn.Dense:
    width = self.config.hidden_size
    return encoder_layers.dense(width, self.dtype, name, use_bias)

  def _split(self, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Splits heads, from (N, H·M) to (B, H, L, M)."""
    return y.reshape(*shape, self.config.num_heads, -1).swapaxes(1, 2)


def _products(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns the products of all rows of `x` with all rows of `y`, float32."""
  return jnp.matmul(x, y.swapaxes(-1, -2), preferred_element_type=jnp.float32)


def _by_distance(x_BxHxLxP: jax.Array) -> jax.Array:
  """Returns (B, H, L, L), whose entry (i, j) is entry (i, j - i + L - 1)."""
  *front, length, count = x_BxHxLxP.shape
  # Each row gets one more column. When the flat array is cut into rows of the
  # old length, each row then starts one column earlier than the row before.
  x = jnp.pad(x_BxHxLxP, [(0, 0)] * (len(front) + 1) + [(0, 1)])
  x = x.reshape(*front, -1)[..., length - 1 :][..., : length * count]
  return x.reshape(*front, length, count)[..., :length]


def _rows(config: DebertaConfig, length: int) -> np.ndarray:
  """Returns the embedding's rows for the distances L - 1 to 1 - L, int (P,)."""
  distance = np.arange(length - 1, -length, -1)
  if config.buckets is not None:
    distance = _bucket(distance, config.buckets, config.furthest)
  return np.clip(distance + config.span, 0, 2 * config.span - 1)


def _bucket(distance: np.ndarray, buckets: int, furthest: int) -> np.ndarray:
  """Returns the buckets of DeBERTa v2, computed in float32 as transformers.

  See transformers' `make_log_bucket_position`.
  """
  middle = buckets // 2
  far = np.maximum(np.abs(distance), middle).astype(np.float32)
  whole = np.log(np.float32((furthest - 1) / middle))
  share = np.log(far / np.float32(middle)) / whole
  bucket = np.ceil(share * np.float32(middle - 1)) + middle
  near = np.abs(distance) <= middle
  return np.where(near, distance, bucket * np.sign(distance)).astype(int)
