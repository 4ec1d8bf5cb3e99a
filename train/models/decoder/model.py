"""Decoders in Flax Linen: Llama, Mistral, Qwen, SmolLM, Gemma, GPT-2.

Shapes: B batch, L length, N = B·L tokens, D width, H heads, J key-value heads,
G = H/J, K head width, S cache slots or keys, V vocabulary. If the devices of a
mesh share the tokens of a row, N stands for the two axes B and L, because a
device's tokens are then not neighbours in a single axis.
"""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax.linen import spmd
import jax
from jax import typing
import jax.numpy as jnp

from .. import activations, chunks, float32, remat, splits
from .. import attention as attention_lib
from . import rope as rope_lib
from .config import DecoderConfig

# Module -> names of its kernel's or embedding's axes. The vocabulary and the
# width are split over the same mesh axis, so an array can name only one of
# them.
_AXES = {
  "q_proj": ("embed", "heads"),
  "k_proj": ("embed", "kv_heads"),
  "v_proj": ("embed", "kv_heads"),
  "qkv_proj": ("embed", "heads"),
  "o_proj": ("heads", "embed"),
  "gate_proj": ("embed", "mlp"),
  "up_proj": ("embed", "mlp"),
  "down_proj": ("mlp", "embed"),
  "embed_tokens": ("vocab", None),
  "lm_head": (None, "vocab"),
}
_SCANNED = "layers"

Cache = Any
"""Keys and values of past tokens; see `empty_cache`."""


