"""The loss along random directions that have the scales of the weights."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from bilora_jax.sharpness import _space

Axes: TypeAlias = int | tuple[int, ...]


def filter_normalized(
  key: jax.Array,
  params: Any,
  *,
  input_axes: Axes | Callable[[str, tuple[int, ...]], Axes] | None = None,
  mask: Any = True,
) -> Any:
  r"""A random direction in which each filter has the norm of the same weights.

  .. math:: d_{l,j} \leftarrow \frac{d_{l,j}}{\|d_{l,j}\|} \|w_{l,j}\|

  with Gaussian :math:`d`; filter j of layer l is all weights of one output.
  Parameters of one axis, such as biases and scales, do not move.

  Args:
    key: random key.
    params: a tree of floats; kernels are (in, out).
    input_axes: the axes that a filter spans, in each array of two or more axes:
      by default all axes but the last; -2 if leading axes are scanned layers. A
      function receives the path of a leaf, as `jax.tree_util.keystr` writes it,
      and its shape, and returns the axes.
    mask: which parameters move; see `direction`.

  Returns:
    A float32 tree like `params`.

  Raises:
    ValueError: if the mask does not fit.

  References:
    Li et al, `Visualizing the Loss Landscape of Neural Nets
    <https://arxiv.org/abs/1712.09913>`_, 2018, section 4.
  """
  chosen = _space.space(params, mask)
  draws = _space.gaussian(key, chosen.moved)

  def one(name, w, d):
    if w.ndim < 2:
      return jnp.zeros_like(d)
    if callable(input_axes):
      axes = input_axes(name, w.shape)
    else:
      axes = tuple(range(w.ndim - 1)) if input_axes is None else input_axes
    wanted, drawn = (
      jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True)) for x in (w, d)
    )
    return d * (wanted / drawn)

  weights = _space.as_float32(chosen.moved)
  return chosen.tree(
    [one(name, w, d) for name, w, d in zip(chosen.names, weights, draws)]
  )


def landscape(
  loss: _space.Loss, params: Any, directions: Sequence[Any], steps: Any
) -> jax.Array:
  r"""The loss on a line or a grid around the parameters.

  .. math:: L(w + s_i d_1), \qquad L(w + s_i d_1 + s_j d_2)

  Args:
    loss: `params` to a scalar.
    params: a tree of floats.
    directions: a list of one or two trees like `params`, made by
      `filter_normalized` or `direction`.
    steps: s, `[n]`, in units of the directions; the same for both directions.

  Returns:
    The losses, `[n]` or `[n, n]`, float32; the first axis is that of the first
    direction.

  Raises:
    ValueError: if there are not one or two directions, or steps are not a
      one-dimensional array.

  References:
    Li et al, `Visualizing the Loss Landscape of Neural Nets
    <https://arxiv.org/abs/1712.09913>`_, 2018.
  """
  steps = jnp.asarray(steps, jnp.float32)
  if not isinstance(directions, (list, tuple)) or len(directions) not in (1, 2):
    raise ValueError(
      "directions is a list of one or two trees; got "
      f"{type(directions).__name__} of {len(directions)}."
    )
  if steps.ndim != 1:
    raise ValueError(f"steps have one axis; got the shape {steps.shape}.")

  def value(coordinates):
    # In one sum, so that half precision rounds once.
    ahead = jax.tree.map(
      lambda *leaves: sum(s * x for s, x in zip(coordinates, leaves)),
      *directions,
    )
    return jnp.asarray(loss(_space.move(params, ahead)), jnp.float32)

  grid = jnp.meshgrid(*[steps] * len(directions), indexing="ij")
  points = jnp.stack([x.ravel() for x in grid], axis=-1)
  return jax.lax.map(value, points).reshape(grid[0].shape)
