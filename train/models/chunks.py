"""Computes losses from logits in chunks of tokens, to save memory.

The float32 logits of a whole batch, (B, L, V), would be the largest array of a
training step. For 16,384 tokens and Llama 3's vocabulary, they take 8.4 GB.

Shapes: B batch, L length, P parts that a mesh splits a row into, C chunks, T
tokens of a part in a chunk, D width, V vocabulary.
"""

import math
from typing import Any

from flax import linen as nn
from flax.linen import spmd
import jax
from jax import ad_checkpoint
import jax.numpy as jnp
import numpy as np

from . import splits

Read = jax.tree_util.Partial
"""A function of arrays (..., *) with an entry for each token, and of logits.

The logits are (..., V). The function returns arrays (...) with a number for
each token, which depends only on the logits and the entries of this token.
"""

LIMIT = 2**28
"""The default limit of a chunk's logits on a device, in bytes."""

_SLOPE = "slope"  # the gradient of a result by the hidden state


def read(module: Any, hidden: jax.Array, read: Read | None) -> Any:
  """Returns `read(module.head(hidden))`, without all logits at once.

  If all logits take at most `module.logits_bytes`, there is one chunk. If not,
  each chunk has the same tokens of every row, and of every part of a row. So on
  a mesh, each device keeps its own rows and tokens.

  For a gradient, the forward pass computes the gradient of each number by the
  token's hidden state, while the token's logits are in memory. The backward
  pass multiplies this gradient by the cotangent. So the head runs as often as
  without chunks, as in MaxText's tiling of the vocabulary. Only a gradient by
  the head's own parameters or adapters makes the backward pass compute the
  logits again.

  Args:
    module: a Linen module with a method `head`, from (B, ..., D) to float32
      (B, ..., V), and with `config.vocab_size` and `logits_bytes`.
    hidden: (B, L, D).
    read: a `Read` with arrays (B, L, *). None: the logits are returned.

  Returns:
    The results of `read`, arrays (B, L).

  Raises:
    NotImplementedError: if chunks are differentiated twice by the hidden
      states. A model with a larger `logits_bytes` has no chunks.
  """
  if read is None:
    return module.head(hidden)
  batch, length, _ = hidden.shape
  parts = splits.parts("length")
  length //= parts
  count = _chunks(batch, length, module.config.vocab_size, module.logits_bytes)
  if count == 1 or module.is_initializing():
    return read(module.head(hidden))
  size = -(-length // count)

  def split(x_BxL):
    more = x_BxL.shape[2:]
    padding = [(0, 0)] * (3 + len(more))
    padding[2] = (0, count * size - length)
    x_BxPxCxT = jnp.pad(
      x_BxL.reshape(batch, parts, length, *more), padding
    ).reshape(batch, parts, count, size, *more)
    return jnp.moveaxis(x_BxPxCxT, 2, 0)

  def joined(x_CxBxPxT):
    x_BxPxL = jnp.moveaxis(x_CxBxPxT, 0, 2).reshape(batch, parts, -1)
    return x_BxPxL[..., :length].reshape(batch, -1)

  # A gradient by the hidden states needs only the slopes. A gradient by the
  # head runs the chunk again; in a scan, XLA cannot undo that.
  of_chunk = nn.remat(
    _of_chunk,
    prevent_cse=False,
    policy=jax.checkpoint_policies.save_only_these_names(_SLOPE),
  )
  scanned: Any = nn.scan(
    of_chunk,
    variable_broadcast="params",
    # The head's adapters draw their dropout here.
    split_rngs={"params": False, "dropout": True},
  )
  on_each_device: Any = nn.map_variables(
    scanned, "params", _gathered, mutable=False
  )
  chunked = jax.tree.map(split, (hidden, read))
  _, found = on_each_device(module, None, chunked)
  return jax.tree.map(joined, found)


def _chunks(batch: int, length: int, vocab_size: int, limit: int) -> int:
  """Returns the number of chunks; each has at least one token of each row."""
  on_device = batch * length * vocab_size * 4 / splits.parts("batch")
  wanted = min(max(math.ceil(on_device / limit), 1), length)
  # The number of chunks of this size, rounded up.
  return -(-length // -(-length // wanted))


def _gathered(params: Any) -> Any:
  """Gathers parameters on each device before the loop, and not in each turn."""
  return jax.tree.map(
    lambda x: spmd.with_logical_constraint(x, (None,) * x.ndim), params
  )


def _of_chunk(module: Any, carry: None, chunk: tuple[Any, Any]) -> Any:
  hidden, read = chunk
  found, vjp = nn.vjp(
    lambda module, hidden: read(module.head(hidden)),
    module,
    jax.lax.stop_gradient(hidden),
    vjp_variables=(),
  )
  leaves, structure = jax.tree.flatten(found)

  def of_leaf(i):
    if not jnp.issubdtype(leaves[i].dtype, jnp.floating):
      return leaves[i]
    seeds = [_seed(x, float(i == j)) for j, x in enumerate(leaves)]
    slope = jax.lax.stop_gradient(vjp(structure.unflatten(seeds))[1])
    slope = ad_checkpoint.checkpoint_name(slope, _SLOPE)
    return _depending(leaves[i], slope, hidden)

  return carry, structure.unflatten(map(of_leaf, range(len(leaves))))


def _seed(x: jax.Array, value: float) -> Any:
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jnp.full(x.shape, value, x.dtype)
  return np.zeros(x.shape, jax.dtypes.float0)


@jax.custom_jvp
def _depending(
  value: jax.Array, slope: jax.Array, hidden: jax.Array
) -> jax.Array:
  """Returns the value, and gives it the gradient `slope` by `hidden`."""
  del slope, hidden
  return value


@_depending.defjvp
def _(primals, tangents):
  value, slope, hidden = primals
  by_head, _, by_hidden = tangents
  products = _once(slope, hidden).astype(value.dtype) * by_hidden
  return value, by_head + products.sum(-1)


@jax.custom_jvp
def _once(slope: jax.Array, hidden: jax.Array) -> jax.Array:
  """Returns the slope; its own derivative is refused."""
  del hidden
  return slope


@_once.defjvp
def _(primals, tangents):
  del primals, tangents
  raise NotImplementedError(
    "logits that are read in chunks have no second derivatives; a model with "
    "a greater logits_bytes reads them at once."
  )
