"""DINOv2's vision transformer and a classifier on it, in Flax Linen.

Shapes: B images of S x S pixels in C channels; P pixels along a patch's side;
L tokens of an image, N = B·L of all; D width, H heads, K = D/H.
"""

import dataclasses
import functools
import math
from typing import Any

from flax import linen as nn
from flax.linen import spmd
import jax
from jax import typing
import jax.numpy as jnp
import numpy as np

from .. import attention, remat

CHANNELS = 3

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


@dataclasses.dataclass(frozen=True)
class VitConfig:
  """Sizes of a vision transformer (Dosovitskiy et al., ICLR 2021, table 1).

  Attributes:
    patch_size: P, pixels along the side of a patch.
    grid: patches along the side of the image whose positions were learned.

  Raises:
    ValueError: a size is not positive, or the heads do not divide the width.
  """

  patch_size: int
  grid: int
  hidden_size: int
  num_layers: int
  num_heads: int
  intermediate_size: int
  layer_norm_eps: float = 1e-6

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value!r}.")
    if self.hidden_size % self.num_heads:
      raise ValueError(
        f"hidden_size must be a multiple of num_heads, got {self.hidden_size} "
        f"and {self.num_heads}."
      )

  @property
  def head_size(self) -> int:
    """K, the width of a head."""
    return self.hidden_size // self.num_heads


