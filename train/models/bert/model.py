"""BERT encoder and classifier in Flax Linen.

Shapes: B batch, L length, N = B·L tokens, D width, E width of the embeddings,
H heads, K = D/H.
"""

import functools
from typing import Any

from flax import linen as nn
from flax.linen import spmd
import jax
from jax import typing
import jax.numpy as jnp

from .. import attention, encoder_layers, remat
from .config import BertConfig as BertConfig

_AXES = {**encoder_layers.AXES, "projection": (None, "embed")}


class Bert(nn.Module):
  """BERT encoder, post-norm, without dropout and without the pooler.

  Devlin et al., NAACL 2019; the layer is that of Vaswani et al., NeurIPS 2017.

  Attributes:
    config: the sizes.
    dtype: the dtype of matrix products; None is float32. The softmax, the layer
      norms, the residual sums and the parameters are always float32.
    remat: what a layer's backward pass computes again; see `remat.layer`.
  """

  config: BertConfig
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
    encoder_layers.check_shapes(
      tokens, mask, token_types, self.config.longest, "BERT"
    )
    if token_types is None:
      token_types = jnp.zeros_like(tokens)
    x_NxD = _Embeddings(self.config, self.dtype, name="embeddings")(
      tokens, token_types
    )
    c, length = self.config, tokens.shape[1]
    kernel = attention.chosen(
      "auto", self.dtype or jnp.float32, c.head_size, length
    )
    seen = attention.real(kernel, mask.astype(bool))
    layer = remat.layer(Layer, self.remat)
    # Activations stay 2-D between layers. In XLA on CPU, the backward pass of
    # (N, D) products is about twice as fast as that of (B, L, D) products.
    for i in range(c.num_layers):
      # On a mesh, devices keep their rows and gather the weights.
      x_NxD = spmd.with_logical_constraint(x_NxD, ("batch", None))
      x_NxD = layer(c, length, self.dtype, name=f"layer_{i}")(x_NxD, seen)
    return x_NxD.reshape(*tokens.shape, -1)


class BertClassifier(encoder_layers.Classifier):
  """BERT with a linear head on the pooled hidden states of the real tokens."""

  def setup(self):
    self.encoder = Bert(self.config, self.dtype, self.remat)
    self.head = nn.Dense(self.num_classes, dtype=jnp.float32)


def logical_axes(variables: Any) -> Any:
  """Returns the names of the variables' axes, as `encoder_layers` does."""
  return encoder_layers.logical_axes(variables, _AXES)


class _Embeddings(nn.Module):
  """The normed sum of the word, position and segment embeddings, (N, D)."""

  config: BertConfig
  dtype: typing.DTypeLike | None

  @nn.compact
  def __call__(self, tokens: jax.Array, token_types: jax.Array) -> jax.Array:
    c = self.config
    embed = functools.partial(
      nn.Embed,
      features=c.embedding_width,
      embedding_init=nn.initializers.normal(0.02),
    )
    x = embed(c.vocab_size, name="word")(tokens)
    if c.type_vocab_size is not None:
      x += embed(c.type_vocab_size, name="token_type")(token_types)
    x += embed(c.max_positions, name="position")(_positions(c, tokens))
    x_NxE = x.reshape(-1, c.embedding_width)
    dtype = self.dtype or jnp.float32
    x_NxE = encoder_layers.norm(c.layer_norm_eps, "norm")(x_NxE).astype(dtype)
    if c.embedding_size is None:
      return x_NxE
    return encoder_layers.dense(c.hidden_size, dtype, "projection")(x_NxE)


def _positions(config: BertConfig, tokens: jax.Array) -> jax.Array:
  """Returns rows of the embedding of positions, int (L,).

  If padding tokens have no position, the rows depend on the tokens, (B, L).
  """
  if config.padding_id is None:
    return jnp.arange(tokens.shape[1])
  real_BxL = (tokens != config.padding_id).astype(jnp.int32)
  return config.padding_id + jnp.cumsum(real_BxL, 1) * real_BxL


class Layer(nn.Module):
  """Self-attention and feed-forward, each with a residual and a norm.

  Attributes:
    config: the sizes.
    length: L, the tokens of a row.
    dtype: dtype of the matmuls; None is float32.
  """

  config: BertConfig
  length: int
  dtype: typing.DTypeLike | None

  @nn.compact
  def __call__(self, x_NxD: jax.Array, seen: attention.Seen) -> jax.Array:
    c = self.config
    dtype = self.dtype or jnp.float32

    def heads(name: str) -> jax.Array:
      y_NxD = encoder_layers.dense(c.hidden_size, dtype, name)(x_NxD)
      return y_NxD.reshape(-1, self.length, c.num_heads, c.head_size)

    y_BxLxHxK = attention.attention(
      heads("query"), heads("key"), heads("value"), seen
    )
    y_NxD = y_BxLxHxK.reshape(-1, c.hidden_size)
    return encoder_layers.after_attention(c, x_NxD, y_NxD)
