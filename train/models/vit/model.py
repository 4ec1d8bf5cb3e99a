"""Vision transformers and their classifier, in Flax Linen.

Shapes: B images of S x S pixels in C channels; P side of a patch in pixels; L
tokens of an image, N = B·L tokens of all images; D width, H heads, K = D/H.
"""

import functools
from typing import Any

from flax import linen as nn
from flax.linen import spmd
import jax
from jax import typing
import jax.numpy as jnp
import numpy as np

from .. import activations, attention, remat
from .config import CHANNELS, VitConfig

# Module -> names of its kernel's axes.
_AXES = {
  "patch": (None, "embed"),
  "query": ("embed", "heads"),
  "key": ("embed", "heads"),
  "value": ("embed", "heads"),
  "attention_out": ("heads", "embed"),
  "intermediate": ("embed", "mlp"),
  "output": ("mlp", "embed"),
  "head": ("embed", None),
}


class Vit(nn.Module):
  r"""A pre-norm transformer over patches of an image.

  :math:`z_0` holds the first tokens and the patches, each with its position.
  Layer :math:`i` is

  .. math::
    z' = z_{i-1} + \lambda_i \odot \mathrm{MSA}(\mathrm{LN}(z_{i-1})), \quad
    z_i = z' + \lambda'_i \odot \mathrm{MLP}(\mathrm{LN}(z'))

  and the result is :math:`\mathrm{LN}` of the last :math:`z_i`. `config.Tower`
  says how the kinds differ; for example, only DINOv2 has :math:`\lambda`. There
  is no dropout, and no patch is masked.

  Attributes:
    config: the sizes.
    dtype: the dtype of matrix products and of the residual stream; None is
      float32. The softmax, the layer norms, the residual sums and the
      parameters are always float32.
    remat: what a layer's backward pass computes again; see `remat.layer`.

  References:
    Dosovitskiy et al., ICLR 2021, equations 1 to 4, arXiv:2010.11929.
    LayerScale: Touvron et al., ICCV 2021, equation 4, arXiv:2103.17239.
    DINOv2: Oquab et al., TMLR 2024, arXiv:2304.07193. DeiT: Touvron et al.,
    ICML 2021, arXiv:2012.12877. CLIP: Radford et al., ICML 2021,
    arXiv:2103.00020. SigLIP: Zhai et al., ICCV 2023, arXiv:2303.15343.
  """

  config: VitConfig
  dtype: typing.DTypeLike | None = None
  remat: str = "none"

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Returns the hidden states of the last layer.

    Args:
      images: images normalised as the config says, float (B, S, S', C). The
        sides are multiples of P, and may differ from those of the stored grid.

    Returns:
      (B, F + R + S/P · S'/P, D) in the compute dtype: F first tokens, R
      registers, and the patches row by row.

    Raises:
      ValueError: the shape is wrong.
    """
    c = self.config
    _check_shape(c, images.shape)
    x_BxLxD = _Embeddings(c, self.dtype, name="embeddings")(images)
    batch, length, _ = x_BxLxD.shape
    # Activations stay 2-D between layers: see train/models/bert/model.py.
    x_NxD = x_BxLxD.reshape(-1, c.hidden_size)
    if c.tower.norm_before:
      x_NxD = _norm(c, "norm_before")(x_NxD).astype(x_NxD.dtype)
    layer = remat.layer(_Layer, self.remat)
    for i in range(c.num_layers):
      # On a mesh, devices keep their rows and gather the weights.
      x_NxD = spmd.with_logical_constraint(x_NxD, ("batch", None))
      x_NxD = layer(c, length, self.dtype, name=f"layer_{i}")(x_NxD)
    if c.tower.norm_after:
      x_NxD = _norm(c, "norm")(x_NxD).astype(x_NxD.dtype)
    return x_NxD.reshape(batch, length, -1)


class VitClassifier(nn.Module):
  """A vision transformer with a linear head.

  `config.Tower` says which input the head gets. It is the class token, as in
  DINOv2's linear evaluation of its small model, or the mean of the patches.

  Attributes:
    config: the sizes.
    num_classes: the outputs of the head.
    dtype: the compute dtype of the encoder; None is float32. The head is
      float32.
    remat: what a layer's backward pass computes again; see `remat.layer`.
  """

  config: VitConfig
  num_classes: int
  dtype: typing.DTypeLike | None = None
  remat: str = "none"

  def setup(self):
    self.encoder = Vit(self.config, self.dtype, self.remat)
    self.head = nn.Dense(self.num_classes, dtype=jnp.float32)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Returns logits, float32 (B, num_classes); takes the inputs of `Vit`."""
    return self.head(self.features(images))

  def features(self, images: jax.Array) -> jax.Array:
    """Returns the input of the head, float32 (B, D)."""
    x_BxLxD = self.encoder(images).astype(jnp.float32)
    c = self.config
    if c.tower.pooling == "first":
      return x_BxLxD[:, 0]
    return x_BxLxD[:, len(c.tower.first) + c.registers :].mean(1)


def bicubic(size: int, stored: int) -> np.ndarray:
  r"""Returns a matrix that resizes a line of samples like PyTorch's bicubic.

  New sample :math:`i` is at the place :math:`x_i = (i + 1/2)\, m/n - 1/2` among
  the :math:`m` stored samples. The kernel is

  .. math::
    k(t) = \begin{cases}
      (a + 2)|t|^3 - (a + 3)|t|^2 + 1 & |t| \le 1 \\
      a|t|^3 - 5a|t|^2 + 8a|t| - 4a & 1 < |t| < 2
    \end{cases}

  where :math:`a = -3/4` (`jax.image.resize` has :math:`-1/2`). There is no
  antialiasing. Beyond the ends, the first and last samples are repeated.

  Args:
    size: n.
    stored: m.

  Returns:
    [n, m] float32; each row sums to 1.

  References:
    Keys, IEEE Trans. ASSP 1981, equation 4; `interpolate_pos_encoding` of
    facebookresearch/dinov2, `dinov2/models/vision_transformer.py`.
  """
  a = -0.75
  where = (np.arange(size) + 0.5) * stored / size - 0.5
  matrix = np.zeros((size, stored))
  for tap in range(-1, 3):
    place = np.floor(where) + tap
    t = np.abs(where - place)
    near = ((a + 2) * t - (a + 3)) * t**2 + 1
    far = a * (((t - 5) * t + 8) * t - 4)
    column = np.clip(place, 0, stored - 1).astype(int)
    matrix[np.arange(size), column] += np.where(t <= 1, near, far)
  return matrix.astype(np.float32)


def logical_axes(variables: Any) -> Any:
  """Returns the names of the axes of a classifier's variables.

  The names are embed, heads and mlp.

  Args:
    variables: the variables of `VitClassifier`, or their shapes.

  Returns:
    A tree like `variables`, with a `jax.sharding.PartitionSpec` for each leaf.
  """

  def of(path, x):
    names = _AXES.get(path[-2].key, (None,) * x.ndim)
    if path[-1].key == "bias":
      names = tuple(name if name != "embed" else None for name in names[-1:])
    return jax.sharding.PartitionSpec(*names)

  return jax.tree_util.tree_map_with_path(of, variables)


class _Embeddings(nn.Module):
  """The first tokens and the patches, with their positions, (B, L, D)."""

  config: VitConfig
  dtype: typing.DTypeLike | None

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    c = self.config
    dtype = self.dtype or jnp.float32
    init = nn.initializers.normal(0.02)

    def drawn(name: str, *shape: int) -> jax.Array:
      return self.param(name, init, (*shape, c.hidden_size), jnp.float32)

    first = [drawn(x) + drawn(f"{x}_position") for x in c.tower.first]
    grid_GxGxD = drawn("position", c.grid, c.grid)
    p = c.patch_size
    batch, height, width = len(images), *(n // p for n in images.shape[1:3])
    if (height, width) != (c.grid, c.grid):
      grid_GxGxD = _resized(c, grid_GxGxD, height, width)
    # A convolution whose stride is its width is a matrix product of patches.
    x = images.reshape(batch, height, p, width, p, CHANNELS)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch * height * width, -1)
    x_NxD = nn.Dense(
      c.hidden_size,
      use_bias=c.tower.patch_bias,
      dtype=dtype,
      kernel_init=init,
      name="patch",
    )(x)
    x_BxLxD = x_NxD.reshape(batch, height * width, -1).astype(jnp.float32)
    x_BxLxD += grid_GxGxD.reshape(height * width, -1)
    if c.registers:
      first += list(drawn("registers", c.registers))
    if first:
      first_FxD = jnp.stack(first)
      first_BxFxD = jnp.broadcast_to(first_FxD, (batch, *first_FxD.shape))
      x_BxLxD = jnp.concatenate([first_BxFxD, x_BxLxD], 1)
    return x_BxLxD.astype(dtype)


def _resized(
  config: VitConfig, grid_GxGxD: jax.Array, height: int, width: int
) -> jax.Array:
  """Returns positions for a grid of another size, as the model's kind does."""
  if config.registers:
    # With antialiasing, PyTorch, Pillow and JAX have the same filter.
    shape = (height, width, config.hidden_size)
    return jax.image.resize(
      grid_GxGxD, shape, "cubic", precision=jax.lax.Precision.HIGHEST
    )
  return jnp.einsum(
    "hp,wq,pqd->hwd",
    bicubic(height, config.grid),
    bicubic(width, config.grid),
    grid_GxGxD,
    precision=jax.lax.Precision.HIGHEST,
  )


class _Layer(nn.Module):
  """Self-attention and a feed-forward layer, pre-norm, in scaled branches."""

  config: VitConfig
  length: int
  dtype: typing.DTypeLike | None

  @nn.compact
  def __call__(self, x_NxD: jax.Array) -> jax.Array:
    c = self.config
    dtype = self.dtype or jnp.float32
    dense = functools.partial(
      nn.Dense, dtype=dtype, kernel_init=nn.initializers.normal(0.02)
    )

    normed_NxD = _norm(c, "attention_norm")(x_NxD)

    def heads(name: str) -> jax.Array:
      y_NxD = dense(c.hidden_size, use_bias=c.qkv_bias, name=name)(normed_NxD)
      return y_NxD.reshape(-1, self.length, c.num_heads, c.head_size)

    kernel = attention.chosen("auto", dtype, c.head_size, self.length)
    y_BxLxHxK = attention.attention(
      heads("query"), heads("key"), heads("value"), attention.real(kernel)
    )
    y_NxD = y_BxLxHxK.reshape(-1, c.hidden_size)
    y_NxD = dense(c.hidden_size, name="attention_out")(y_NxD)
    x_NxD = self._residual("attention_scale", x_NxD, y_NxD)

    normed_NxD = _norm(c, "output_norm")(x_NxD)
    y_NxF = dense(c.intermediate_size, name="intermediate")(normed_NxD)
    y_NxF = activations.BY_NAME[c.activation](y_NxF)
    y_NxD = dense(c.hidden_size, name="output")(y_NxF)
    return self._residual("output_scale", x_NxD, y_NxD)

  def _residual(self, name: str, x: jax.Array, y: jax.Array) -> jax.Array:
    y = y.astype(jnp.float32)
    if self.config.tower.scales:
      y *= self.param(
        name, nn.initializers.ones, (self.config.hidden_size,), jnp.float32
      )
    return (x.astype(jnp.float32) + y).astype(x.dtype)


def _norm(config: VitConfig, name: str) -> nn.LayerNorm:
  # The fast variance, E[x²] - E[x]², cancels if the mean is large.
  return nn.LayerNorm(
    epsilon=config.layer_norm_eps,
    dtype=jnp.float32,
    use_fast_variance=False,
    name=name,
  )


def _check_shape(config: VitConfig, shape: tuple[int, ...]) -> None:
  if len(shape) != 4 or shape[3] != CHANNELS:
    raise ValueError(
      f"images must be (batch, height, width, {CHANNELS}), got {shape}."
    )
  sides = shape[1:3]
  if min(sides) < 1 or any(side % config.patch_size for side in sides):
    raise ValueError(
      "the sides of images must be multiples of the patch's "
      f"{config.patch_size} pixels, got {sides[0]} x {sides[1]}."
    )