class Vit(nn.Module):
  r"""DINOv2's encoder: a pre-norm transformer over patches of an image.

  With :math:`z_0` the class token and the patches, each with its position,
  layer :math:`i` is

  .. math::
    z' = z_{i-1} + \lambda_i \odot \mathrm{MSA}(\mathrm{LN}(z_{i-1})), \quad
    z_i = z' + \lambda'_i \odot \mathrm{MLP}(\mathrm{LN}(z'))

  and what is returned is :math:`\mathrm{LN}` of the last. Without registers,
  dropout and masked patches.

  Attributes:
    config: the sizes.
    dtype: dtype of the matmuls and of what is added up over layers; None is
      float32. The softmax, the layer norms and the sums themselves are
      float32 whatever it is, and so are parameters.
    remat: what a layer's backward pass computes again; see `remat.layer`.

  References:
    Dosovitskiy et al., ICLR 2021, equations 1 to 4, arXiv:2010.11929.
    LayerScale: Touvron et al., ICCV 2021, equation 4, arXiv:2103.17239.
    DINOv2: Oquab et al., TMLR 2024, arXiv:2304.07193.
  """

  config: VitConfig
  dtype: typing.DTypeLike | None = None
  remat: str = "none"

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Normed hidden states of the last layer: the class token, the patches.

    Args:
      images: normalised as in `objectives.images`, float (B, S, S', C), whose
        sides are multiples of P and need not be those of the stored grid.

    Returns:
      (B, 1 + S/P · S'/P, D) in the compute dtype, patches row by row.

    Raises:
      ValueError: the shape is wrong.
    """
    c = self.config
    _check_shape(c, images.shape)
    x_BxLxD = _Embeddings(c, self.dtype, name="embeddings")(images)
    batch, length, _ = x_BxLxD.shape
    # Activations stay 2-D between layers, as in `bert`.
    x_NxD = x_BxLxD.reshape(-1, c.hidden_size)
    layer = remat.layer(_Layer, self.remat)
    for i in range(c.num_layers):
      # On a mesh: weights are brought to the rows, not rows to the weights.
      x_NxD = spmd.with_logical_constraint(x_NxD, ("batch", None))
      x_NxD = layer(c, length, self.dtype, name=f"layer_{i}")(x_NxD)
    x_NxD = _norm(c, "norm")(x_NxD).astype(x_NxD.dtype)
    return x_NxD.reshape(batch, length, -1)


class VitClassifier(nn.Module):
  """A vision transformer with a linear head on the class token.

  As DINOv2's linear evaluation of its small model has it.

  Attributes:
    config: the sizes.
    num_classes: outputs of the head.
    dtype: compute dtype of the encoder; None is float32. The head is float32.
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
    """Logits, float32 (B, num_classes); the argument is that of `Vit`."""
    return self.head(self.features(images))

  def features(self, images: jax.Array) -> jax.Array:
    """What the head is given, float32 (B, D)."""
    return self.encoder(images)[:, 0].astype(jnp.float32)


def bicubic(size: int, stored: int) -> np.ndarray:
  r"""The matrix that resizes a line of samples as PyTorch's bicubic does.

  Sample :math:`i` is taken at :math:`x_i = (i + 1/2)\, m/n - 1/2` of the
  :math:`m` stored ones, with the kernel

  .. math::
    k(t) = \begin{cases}
      (a + 2)|t|^3 - (a + 3)|t|^2 + 1 & |t| \le 1 \\
      a|t|^3 - 5a|t|^2 + 8a|t| - 4a & 1 < |t| < 2
    \end{cases}

  where :math:`a = -3/4` (`jax.image.resize` has :math:`-1/2`), without
  antialiasing; beyond an end, the end is repeated.

  Args:
    size: n.
    stored: m.

  Returns:
    [n, m] float32, whose rows add up to 1.

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
  """Names of the axes of a classifier's variables: embed, heads, mlp or none.

  Args:
    variables: of `VitClassifier`; shapes are enough.

  Returns:
    A tree like `variables` of `jax.sharding.PartitionSpec`.
  """

  def of(path, x):
    names = _AXES.get(path[-2].key, (None,) * x.ndim)
    if path[-1].key == "bias":
      names = tuple(name if name != "embed" else None for name in names[-1:])
    return jax.sharding.PartitionSpec(*names)

  return jax.tree_util.tree_map_with_path(of, variables)


class _Embeddings(nn.Module):
  """The class token and the patches, with their positions, (B, L, D)."""

  config: VitConfig
  dtype: typing.DTypeLike | None

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    c = self.config
    dtype = self.dtype or jnp.float32
    init = nn.initializers.normal(0.02)
    cls_D = self.param("cls", init, (c.hidden_size,), jnp.float32)
    place_D = self.param("cls_position", init, (c.hidden_size,), jnp.float32)
    grid_GxGxD = self.param(
      "position", init, (c.grid, c.grid, c.hidden_size), jnp.float32
    )
    p = c.patch_size
    batch, height, width = len(images), *(n // p for n in images.shape[1:3])
    if (height, width) != (c.grid, c.grid):
      grid_GxGxD = jnp.einsum(
        "hp,wq,pqd->hwd",
        bicubic(height, c.grid),
        bicubic(width, c.grid),
        grid_GxGxD,
        precision=jax.lax.Precision.HIGHEST,
      )
    # A convolution whose stride is its width is a product with each patch.
    x = images.reshape(batch, height, p, width, p, CHANNELS)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch * height * width, -1)
    x_NxD = nn.Dense(
      c.hidden_size, dtype=dtype, kernel_init=init, name="patch"
    )(x)
    x_BxLxD = x_NxD.reshape(batch, height * width, -1).astype(jnp.float32)
    x_BxLxD += grid_GxGxD.reshape(height * width, -1)
    first_Bx1xD = jnp.broadcast_to(cls_D + place_D, (batch, 1, c.hidden_size))
    return jnp.concatenate([first_Bx1xD, x_BxLxD], 1).astype(dtype)


class _Layer(nn.Module):
  """Self-attention and feed-forward, each on a norm, scaled, and added."""

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
      y_NxD = dense(c.hidden_size, name=name)(normed_NxD)
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
    y_NxF = jax.nn.gelu(y_NxF, approximate=False)
    y_NxD = dense(c.hidden_size, name="output")(y_NxF)
    return self._residual("output_scale", x_NxD, y_NxD)

  def _residual(self, name: str, x: jax.Array, y: jax.Array) -> jax.Array:
    scale = self.param(
      name, nn.initializers.ones, (self.config.hidden_size,), jnp.float32
    )
    total = x.astype(jnp.float32) + scale * y.astype(jnp.float32)
    return total.astype(x.dtype)


def _norm(config: VitConfig, name: str) -> nn.LayerNorm:
  # The fast variance, E[x²] - E[x]², cancels where the mean is large.
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