class Decoder(nn.Module):
  """A causal language model, pre-norm, without dropout.

  The model is Llama's (Touvron et al., arXiv 2302.13971), with grouped queries
  (Ainslie et al., arXiv 2305.13245). Positions are learned or rotary (Su et
  al., arXiv 2104.09864); the rotary form is half-split, as Hugging Face stores
  the weights. Modules have the names of Hugging Face's Llama.

  Attributes:
    config: the sizes.
    dtype: the dtype of matrix products and of the residual stream; None is
      float32. Norms, rotary angles, softmax, residual sums and logits are
      float32.
    param_dtype: the dtype of the parameters that `init` makes.
    remat: what a layer's backward pass computes again; see `remat.layer`.
    scan: whether one module `layers`, which is compiled once and has a leading
      axis of layers, replaces `layers_0`, `layers_1` and so on. All layers must
      have the same window.
    attention: the kernel of attention; see `attention.chosen`.
    logits_bytes: the most bytes of float32 logits that a device holds at once,
      when they are read; see `chunks.read`.
  """

  config: DecoderConfig
  dtype: typing.DTypeLike | None = None
  param_dtype: typing.DTypeLike = jnp.float32
  remat: str = "none"
  scan: bool = False
  attention: str = "auto"
  logits_bytes: int = chunks.LIMIT

  def setup(self):
    c = self.config
    if self.scan and len({*c.windows}) > 1:
      raise ValueError(
        "--scan-layers compiles one layer for all, and the layers of this "
        f"{c.model_type} differ in their sliding windows; leave it out."
      )
    dtypes = {
      "dtype": self.dtype or jnp.float32,
      "param_dtype": self.param_dtype,
    }
    self.embed_tokens = nn.Embed(
      c.vocab_size,
      c.hidden_size,
      embedding_init=nn.initializers.normal(0.02),
      **dtypes,
    )
    if c.learned_positions:
      self.embed_positions = nn.Embed(
        c.max_positions,
        c.hidden_size,
        embedding_init=nn.initializers.normal(0.02),
        **dtypes,
      )
    layer: Any = remat.layer(_Layer, self.remat, self.scan)
    if self.scan:
      layer = nn.scan(
        layer,
        variable_axes={"params": 0},
        # Each layer's adapters draw their own dropout.
        split_rngs={"params": True, "dropout": True},
        in_axes=(  # pyright: ignore[reportArgumentType]
          nn.broadcast,
          nn.broadcast,
          0,
          nn.broadcast,
          0,
        ),
        length=c.num_layers,
      )
      self.layers: Any = layer(c, **dtypes)
    else:
      self.layers = [layer(c, **dtypes) for _ in range(c.num_layers)]
    self.norm = _norm(c, self.param_dtype)
    if not c.tied:
      self.lm_head = nn.Dense(
        c.vocab_size,
        use_bias=False,
        kernel_init=nn.initializers.normal(0.02),
        dot_general=float32.product,
        **dtypes,
      )

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    lengths: jax.Array | None = None,
    read: chunks.Read | None = None,
  ) -> Any:
    """Returns the logits of each next token, or the results of `read`.

    Args:
      tokens: token ids, int (B, L).
      positions: the positions of the tokens, int (B, L). None: they are counted
        within the row, or within each segment.
      lengths: the tokens of each segment of a row, in order, int (B, M), with 0
        for missing segments. A token sees earlier tokens of its segment. The
        tokens after the last segment are padding. None: a row is one segment.
      read: what to compute from the logits of each token; its arrays are
        (B, L, *). None: the logits are returned.

    Returns:
      float32 (B, L, V); or the results of `read`, arrays (B, L). With `read`,
      the model never holds all logits; see `chunks.read`. The values at padding
      are finite, but have no meaning.

    Raises:
      ValueError: a shape is wrong, or L exceeds the positions.
    """
    x_BxLxD = self.hidden(tokens, positions, lengths)
    return chunks.read(self, x_BxLxD, read)

  def hidden(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    lengths: jax.Array | None = None,
  ) -> jax.Array:
    """Returns normed hidden states of the last layer, (B, L, D).

    Their dtype is the compute dtype. The arguments and errors are those of
    `__call__`, except `read`.
    """
    _check_shapes(self.config, tokens, positions, lengths)
    if positions is None:
      positions = attention_lib.positions(lengths, tokens.shape)
    length, parts = tokens.shape[1], splits.parts("length")
    kernel = self._kernel(length // parts)

    def see(window):
      return attention_lib.causal(kernel, length, lengths, window)

    tokens_N = tokens if parts > 1 else tokens.reshape(-1)
    x_NxD, _ = self._run(tokens_N, positions, see)
    return x_NxD.reshape(*tokens.shape, -1)

  def head(self, x: jax.Array) -> jax.Array:
    """Returns the logits of normed hidden states, float32 (B, ..., V)."""
    x_NxD = x
    if splits.parts("length") == 1:
      x_NxD = x.reshape(-1, x.shape[-1])
    if self.config.tied:
      table_VxD = self.embed_tokens.embedding.astype(x.dtype)
      last = x_NxD.ndim - 1
      logits_NxV = float32.product(
        x_NxD, table_VxD, (((last,), (1,)), ((), ()))
      )
    else:
      logits_NxV = self.lm_head(x_NxD)
    logits_NxV = attention_lib.capped(logits_NxV, self.config.logit_softcap)
    return _split(logits_NxV).reshape(*x.shape[:-1], -1)

  def decode(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    cache: Cache,
    start: jax.Array,
    last: jax.Array,
    places: jax.Array,
  ) -> tuple[jax.Array, Cache]:
    """Runs columns of a batch that follow those in the cache.

    Args:
      tokens: token ids, int (B, L).
      positions: positions, as in `__call__`, int (B, L).
      mask: which slots of the cache a token sees, with its own slot, bool
        (B, L, S).
      cache: from `empty_cache`, or returned by the last call.
      start: the slot of the first column, int scalar; the others follow.
      last: for each row, the column whose logits are returned, int (B,).
      places: the positions of the cache's slots, int (B, S); any value for the
        slots that `mask` hides.

    Returns:
      The logits, float32 (B, V), and the cache with these columns in it.
    """
    kernel = self._kernel(tokens.shape[1])

    def see(window):
      if window is None:
        return attention_lib.masked(kernel, mask)
      near_BxLxS = places[:, None] > positions[..., None] - window
      return attention_lib.masked(kernel, mask & near_BxLxS)

    tokens_N = tokens.reshape(-1)
    x_NxD, cache = self._run(tokens_N, positions, see, cache, start)
    x_BxLxD = x_NxD.reshape(*tokens.shape, -1)
    x_BxD = jnp.take_along_axis(x_BxLxD, last[:, None, None], 1)[:, 0]
    return self.head(x_BxD), cache

  def _kernel(self, length: int) -> str:
    return attention_lib.chosen(
      self.attention,
      self.dtype or jnp.float32,
      self.config.head_dim,
      length,
      self.config.attention_softcap is not None,
    )

  def _run(
    self,
    tokens_N: jax.Array,
    positions: jax.Array,
    see: Callable[[int | None], attention_lib.Seen],
    cache: Cache = None,
    start: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache]:
    c = self.config
    # Activations stay 2-D between layers: see train/models/bert/model.py.
    x_NxD = self.embed_tokens(tokens_N)
    if c.embed_scaled:
      # The factor is rounded to the compute dtype, as in Gemma's training.
      x_NxD *= jnp.asarray(c.hidden_size**0.5, x_NxD.dtype)
    if c.learned_positions:
      x_NxD += self.embed_positions(positions.reshape(tokens_N.shape))
    windows = c.windows or (None,) * c.num_layers
    seen = {window: see(window) for window in {*windows}}
    ropes = {window: _rope(c, positions, window) for window in seen}
    if self.scan:
      rotary = jnp.asarray(c.rotary) if c.rotary else None
      x_NxD, cache = self.layers(
        x_NxD, ropes[windows[0]], seen[windows[0]], cache, start, rotary
      )
    else:
      caches = cache or (None,) * c.num_layers
      rotary = c.rotary or (None,) * c.num_layers
      new = []
      for layer, old, window, turns in zip(
        self.layers, caches, windows, rotary
      ):
        x_NxD, one = layer(
          x_NxD, ropes[window], seen[window], old, start, turns
        )
        new.append(one)
      cache = tuple(new)
    return self.norm(x_NxD).astype(x_NxD.dtype), cache


def empty_cache(model: Decoder, batch: int, length: int) -> Cache:
  """Returns an empty cache for the keys and values of `length` columns.

  Returns:
    For each layer, a pair of zeros (B, S, J, K) in the compute dtype. With
    `scan`, one pair (num_layers, B, S, J, K).
  """
  c = model.config
  shape = (batch, length, c.num_kv_heads, c.head_dim)
  dtype = model.dtype or jnp.float32

  def pair(*shape):
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

  if model.scan:
    return pair(c.num_layers, *shape)
  return tuple(pair(*shape) for _ in range(c.num_layers))


def logical_axes(variables: Any) -> Any:
  """Returns the names of the axes of a decoder's parameters.

  The names are embed, heads, kv_heads, mlp and vocab. Vectors of width D have
  none, because they are cheaper to keep on each device than to gather. The axis
  of scanned layers has no name.

  Args:
    variables: the variables of `Decoder`, its parameters, or their shapes.

  Returns:
    A tree like `variables`, with a `jax.sharding.PartitionSpec` for each leaf.
  """

  def of(path, x):
    keys = [entry.key for entry in path]
    names = _AXES.get(keys[-2], (None,))
    if keys[-1] == "bias":
      names = (None if names[-1] == "embed" else names[-1],)
    scanned = (None,) * (_SCANNED in keys)
    return jax.sharding.PartitionSpec(*scanned, *names)

  return jax.tree_util.tree_map_with_path(of, variables)


class _Layer(nn.Module):
  """Attention and a feed-forward layer, each after a norm and with a residual.

  With `post_norms`, the results of both are normed too.
  """

  config: DecoderConfig
  dtype: typing.DTypeLike
  param_dtype: typing.DTypeLike

  @nn.compact
  def __call__(
    self,
    x_NxD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    seen: attention_lib.Seen,
    cache: tuple[jax.Array, jax.Array] | None,
    start: jax.Array | None,
    turns: jax.Array | bool | None,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    # On a mesh, devices keep their rows and gather the weights.
    x_NxD = _split(x_NxD)
    c, dtypes = self.config, (self.dtype, self.param_dtype)
    if turns is not None:
      # A rotation by 0 does not change queries and keys.
      cos, sin = rope
      rope = jnp.where(turns, cos, 1.0), jnp.where(turns, sin, 0.0)

    def normed(name, x_NxD):
      norm = _norm(c, self.param_dtype, name)
      return norm(x_NxD).astype(x_NxD.dtype)

    y_NxD, cache = _Attention(c, *dtypes, name="self_attn")(
      normed("input_layernorm", x_NxD), rope, seen, cache, start
    )
    # Llama has this name for the norm before the feed-forward layer, and Gemma
    # for the norm after attention.
    before = "post_attention_layernorm"
    if c.post_norms:
      y_NxD = normed("post_attention_layernorm", y_NxD)
      before = "pre_feedforward_layernorm"
    x_NxD = float32.residual(x_NxD, y_NxD)
    y_NxD = _FeedForward(c, *dtypes, name="mlp")(normed(before, x_NxD))
    if c.post_norms:
      y_NxD = normed("post_feedforward_layernorm", y_NxD)
    return float32.residual(x_NxD, y_NxD), cache


class _Attention(nn.Module):
  """Causal attention with grouped queries, with or without rotary positions."""

  config: DecoderConfig
  dtype: typing.DTypeLike
  param_dtype: typing.DTypeLike

  @nn.compact
  def __call__(self, x_NxD, rope, seen, cache, start):
    c = self.config
    batch, length = rope[0].shape[:2]

    def heads(count, name):
      y = _dense(self, count * c.head_dim, name, c.qkv_bias)(x_NxD)
      return y.reshape(batch, length, count, c.head_dim)

    def projected():
      counts = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
      if not c.joint_qkv:
        return map(heads, counts, ("q_proj", "k_proj", "v_proj"))
      ends = (counts[0], counts[0] + counts[1])
      return jnp.split(heads(sum(counts), "qkv_proj"), ends, axis=2)

    def normed(x, name):
      if not c.qk_norm:
        return x
      norm = _norm(c, self.param_dtype, name)
      return norm(x).astype(x.dtype)

    q_BxLxHxK, k_BxSxJxK, v_BxSxJxK = projected()
    q_BxLxHxK = normed(q_BxLxHxK, "q_norm")
    k_BxSxJxK = normed(k_BxSxJxK, "k_norm")
    if not c.learned_positions:
      q_BxLxHxK = _rotated(q_BxLxHxK, rope)
      k_BxSxJxK = _rotated(k_BxSxJxK, rope)
    if c.query_scalar not in (None, c.head_dim):
      # `attention` divides by the square root of head_dim.
      q_BxLxHxK *= jnp.asarray(
        (c.head_dim / c.query_scalar) ** 0.5, q_BxLxHxK.dtype
      )
    if cache is not None:
      put = jax.lax.dynamic_update_slice_in_dim
      k_BxSxJxK = put(cache[0], k_BxSxJxK, start, 1)
      v_BxSxJxK = put(cache[1], v_BxSxJxK, start, 1)
      cache = k_BxSxJxK, v_BxSxJxK
    y_BxLxHxK = attention_lib.attention(
      q_BxLxHxK, k_BxSxJxK, v_BxSxJxK, seen, c.attention_softcap
    )
    y_NxHK = y_BxLxHxK.reshape(*x_NxD.shape[:-1], -1)
    return _dense(self, c.hidden_size, "o_proj", c.out_bias)(y_NxHK), cache


class _FeedForward(nn.Module):
  """A gated layer, as SwiGLU (Shazeer, arXiv 2002.05202), or a plain one."""

  config: DecoderConfig
  dtype: typing.DTypeLike
  param_dtype: typing.DTypeLike

  @nn.compact
  def __call__(self, x_NxD: jax.Array) -> jax.Array:
    c = self.config
    activation = activations.BY_NAME[c.hidden_act]
    if c.gated:
      gate_NxF = _dense(self, c.intermediate_size, "gate_proj", c.mlp_bias)(
        x_NxD
      )
      up_NxF = _dense(self, c.intermediate_size, "up_proj", c.mlp_bias)(x_NxD)
      y_NxF = activation(gate_NxF) * up_NxF
    else:
      y_NxF = activation(
        _dense(self, c.intermediate_size, "up_proj", c.mlp_bias)(x_NxD)
      )
    return _dense(self, c.hidden_size, "down_proj", c.mlp_bias)(y_NxF)


def _dense(
  parent: _Attention | _FeedForward,
  features: int,
  name: str,
  use_bias: bool = False,
) -> nn.Dense:
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=parent.dtype,
    param_dtype=parent.param_dtype,
    kernel_init=nn.initializers.normal(0.02),
    name=name,
  )


def _norm(
  config: DecoderConfig, param_dtype: typing.DTypeLike, name: str | None = None
) -> nn.Module:
  if config.layer_norm:
    # The fast variance, E[x²] - E[x]², cancels if the mean is large.
    return nn.LayerNorm(
      config.rms_norm_eps,
      jnp.float32,
      param_dtype,
      use_fast_variance=False,
      name=name,
    )
  if config.norm_offset:
    return float32.OffsetRMSNorm(config.rms_norm_eps, param_dtype, name=name)
  return float32.rms_norm(config.rms_norm_eps, param_dtype, name)


def _split(x: jax.Array) -> jax.Array:
  """Splits tokens over a mesh: (N, *), (B, L, *) or (B, parts, T, *)."""
  names = ("batch", "length", None)[: x.ndim - 1]
  return spmd.with_logical_constraint(x, (*names, None))


def _rope(
  config: DecoderConfig, positions_BxL: jax.Array, window: int | None
) -> tuple[jax.Array, jax.Array]:
  """Returns cosines and sines of each position's angles, (B, L, K/2).

  Both are float32.
  """
  theta, scaling = config.rope_theta, config.rope_scaling
  if window is not None and config.local_rope_theta is not None:
    theta, scaling = config.local_rope_theta, None
  scheme = rope_lib if scaling is None else scaling
  frequencies = scheme.frequencies(theta, config.head_dim)
  angles = positions_BxL[..., None].astype(jnp.float32) * jnp.asarray(
    frequencies, jnp.float32
  )
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  if scaling is None or scaling.amplitude == 1:
    return cos, sin
  return cos * scaling.amplitude, sin * scaling.amplitude


def _rotated(
  x_BxLxHxK: jax.Array, rope: tuple[jax.Array, jax.Array]
) -> jax.Array:
  cos, sin = (angles[:, :, None] for angles in rope)
  first, second = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, -1).astype(x_BxLxHxK.dtype)


def _check_shapes(
  config: DecoderConfig,
  tokens: jax.Array,
  positions: jax.Array | None,
  lengths: jax.Array | None,
) -> None:
  if tokens.ndim != 2:
    raise ValueError(f"tokens must be (batch, length), got {tokens.shape}.")
  if positions is not None and positions.shape != tokens.shape:
    raise ValueError(
      f"positions must have the shape of tokens, {tokens.shape}, got "
      f"{positions.shape}."
    )
  if lengths is not None and (lengths.ndim != 2 or len(lengths) != len(tokens)):
    raise ValueError(
      f"lengths must be (batch, segments) of {len(tokens)} rows, as tokens "
      f"are, got {lengths.shape}."
    )
  if tokens.shape[1] > config.max_positions:
    raise ValueError(
      f"tokens must be at most {config.max_positions} long, the positions "
      f"this decoder was made for, got {tokens.shape[1]}."
    )
