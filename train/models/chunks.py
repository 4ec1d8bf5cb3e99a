"""What is told of each token from its logits, a chunk of tokens at a time.

Logits of a whole batch, (B, L, V) in float32, would be the largest array of a
step: 8.4 GB for 16,384 tokens of Llama 3's vocabulary.

Shapes: B batch, L length, C chunks, T tokens of a row in a chunk, D width, V
vocabulary.
"""

from collections.abc import Callable
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Read = jax.tree_util.Partial
"""A function of arrays of one entry a token, (..., *), and of logits (..., V).

It returns arrays (...), a number a token, and what it tells of a token depends
on its own logits and entries alone.
"""

LIMIT = 2**28
"""Bytes of a chunk's logits on a device, in float32, unless it is said."""


def read(
  module: nn.Module,
  head: Callable[[Any, jax.Array], jax.Array],
  hidden: jax.Array,
  read: Read,
  count: int,
) -> Any:
  """`read(head(module, hidden))`, without all logits at once.

  One chunk is read as it is. Of several, each has the same tokens of every row,
  so that on a mesh each device keeps the rows that it has. Where a gradient is
  taken, the forward pass takes that of each token by its hidden state while it
  has the token's logits, and the backward pass multiplies it by what came from
  above: the logits are computed once, as without chunks. The head's own
  parameters and adapters need them again, if they are differentiated by.

  Args:
    module: whose parameters and adapters the head has.
    head: `(module, x)` to the logits, from (..., D) to float32 (..., V).
    hidden: (B, L, D).
    read: with arrays (B, L, ...).
    count: of chunks; see `chunks`.

  Returns:
    What `read` returns, arrays (B, L).
  """
  if count == 1 or module.is_initializing():
    return read(head(module, hidden))
  length = hidden.shape[1]
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
    return x_BxCxT.reshape(len(x_BxCxT), -1)[:, :length]

  def told(module, hidden, read):
    return read(head(module, hidden))

  in_chunks = nn.custom_vjp(
    _scan(told),
    forward_fn=_forward(told),
    backward_fn=_backward,
  )
  found = in_chunks(module, *jax.tree.map(split, (hidden, read)))
  return jax.tree.map(joined, found)


def chunks(rows: int, length: int, vocab_size: int, limit: int) -> int:
  """How many chunks tokens (rows, length) are read in, on the mesh there is.

  Args:
    rows: B, of all devices.
    length: L; a chunk has at least one token of each row.
    vocab_size: V.
    limit: bytes of a chunk's logits on a device, in float32.
  """
  on_device = rows * length * vocab_size * 4 / _parts()
  wanted = min(max(math.ceil(on_device / limit), 1), length)
  # As many as there are of the size that this asks for.
  return -(-length // -(-length // wanted))


def _parts() -> int:
  """How many parts the rows of a batch are split into."""
  (axes,) = nn.logical_to_mesh_axes(("batch",)) or (None,)
  names = (axes,) if isinstance(axes, str) else axes or ()
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes.get(name, 1) for name in names)


def _scan(function: Callable[..., Any]) -> Callable[..., Any]:
  """A function of a module and of chunks, one after the other."""

  def of_chunk(module, carry, chunk):
    return carry, function(module, *chunk)

  scanned: Any = nn.scan(
    of_chunk,
    variable_broadcast="params",
    split_rngs={"params": False, "dropout": True},
  )
  return lambda module, *chunks: scanned(module, None, chunks)[1]


def _forward(told: Callable[..., Any]) -> Callable[..., Any]:
  """What is told, and what the backward pass needs."""

  def with_slopes(module, hidden, read):
    found, vjp = nn.vjp(
      lambda module, hidden: told(module, hidden, read),
      module,
      hidden,
      vjp_variables=(),
    )
    leaves, structure = jax.tree.flatten(found)
    slopes = []
    for i, leaf in enumerate(leaves):
      if jnp.issubdtype(leaf.dtype, jnp.floating):
        ones = [_cotangent(x, i == j) for j, x in enumerate(leaves)]
        slopes.append(vjp(structure.unflatten(ones))[1])
      else:
        slopes.append(None)
    return found, slopes

  def forward(module, hidden, read):
    found, slopes = _scan(with_slopes)(module, hidden, read)
    # Nothing of it is run but what a gradient is asked of.
    # In a scan, XLA cannot undo it by sharing what is computed twice.
    again = _scan(nn.remat(told, prevent_cse=False))
    _, vjp = nn.vjp(again, module, hidden, read)
    return found, (slopes, vjp)

  return forward


def _cotangent(x: jax.Array, one: bool) -> Any:
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return np.zeros(x.shape, jax.dtypes.float0)
  return jnp.full(x.shape, float(one), x.dtype)


def _backward(residuals: Any, found_t: Any) -> tuple[Any, ...]:
  slopes, vjp = residuals
  params_t, hidden_t, read_t = vjp(found_t)
  terms = [
    x_t[..., None] * slope.astype(x_t.dtype)
    for x_t, slope in zip(jax.tree.leaves(found_t), slopes)
    if slope is not None
  ]
  return params_t, sum(terms).astype(hidden_t.dtype), read_t
