"""BERT encoder and classifier in Flax Linen.

Shapes: B batch, L length, N = B·L tokens, D width, H heads, K = D/H.
"""

import collections.abc
import dataclasses
import functools
from typing import Any

from flax import linen as nn
from flax.linen import spmd
import jax
from jax import typing
import jax.numpy as jnp

from ... import options
from .. import attention, remat

_ACTIVATIONS: dict[str, collections.abc.Callable[[jax.Array], jax.Array]] = {
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
  "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
}

# Field of BertConfig -> key of Hugging Face's config.json.
_HF_KEYS = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "intermediate_size": "intermediate_size",
  "max_positions": "max_position_embeddings",
  "type_vocab_size": "type_vocab_size",
  "layer_norm_eps": "layer_norm_eps",
}

# Module -> names of its kernel's or embedding's axes.
_AXES = {
  "query": ("embed", "heads"),
  "key": ("embed", "heads"),
  "value": ("embed", "heads"),
  "attention_out": ("heads", "embed"),
  "intermediate": ("embed", "mlp"),
  "output": ("mlp", "embed"),
  "head": ("embed", None),
  "word": ("vocab", None),
  "position": ("vocab", None),
  "token_type": ("vocab", None),
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """Sizes of a BERT encoder (Devlin et al., NAACL 2019, section 3).

  Raises:
    ValueError: a size is not a positive integer, the heads do not divide the
      width, or the activation is not one of those implemented.
  """

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  intermediate_size: int
  max_positions: int = 512
  type_vocab_size: int = 2
  layer_norm_eps: float = 1e-12
  hidden_act: str = "gelu"

  def __post_init__(self):
    for field, key in _HF_KEYS.items():
      value = getattr(self, field)
      if field == "layer_norm_eps":
        if not options.fits(value, float) or value <= 0:
          raise ValueError(
            f"{key} must be a positive number, got {options.shown(value)}."
          )
      elif not options.fits(value, int) or value < 1:
        raise ValueError(
          f"{key} must be a positive integer, got {options.shown(value)}."
        )
    if self.hidden_size % self.num_heads:
      raise ValueError(
        f"hidden_size must be a multiple of num_attention_heads, got "
        f"{self.hidden_size} and {self.num_heads}."
      )
    if self.hidden_act not in tuple(_ACTIVATIONS):
      raise ValueError(
        f"hidden_act must be one of {', '.join(_ACTIVATIONS)}, got "
        f"{options.shown(self.hidden_act)}."
      )

  @property
  def head_size(self) -> int:
    """K, the width of a head."""
    return self.hidden_size // self.num_heads

  @classmethod
  def from_hf(cls, config: collections.abc.Mapping[str, Any]) -> "BertConfig":
    """The configuration that a Hugging Face config.json describes.

    Args:
      config: the decoded JSON object.

    Raises:
      ValueError: a key is missing or has a value that this encoder does not
        implement (another model_type, relative positions, a decoder).
    """
    if config.get("model_type") != "bert":
      raise ValueError(
        "model_type must be 'bert', got "
        f"{options.shown(config.get('model_type'))}."
      )
    missing = [key for key in _HF_KEYS.values() if key not in config]
    if missing:
      raise ValueError(f"The BERT configuration lacks {', '.join(missing)}.")
    position = config.get("position_embedding_type", "absolute")
    if position != "absolute":
      raise ValueError(
        "position_embedding_type must be 'absolute', got "
        f"{options.shown(position)}."
      )
    if config.get("is_decoder") not in (False, None):
      raise ValueError(
        "is_decoder must be false: this BERT is an encoder, without a causal "
        f"mask. Got {options.shown(config['is_decoder'])}."
      )
    return cls(
      **{field: config[key] for field, key in _HF_KEYS.items()},
      hidden_act=config.get("hidden_act", "gelu"),
    )


class Bert(nn.Module):
  """BERT encoder, post-norm, without dropout and without the pooler.

  Devlin et al., NAACL 2019; the layer is that of Vaswani et al., NeurIPS 2017.

  Attributes:
    config: the sizes.
    dtype: dtype of the matmuls; None is float32. The softmax, the layer norms
      and the residual sums are float32 whatever it is, and so are parameters.
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
    """Hidden states of the last layer.

    Args:
      tokens: token ids, int (B, L).
      mask: 1 or True at a real token, 0 or False at padding, (B, L).
      token_types: segment ids, int (B, L); None is all zeros.

    Returns:
      (B, L, D) in the compute dtype. What stands at padding is finite and
      means nothing.

    Raises:
      ValueError: a shape is wrong, or L exceeds the learned positions.
    """
    _check_shapes(self.config, tokens, mask, token_types)
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
    layer = remat.layer(_Layer, self.remat)
    # Activations stay 2-D between layers: XLA on CPU compiles the backward
    # pass of (N, D) matmuls to about twice the speed of (B, L, D) ones.
    for i in range(c.num_layers):
      # On a mesh: weights are brought to the rows, not rows to the weights.
      x_NxD = spmd.with_logical_constraint(x_NxD, ("batch", None))
      x_NxD = layer(c, length, self.dtype, name=f"layer_{i}")(x_NxD, seen)
    return x_NxD.reshape(*tokens.shape, -1)


class BertClassifier(nn.Module):
  """BERT with a linear head on the mean hidden state of the real tokens.

  As sentence-transformers pools MiniLM.

  Attributes:
    config: the sizes.
    num_classes: outputs of the head; 1 for regression.
    dtype: compute dtype of the encoder; None is float32. The mean and the head
      are float32.
    remat: what a layer's backward pass computes again; see `remat.layer`.
  """

  config: BertConfig
  num_classes: int
  dtype: typing.DTypeLike | None = None
  remat: str = "none"

  def setup(self):
    self.encoder = Bert(self.config, self.dtype, self.remat)
    self.head = nn.Dense(self.num_classes, dtype=jnp.float32)

  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """Logits, float32 (B, num_classes); the arguments are those of `Bert`."""
    return self.head(self.features(tokens, mask, token_types))

  def features(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """The mean hidden states without the head, float32 (B, D).

    Call as `model.apply(variables, tokens, mask, method="features")`. That of a
    row of padding is zeros.
    """
    x_BxLxD = self.encoder(tokens, mask, token_types).astype(jnp.float32)
    mask_BxLx1 = mask.astype(bool)[..., None].astype(jnp.float32)
    count_Bx1 = jnp.maximum(mask_BxLx1.sum(1), 1.0)
    return (x_BxLxD * mask_BxLx1).sum(1) / count_Bx1


def logical_axes(variables: Any) -> Any:
  """Names of the axes of a classifier's variables: embed, heads, mlp or none.

  Vectors of width D have none: it costs more to gather than to keep them.

  Args:
    variables: of `BertClassifier`; shapes are enough.

  Returns:
    A tree like `variables` of `jax.sharding.PartitionSpec`.
  """

  def of(path, x):
    module, leaf = path[-2].key, path[-1].key
    names = _AXES.get(module, (None,) * x.ndim)
    if leaf == "bias":
      names = tuple(name if name != "embed" else None for name in names[-1:])
    return jax.sharding.PartitionSpec(*names)

  return jax.tree_util.tree_map_with_path(of, variables)


class _Embeddings(nn.Module):
  """Normed sum of the word, position and segment embeddings, (N, D)."""

  config: BertConfig
  dtype: typing.DTypeLike | None

  @nn.compact
  def __call__(self, tokens: jax.Array, token_types: jax.Array) -> jax.Array:
    c = self.config
    embed = functools.partial(
      nn.Embed,
      features=c.hidden_size,
      embedding_init=nn.initializers.normal(0.02),
    )
    x = embed(c.vocab_size, name="word")(tokens)
    x += embed(c.type_vocab_size, name="token_type")(token_types)
    positions = jnp.arange(tokens.shape[1])
    x += embed(c.max_positions, name="position")(positions)
    x = x.reshape(-1, c.hidden_size)
    return _norm(c, "norm")(x).astype(self.dtype or jnp.float32)


class _Layer(nn.Module):
  """Self-attention and feed-forward, each with a residual and a norm."""

  config: BertConfig
  length: int
  dtype: typing.DTypeLike | None

  @nn.compact
  def __call__(self, x_NxD: jax.Array, seen: attention.Seen) -> jax.Array:
    c = self.config
    dtype = self.dtype or jnp.float32
    dense = functools.partial(
      nn.Dense, dtype=dtype, kernel_init=nn.initializers.normal(0.02)
    )

    def heads(name: str) -> jax.Array:
      y_NxD = dense(c.hidden_size, name=name)(x_NxD)
      return y_NxD.reshape(-1, self.length, c.num_heads, c.head_size)

    y_BxLxHxK = attention.attention(
      heads("query"), heads("key"), heads("value"), seen
    )
    y_NxD = y_BxLxHxK.reshape(-1, c.hidden_size)
    y_NxD = dense(c.hidden_size, name="attention_out")(y_NxD)
    x_NxD = self._residual("attention_norm", x_NxD, y_NxD)

    y_NxF = dense(c.intermediate_size, name="intermediate")(x_NxD)
    y_NxF = _ACTIVATIONS[c.hidden_act](y_NxF)
    y_NxD = dense(c.hidden_size, name="output")(y_NxF)
    return self._residual("output_norm", x_NxD, y_NxD)

  def _residual(self, name: str, x: jax.Array, y: jax.Array) -> jax.Array:
    total = x.astype(jnp.float32) + y.astype(jnp.float32)
    return _norm(self.config, name)(total).astype(x.dtype)


def _norm(config: BertConfig, name: str) -> nn.LayerNorm:
  # The fast variance, E[x²] - E[x]², cancels where the mean is large.
  return nn.LayerNorm(
    epsilon=config.layer_norm_eps,
    dtype=jnp.float32,
    use_fast_variance=False,
    name=name,
  )


def _check_shapes(
  config: BertConfig,
  tokens: jax.Array,
  mask: jax.Array,
  token_types: jax.Array | None,
) -> None:
  if tokens.ndim != 2:
    raise ValueError(f"tokens must be (batch, length), got {tokens.shape}.")
  if mask.shape != tokens.shape:
    raise ValueError(
      f"mask must have the shape of tokens, {tokens.shape}, got {mask.shape}."
    )
  if token_types is not None and token_types.shape != tokens.shape:
    raise ValueError(
      f"token_types must have the shape of tokens, {tokens.shape}, got "
      f"{token_types.shape}."
    )
  if tokens.shape[1] > config.max_positions:
    raise ValueError(
      f"tokens must be at most {config.max_positions} long, the positions "
      f"this BERT has learned, got {tokens.shape[1]}."
    )
