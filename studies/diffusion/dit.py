"""A diffusion transformer for digits, Peebles and Xie, arXiv 2212.09748."""

from flax import linen as nn
import jax.numpy as jnp

from studies.diffusion.denoising import NEW, SIDE

_PATCH = 2


class Block(nn.Module):
  """Attention and an MLP, modulated by the condition (adaLN-Zero)."""

  heads: int

  @nn.compact
  def __call__(self, x_BxTxD, condition_BxD):
    width = x_BxTxD.shape[-1]
    modulation = nn.Dense(
      6 * width, kernel_init=nn.initializers.zeros, name="modulation"
    )(nn.silu(condition_BxD))[:, None]
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, -1)
    h = _norm()(x_BxTxD) * (1 + scale1) + shift1
    by_head = (*h.shape[:2], self.heads, width // self.heads)
    query, key, value = (
      nn.Dense(width, name=name)(h).reshape(by_head)
      for name in ("query", "key", "value")
    )
    h = nn.dot_product_attention(query, key, value).reshape(h.shape)
    x_BxTxD += gate1 * nn.Dense(width, name="out")(h)
    h = _norm()(x_BxTxD) * (1 + scale2) + shift2
    h = nn.Dense(width, name="down")(nn.gelu(nn.Dense(2 * width, name="up")(h)))
    return x_BxTxD + gate2 * h


class DiT(nn.Module):
  """Predicts the noise in images `(n, 8, 8)` at times and of labels `(n,)`."""

  width: int
  depth: int
  heads: int

  @nn.compact
  def __call__(self, images, times, labels):
    cells = SIDE // _PATCH
    x = images.reshape(-1, cells, _PATCH, cells, _PATCH)
    x = x.swapaxes(2, 3).reshape(-1, cells**2, _PATCH**2)
    x = nn.Dense(self.width, name="patches")(x)
    x += self.param(
      "places", nn.initializers.normal(0.02), (cells**2, self.width)
    )
    rates = jnp.exp(-jnp.log(1e4) * jnp.linspace(0, 1, self.width // 2))
    angles = times[:, None] * rates
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
    condition = nn.Dense(self.width, name="time_up")(waves)
    condition = nn.Dense(self.width, name="time_out")(nn.silu(condition))
    condition += nn.Embed(NEW + 1, self.width, name="labels")(labels)
    for layer in range(self.depth):
      x = Block(self.heads, name=f"block_{layer}")(x, condition)
    shift, scale = jnp.split(
      nn.Dense(2 * self.width, name="modulation")(nn.silu(condition))[:, None],
      2,
      -1,
    )
    x = _norm()(x) * (1 + scale) + shift
    x = nn.Dense(
      _PATCH**2, kernel_init=nn.initializers.zeros, name="predicted"
    )(x)
    x = x.reshape(-1, cells, cells, _PATCH, _PATCH).swapaxes(2, 3)
    return x.reshape(-1, SIDE, SIDE)


def _norm() -> nn.Module:
  # The condition has the scale and the shift.
  return nn.LayerNorm(use_scale=False, use_bias=False)
