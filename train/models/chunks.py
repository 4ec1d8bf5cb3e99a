"""What is told of each token from its logits, a chunk of tokens at a time.

Logits of a whole batch, (B, L, V) in float32, would be the largest array of a
step: 8.4 GB for 16,384 tokens of Llama 3's vocabulary. A chunk's are computed,
read and thrown away; the backward pass computes them again.

Shapes: B batch, L length, C chunks, T tokens of a row in a chunk, D width, V
vocabulary.
"""

from collections.abc import Callable
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

Read = jax.tree_util.Partial
"""A function of arrays of one entry a token, (..., *), and of logits (..., V).

It returns arrays of one entry a token. What is told of a token depends on its
own logits and entries alone.
"""

LIMIT = 2**28
"""Bytes of a chunk's logits on a device, in float32."""


def read(
  module: nn.Module,
  head: Callable[[Any, jax.Array], jax.Array],
  hidden: jax.Array,
  read: Read,
  vocab_size: int,
) -> Any:
  """`read(head(module, hidden))`, in as many chunks as `LIMIT` asks for.

  One chunk is read as it is. Of several, each takes the same tokens of every
  row, so that on a mesh each device keeps the rows that it has; a chunk has at
  least one token of each row.

  Args:
    module: whose parameters and adapters the head has.
    head: `(module, x)` to the logits, from (..., D) to float32 (..., V).
    hidden: (B, L, D).
    read: with arrays (B, L, ...).
    vocab_size: V.

  Returns:
    What `read` returns, arrays (B, L, ...).
  """
  length = hidden.shape[1]
  count = chunks(hidden.shape[0], length, vocab_size)
  if count == 1 or module.is_initializing():
    return read(head(module, hidden))
  size = -(-length // count)
  padding = count * size - length

  def split(x_BxL):
    widths = [(0, 0), (0, padding)] + [(0, 0)] * (x_BxL.ndim - 2)
    x_BxCxT = jnp.pad(x_BxL, widths).reshape(
      len(x_BxL), count, size, *x_BxL.shape[2:]
    )
    return jnp.moveaxis(x_BxCxT, 1, 0)

  def joined(x_CxBxT):
    x_BxCxT = jnp.moveaxis(x_CxBxT, 0, 1)
    return x_BxCxT.reshape(len(x_BxCxT), -1, *x_BxCxT.shape[3:])[:, :length]

  def of_chunk(module, carry, chunk):
    hidden, read = chunk
    return carry, read(head(module, hidden))

  # In a scan, XLA cannot undo it by sharing what is computed twice.
  scanned: Any = nn.scan(
    nn.remat(of_chunk, prevent_cse=False),
    variable_broadcast="params",
    split_rngs={"params": False, "dropout": True},
  )
  _, told = scanned(module, None, jax.tree.map(split, (hidden, read)))
  return jax.tree.map(joined, told)


def chunks(rows: int, length: int, vocab_size: int) -> int:
  """How many chunks tokens (rows, length) are read in, on the mesh there is."""
  on_device = rows * length * vocab_size * 4 / _parts()
  wanted = min(max(math.ceil(on_device / LIMIT), 1), length)
  # As many as there are of the size that this asks for.
  return -(-length // -(-length // wanted))


def _parts() -> int:
  """How many parts the rows of a batch are split into."""
  (axes,) = nn.logical_to_mesh_axes(("batch",)) or (None,)
  names = (axes,) if isinstance(axes, str) else axes or ()
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes.get(name, 1) for name in names)
