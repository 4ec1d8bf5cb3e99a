"""T5's encoder and decoder in Flax Linen, of the first release and of v1.1.

Shapes: B batch, S length of a source, L of a target, N = B·S or B·L tokens,
D width, H heads, K head width, C cache slots or keys, V vocabulary.
"""

from typing import Any

from flax import linen as nn
from flax.linen import spmd
import jax
from jax import typing
import jax.numpy as jnp
import numpy as np

from .. import chunks, float32, remat
from .config import T5Config

# Module -> names of its kernel's or embedding's axes. The vocabulary and the
# width are split over the same mesh axis, so an array can name only one of
# them.
_AXES = {
  "q": ("embed", "heads"),
  "k": ("embed", "heads"),
  "v": ("embed", "heads"),
  "o": ("heads", "embed"),
  "wi": ("embed", "mlp"),
  "wi_0": ("embed", "mlp"),
  "wi_1": ("embed", "mlp"),
  "wo": ("mlp", "embed"),
  "shared": ("vocab", None),
  "lm_head": (None, "vocab"),
}
_SCANNED = "layers"

# A finite value keeps the softmax finite when all keys of a query are masked.
_MASKED = -1e9

Cache = Any
"""Keys and values of past tokens and of the source; see `T5.decode`."""


class T5(nn.Module):
  """An encoder and a decoder, pre-norm, without dropout.

  The model is by Raffel et al., JMLR 2020. v1.1 has the gated feed-forward
  layer of Shazeer, arXiv 2002.05202, and an untied head. Attention scores are
  not scaled, because the initial weights are. All layers of a stack share the
  biases of relative positions.

  Attributes:
    config: the sizes.
    dtype: the dtype of matrix products and of the residual stream; None is
      float32. Norms, biases, softmax, residual sums and logits are float32.
    param_dtype: the dtype of the parameters that `init` makes.
    remat: what a layer's backward pass computes again; see `remat.layer`.
    scan: whether, in each stack, one module `layers`, which is compiled once
      and has a leading axis of layers, replaces `layers_0`, `layers_1` and so
      on.
    logits_bytes: the most bytes of float32 logits that a device holds at once,
      when they are read; see `chunks.read`.
  """

  config: T5Config
  dtype: typing.DTypeLike | None = None
  param_dtype: typing.DTypeLike = jnp.float32
  remat: str = "none"
  scan: bool = False
  logits_bytes: int = chunks.LIMIT

  def setup(self):
    c = self.config
    dtypes = {
      "dtype": self.dtype or jnp.float32,
      "param_dtype": self.param_dtype,
    }
    self.shared = nn.Embed(
      c.vocab_size,
      c.hidden_size,
      embedding_init=nn.initializers.normal(1.0),
      **dtypes,
    )
    options = {"remat": self.remat, "scan": self.scan, **dtypes}
    self.encoder = _Stack(c, False, **options)
    self.decoder = _Stack(c, True, **options)
    if not c.tied:
      self.lm_head = nn.Dense(
        c.vocab_size,
        use_bias=False,
        kernel_init=nn.initializers.normal(c.hidden_size**-0.5),
        dot_general=float32.product,
        **dtypes,
      )

  def __call__(
    self, tokens: jax.Array, mask: jax.Array, targets: jax.Array
  ) -> jax.Array:
    """Returns the logits of each target token.

    The logits depend on the source and on the target's earlier tokens.

    Args:
      tokens: the tokens of the source, int (B, S).
      mask: 1 or True at a real token, 0 or False at padding, (B, S).
      targets: the target, int (B, L). The decoder's inputs are `config.pad_id`
        and then the targets without the last. Padding at the end does not
        change the logits before it.

    Returns:
      float32 (B, L, V).

    Raises:
      ValueError: a shape is wrong.
    """
    source_BxSxD = self.encode(tokens, mask)
    start = jnp.full_like(targets[:, :1], self.config.pad_id)
    inputs = jnp.concatenate([start, targets[:, :-1]], 1)
    return self.head(self.hidden(inputs, source_BxSxD, mask))

  def encode(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns normed hidden states of the encoder, (B, S, D).

    Their dtype is the compute dtype. The values at padding are finite, but have
    no meaning. The arguments are those of `__call__`.
    """
    if tokens.ndim != 2:
      raise ValueError(f"tokens must be (batch, length), got {tokens.shape}.")
    if mask.shape != tokens.shape:
      raise ValueError(
        f"mask must have the shape of tokens, {tokens.shape}, got {mask.shape}."
      )
    places = jnp.arange(tokens.shape[1])
    x_NxD, _ = self.encoder(
      self.shared(tokens.reshape(-1)),
      (places, places),
      _rows(mask, tokens.shape[1]),
    )
    return x_NxD.reshape(*tokens.shape, -1)

  def hidden(
    self,
    inputs: jax.Array,
    source: jax.Array,
    mask: jax.Array,
    positions: typing.ArrayLike | None = None,
    segments: typing.ArrayLike | None = None,
  ) -> jax.Array:
    """Returns normed hidden states of the decoder, (B, L, D).

    Their dtype is the compute dtype.

    Args:
      inputs: tokens, int (B, L); the first of a text is `config.pad_id`.
      source: from `encode`, (B, S, D).
      mask: the mask of the source, (B, S).
      positions: the positions of the inputs, int (L,), the same in all rows.
        None: they are counted.
      segments: int (L,). An input sees itself and the earlier inputs of its
        segment. None: there is one segment.

    Raises:
      ValueError: a shape is wrong.
    """
    if inputs.ndim != 2 or len(inputs) != len(source):
      raise ValueError(
        f"inputs must be (batch, length) of {len(source)} rows, as the source "
        f"is, got {inputs.shape}."
      )
    length = inputs.shape[1]
    places = jnp.arange(length) if positions is None else jnp.asarray(positions)
    seen_LxL = jnp.tri(length, dtype=bool)
    if segments is not None:
      segments_L = jnp.asarray(segments)
      seen_LxL &= segments_L[:, None] == segments_L
    x_NxD, _ = self.decoder(
      self.shared(inputs.reshape(-1)),
      (places, places),
      seen_LxL[None],
      source.reshape(-1, source.shape[-1]),
      _rows(mask, length),
    )
    return x_NxD.reshape(*inputs.shape, -1)

  def decode(
    self,
    inputs: jax.Array,
    mask: jax.Array,
    cache: Cache,
    start: typing.ArrayLike,
    source: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache]:
    """Runs columns of the decoder that follow those in the cache.

    Args:
      inputs: tokens, int (B, L).
      mask: the mask of the source, (B, S).
      cache: from `empty_cache`, or returned by the last call.
      start: the slot of the first column, int scalar; the others follow.
      source: in the first call, the result of `encode`, (B, S, D), whose keys
        and values are put into the cache. In later calls, None.

    Returns:
      The logits of the last column, float32 (B, V), and the cache with these
      columns in it.
    """
    length = inputs.shape[1]
    own = cache[0][0] if self.scan else cache[0][0][0]
    slots_C = jnp.arange(own.shape[-3])
    places_L = jnp.asarray(start) + jnp.arange(length)
    x_NxD, cache = self.decoder(
      self.shared(inputs.reshape(-1)),
      (places_L, slots_C),
      (slots_C <= places_L[:, None])[None],
      None if source is None else source.reshape(-1, source.shape[-1]),
      _rows(mask, length),
      cache,
      start,
    )
    return self.head(x_NxD.reshape(*inputs.shape, -1)[:, -1]), cache

  def head(self, x: jax.Array) -> jax.Array:
    """Returns logits of the decoder's states (..., D), float32 (..., V)."""
    x_NxD = x.reshape(-1, x.shape[-1])
    if self.config.scaled:
      x_NxD *= jnp.asarray(self.config.hidden_size**-0.5, x.dtype)
    if self.config.tied:
      table_VxD = self.shared.embedding.astype(x.dtype)
      logits_NxV = float32.product(x_NxD, table_VxD, (((1,), (1,)), ((), ())))
    else:
      logits_NxV = self.lm_head(x_NxD)
    logits_NxV = spmd.with_logical_constraint(logits_NxV, ("batch", None))
    return logits_NxV.reshape(*x.shape[:-1], -1)


def empty_cache(model: T5, batch: int, length: int) -> Cache:
  """Returns an empty cache for the decoder's keys and values.

  Args:
    model: the model.
    batch: B.
    length: C, the number of columns.

  Returns:
    For each layer, a pair of two entries. The first is for the decoded tokens:
    a pair of zeros (B, C, H, K) in the compute dtype. The second is for the
    source: None, until the first call of `decode` sets it. With `scan`, one
    such pair with a leading axis of layers.
  """
  c = model.config
  shape = (batch, length, c.num_heads, c.head_dim)
  dtype = model.dtype or jnp.float32

  def pair(*shape):
    return (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), None

  if model.scan:
    return pair(c.num_decoder_layers, *shape)
  return tuple(pair(*shape) for _ in range(c.num_decoder_layers))


def logical_axes(variables: Any) -> Any:
  """Returns the names of the axes of a T5's parameters.

  The names are embed, heads, mlp and vocab. Norms and the biases of positions
  have none, because they are cheaper to keep on each device than to gather. The
  axis of scanned layers has no name.

  Args:
    variables: the variables of `T5`, its parameters, or their shapes.

  Returns:
    A tree like `variables`, with a `jax.sharding.PartitionSpec` for each leaf.
  """

  def of(path, x):
    keys = [entry.key for entry in path]
    scanned = (None,) * (_SCANNED in keys)
    names = _AXES.get(keys[-2], (None,) * (x.ndim - len(scanned)))
    return jax.sharding.PartitionSpec(*scanned, *names)

  return jax.tree_util.tree_map_with_path(of, variables)


def buckets(config: T5Config, both_ways: bool) -> np.ndarray:
  """Returns the bucket of each distance from a query back to an earlier key.

  Half of the buckets hold one distance each. The others hold ranges of equal
  size on a logarithmic scale, up to `max_distance`. If keys can also come after
  their query, these keys have as many buckets again, with higher numbers.

  Args:
    config: the sizes.
    both_ways: whether keys can come after their query, as in the encoder.

  Returns:
    int32 (max_distance + 1,); the last bucket is also for larger distances.
  """
  count = config.num_buckets // (2 if both_ways else 1)
  single = count // 2
  distance = np.arange(config.max_distance + 1)
  # The logarithms are float32, as in the training of the pretrained models. The
  # first distance of a range is a power, so rounding decides its bucket.
  ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(single)
  share = np.log(ratio) / np.float32(np.log(config.max_distance / single))
  ranges = single + (share * np.float32(count - single)).astype(np.int32)
  return np.where(
    distance < single, distance, np.minimum(ranges, count - 1)
  ).astype(np.int32)


class _Stack(nn.Module):
  """The layers of the encoder or of the decoder, and a norm."""

  config: T5Config
  is_decoder: bool
  dtype: typing.DTypeLike
  param_dtype: typing.DTypeLike
  remat: str
  scan: bool

  def setup(self):
    c = self.config
    self.relative_attention_bias = nn.Embed(
      c.num_buckets,
      c.num_heads,
      embedding_init=nn.initializers.normal(c.hidden_size**-0.5),
      dtype=jnp.float32,
      param_dtype=self.param_dtype,
    )
    count = c.num_decoder_layers if self.is_decoder else c.num_layers
    layer: Any = remat.layer(_Layer, self.remat, self.scan)
    options = (c, self.is_decoder, self.dtype, self.param_dtype)
    if self.scan:
      layer = nn.scan(
        layer,
        variable_axes={"params": 0},
        # Each layer's adapters draw their own dropout.
        split_rngs={"params": True, "dropout": True},
        in_axes=(  # pyright: ignore[reportArgumentType]
          nn.broadcast,
          nn.broadcast,
          nn.broadcast,
          nn.broadcast,
          0,
          nn.broadcast,
        ),
        length=count,
      )
      self.layers: Any = layer(*options)
    else:
      self.layers = [layer(*options) for _ in range(count)]
    self.final_layer_norm = float32.rms_norm(c.rms_norm_eps, self.param_dtype)

  def __call__(
    self,
    x_NxD: jax.Array,
    places: tuple[jax.Array, jax.Array],
    mask: jax.Array,
    source: jax.Array | None = None,
    source_mask: jax.Array | None = None,
    cache: Cache = None,
    start: typing.ArrayLike | None = None,
  ) -> tuple[jax.Array, Cache]:
    """Returns normed hidden states, and the cache.

    Args:
      x_NxD: embedded tokens.
      places: the positions of the queries, (L,), and of the keys, (C,).
      mask: which keys a query sees, bool (B or 1, L, C).
      source: for a decoder, the source, (B·S, D); None if the cache has it.
      source_mask: which tokens of the source a query sees, bool (B, L, S).
      cache: for a decoder, its cache, or None.
      start: the slot of the first query in the cache.
    """
    # Activations stay 2-D between layers: see train/models/bert/model.py.
    shared = (self._bias(*places), mask, source, source_mask)
    if self.scan:
      x_NxD, cache = self.layers(x_NxD, *shared, cache, start)
    else:
      new = []
      for layer, old in zip(self.layers, cache or (None,) * len(self.layers)):
        x_NxD, one = layer(x_NxD, *shared, old, start)
        new.append(one)
      cache = tuple(new)
    return self.final_layer_norm(x_NxD).astype(x_NxD.dtype), cache

  def _bias(self, queries_L: jax.Array, keys_C: jax.Array) -> jax.Array:
    """Returns the biases of the scores, float32 (1, H, L, C)."""
    c, both_ways = self.config, not self.is_decoder
    behind_LxC = queries_L[:, None] - keys_C
    distance_LxC = jnp.abs(behind_LxC)
    if not both_ways:
      distance_LxC = jnp.maximum(behind_LxC, 0)
    table = jnp.asarray(buckets(c, both_ways))
    bucket_LxC = table[jnp.minimum(distance_LxC, c.max_distance)]
    if both_ways:
      bucket_LxC += c.num_buckets // 2 * (behind_LxC < 0)
    bias_LxCxH = self.relative_attention_bias(bucket_LxC)
    return bias_LxCxH.transpose(2, 0, 1)[None]


class _Layer(nn.Module):
  """Self-attention, attention to the source, and a feed-forward layer.

  Each has a residual. An encoder has no attention to the source.
  """

  config: T5Config
  is_decoder: bool
  dtype: typing.DTypeLike
  param_dtype: typing.DTypeLike

  @nn.compact
  def __call__(
    self,
    x_NxD: jax.Array,
    bias: jax.Array,
    mask: jax.Array,
    source: jax.Array | None,
    source_mask: jax.Array | None,
    cache: Cache,
    start: typing.ArrayLike | None,
  ) -> tuple[jax.Array, Cache]:
    # On a mesh, devices keep their rows and gather the weights.
    x_NxD = spmd.with_logical_constraint(x_NxD, ("batch", None))
    c, dtypes = self.config, (self.dtype, self.param_dtype)
    own, across = cache if cache is not None else (None, None)

    def normed(name):
      norm = float32.rms_norm(
        c.rms_norm_eps, self.param_dtype, f"{name}_layer_norm"
      )
      return norm(x_NxD).astype(x_NxD.dtype)

    name = "self_attention"
    y_NxD = normed(name)
    y_NxD, own = _Attention(c, *dtypes, name=name)(
      y_NxD, y_NxD, bias, mask, own, start
    )
    x_NxD = float32.residual(x_NxD, y_NxD)
    if self.is_decoder:
      name = "cross_attention"
      y_NxD, across = _Attention(c, *dtypes, name=name)(
        normed(name), source, None, source_mask, across, None
      )
      x_NxD = float32.residual(x_NxD, y_NxD)
    name = "feed_forward"
    y_NxD = _FeedForward(c, *dtypes, name=name)(normed(name))
    cache = None if cache is None else (own, across)
    return float32.residual(x_NxD, y_NxD), cache


class _Attention(nn.Module):
  """Attention without a scale."""

  config: T5Config
  dtype: typing.DTypeLike
  param_dtype: typing.DTypeLike

  @nn.compact
  def __call__(self, x_NxD, source_MxD, bias, mask_BxLxC, kept, start):
    """Returns the output, and the keys and values.

    `kept` is a cache of keys and values. New ones are put into it; without a
    source, it is used unchanged.
    """
    c = self.config
    length, count = mask_BxLxC.shape[1:]

    def heads(x, name, length):
      y = _dense(self, c.num_heads * c.head_dim, name)(x)
      return y.reshape(-1, length, c.num_heads, c.head_dim)

    q_BxLxHxK = heads(x_NxD, "q", length)
    if source_MxD is None:
      pair = kept
    else:
      # With a cache, there is one new key for each query.
      new = count if kept is None else length
      pair = heads(source_MxD, "k", new), heads(source_MxD, "v", new)
      if kept is not None:
        put = jax.lax.dynamic_update_slice_in_dim
        pair = tuple(put(x, y, start, 1) for x, y in zip(kept, pair))
    k_BxCxHxK, v_BxCxHxK = pair
    scores_BxHxLxC = jnp.matmul(
      q_BxLxHxK.transpose(0, 2, 1, 3),
      k_BxCxHxK.transpose(0, 2, 3, 1),
      preferred_element_type=jnp.float32,
    )
    if bias is not None:
      scores_BxHxLxC += bias
    scores_BxHxLxC = jnp.where(mask_BxLxC[:, None], scores_BxHxLxC, _MASKED)
    probs_BxHxLxC = jax.nn.softmax(scores_BxHxLxC).astype(v_BxCxHxK.dtype)
    y_BxHxLxK = jnp.matmul(probs_BxHxLxC, v_BxCxHxK.transpose(0, 2, 1, 3))
    y_NxHK = y_BxHxLxK.transpose(0, 2, 1, 3).reshape(len(x_NxD), -1)
    return _dense(self, c.hidden_size, "o")(y_NxHK), pair


class _FeedForward(nn.Module):
  """A feed-forward layer with ReLU, or with GELU and a gate."""

  config: T5Config
  dtype: typing.DTypeLike
  param_dtype: typing.DTypeLike

  @nn.compact
  def __call__(self, x_NxD: jax.Array) -> jax.Array:
    width = self.config.intermediate_size
    if self.config.feed_forward == "relu":
      y_NxF = jax.nn.relu(_dense(self, width, "wi")(x_NxD))
    else:
      gate_NxF = _dense(self, width, "wi_0")(x_NxD)
      y_NxF = _dense(self, width, "wi_1")(x_NxD)
      y_NxF *= jax.nn.gelu(gate_NxF, approximate=True)
    return _dense(self, self.config.hidden_size, "wo")(y_NxF)


def _dense(
  parent: _Attention | _FeedForward, features: int, name: str
) -> nn.Dense:
  return nn.Dense(
    features,
    use_bias=False,
    dtype=parent.dtype,
    param_dtype=parent.param_dtype,
    kernel_init=nn.initializers.lecun_normal(),
    name=name,
  )


def _rows(mask_BxS: jax.Array, length: int) -> jax.Array:
  """Returns the source's real tokens for each query, bool (B, L, S)."""
  batch, count = mask_BxS.shape
  seen_Bx1xS = mask_BxS.astype(bool)[:, None]
  return jnp.broadcast_to(seen_Bx1xS, (batch, length, count))
