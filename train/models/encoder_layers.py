"""Parts of text encoders: checks of inputs, the post-norm layer, and axes.

Shapes: B batch, L length, N = B·L tokens, D width.
"""

from collections.abc import Mapping
import functools
from typing import Any, Protocol

from flax import linen as nn
import jax
from jax import typing
import jax.numpy as jnp

from . import activations, pooling


class Sizes(Protocol):
  """The part of a config that a post-norm layer needs."""

  @property
  def hidden_size(self) -> int: ...
  @property
  def intermediate_size(self) -> int: ...
  @property
  def hidden_act(self) -> str: ...
  @property
  def layer_norm_eps(self) -> float: ...


def check_shapes(
  tokens: jax.Array,
  mask: jax.Array,
  token_types: jax.Array | None,
  longest: int | None,
  model: str,
) -> None:
  """Refuses wrong inputs of an encoder.

  Args:
    tokens: int (B, L).
    mask: (B, L).
    token_types: int (B, L), or None.
    longest: the largest L; None: no limit.
    model: the model's name in the message.

  Raises:
    ValueError: a shape is wrong, or L exceeds the learned positions.
  """
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
  if longest is not None and tokens.shape[1] > longest:
    raise ValueError(
      f"tokens must be at most {longest} long, the positions this {model} has "
      f"learned, got {tokens.shape[1]}."
    )


def dense(
  features: int,
  dtype: typing.DTypeLike,
  name: str | None = None,
  use_bias: bool = True,
) -> nn.Dense:
  """Returns a linear layer with the initialisation of encoders."""
  init = nn.initializers.normal(0.02)
  return nn.Dense(
    features, use_bias=use_bias, dtype=dtype, kernel_init=init, name=name
  )


def norm(
  epsilon: float, name: str | None = None, use_bias: bool = True
) -> nn.LayerNorm:
  """Returns a layer norm, which computes in float32 for every input."""
  # The fast variance, E[x²] - E[x]², cancels if the mean is large.
  return nn.LayerNorm(
    epsilon=epsilon,
    dtype=jnp.float32,
    use_bias=use_bias,
    use_fast_variance=False,
    name=name,
  )


def after_attention(
  config: Sizes, x_NxD: jax.Array, y_NxD: jax.Array
) -> jax.Array:
  """Computes the part of a post-norm layer that follows attention.

  This part is the attention's output layer and a feed-forward layer, each with
  a residual and a norm (Vaswani et al., NeurIPS 2017). It creates its modules
  in the calling module.

  Args:
    config: the sizes.
    x_NxD: the input of the layer.
    y_NxD: the results of the attention heads, in the compute dtype.

  Returns:
    (N, D), in the dtype of `x_NxD`.
  """
  linear = functools.partial(dense, dtype=y_NxD.dtype)
  y_NxD = linear(config.hidden_size, name="attention_out")(y_NxD)
  x_NxD = _residual(config, "attention_norm", x_NxD, y_NxD)
  y_NxF = linear(config.intermediate_size, name="intermediate")(x_NxD)
  y_NxF = activations.BY_NAME[config.hidden_act](y_NxF)
  y_NxD = linear(config.hidden_size, name="output")(y_NxF)
  return _residual(config, "output_norm", x_NxD, y_NxD)


def _residual(
  config: Sizes, name: str, x: jax.Array, y: jax.Array
) -> jax.Array:
  total = x.astype(jnp.float32) + y.astype(jnp.float32)
  return norm(config.layer_norm_eps, name)(total).astype(x.dtype)


class Classifier(nn.Module):
  """A text encoder with a linear head on the features of a text.

  A subclass creates `encoder` and `head` in `setup`.

  Attributes:
    config: the sizes.
    num_classes: the outputs of the head; 1 for regression.
    dtype: the compute dtype of the encoder; None is float32. The pooling and
      the head are float32.
    remat: what a layer's backward pass computes again; see `remat.layer`.
  """

  config: Any
  num_classes: int
  dtype: typing.DTypeLike | None = None
  remat: str = "none"

  def __call__(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """Returns logits, float32 (B, num_classes); takes the encoder's inputs."""
    return self.head(self.features(tokens, mask, token_types))

  def features(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the pooled hidden states, without the head, float32 (B, D).

    Call as `model.apply(variables, tokens, mask, method="features")`. A row of
    padding gives zeros.
    """
    x_BxLxD = self.encoder(tokens, mask, token_types)
    return pooling.pooled(x_BxLxD, mask, self.config.pooling)


AXES: Mapping[str, tuple[str | None, ...]] = {
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
"""From a module of a post-norm encoder to the axes of its kernel."""


def logical_axes(
  variables: Any, axes: Mapping[str, tuple[str | None, ...]] = AXES
) -> Any:
  """Returns the names of the axes of a classifier's variables.

  The names are embed, heads and mlp. Vectors of width D have none, because they
  are cheaper to keep on each device than to gather.

  Args:
    variables: the variables of the model, or their shapes.
    axes: the axes of each module, as `AXES`.

  Returns:
    A tree like `variables`, with a `jax.sharding.PartitionSpec` for each leaf.
  """

  def of(path, x):
    module, leaf = path[-2].key, path[-1].key
    names = axes.get(module, (None,) * x.ndim)
    if leaf == "bias":
      names = tuple(name if name != "embed" else None for name in names[-1:])
    return jax.sharding.PartitionSpec(*names)

  return jax.tree_util.tree_map_with_path(of, variables)
