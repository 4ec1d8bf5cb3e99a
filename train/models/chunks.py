"""What is read from the logits of each token, a chunk of tokens at a time.

Logits of a whole batch, (B, L, V) in float32, would be the largest array of a
step: 8.4 GB for 16,384 tokens of Llama 3's vocabulary.

Shapes: B batch, L length, C chunks, T tokens of a row in a chunk, D width, V
vocabulary.
"""

from collections.abc import Callable
import math
from typing import Any

from flax import linen as nn
from flax.linen import spmd
import jax
import jax.numpy as jnp
import numpy as np

Read = jax.tree_util.Partial
"""A function of arrays with an entry a token, (..., *), and of logits (..., V).

It returns arrays (...) with a number a token, each of which depends on the
logits and the entries of its own token alone.
"""

LIMIT = 2**28
"""Bytes of the logits of a chunk on a device, the models' default."""


def read(module: Any, hidden: jax.Array, read: Read | None) -> Any:
  """`read(module.head(hidden))`, without all logits at once.

  If all logits take `module.logits_bytes` or less, they are read as they are.
  If not, each chunk has the same tokens of every row, so that on a mesh each
  device keeps the rows that it has. Where a gradient is taken, the forward pass
  takes the gradient of each number by the token's hidden state, while it has
  the token's logits; the backward pass multiplies it by the cotangent. The head
  so runs as often as without chunks, as in MaxText's tiling of the vocabulary.
  Only if the head's own parameters or adapters are differentiated by does the
  backward pass compute the logits again.

  Args:
    module: a Linen module with a method `head`, from (..., D) to float32
      (..., V), and with `config.vocab_size` and `logits_bytes`.
    hidden: (B, L, D).
    read: with arrays (B, L, *). None: the logits are returned.

  Returns:
    What `read` returns, arrays (B, L).
  """
  if read is None:
    return module.head(hidden)
  batch, length, _ = hidden.shape
  count = _chunks(batch, length, module.config.vocab_size, module.logits_bytes)
  if count == 1 or module.is_initializing():
    return read(module.head(hidden))
  size = -(-length // count)

  def split(x_BxL):
    padding = [(0, 0)] * x_BxL.ndim
    padding[1] = (0, count * size - length)
    x_BxCxT = jnp.pad(x_BxL, padding).reshape(
      batch, count, size, *x_BxL.shape[2:]
    )
    return jnp.moveaxis(x_BxCxT, 1, 0)

  def joined(x_CxBxT):
    return jnp.moveaxis(x_CxBxT, 0, 1).reshape(batch, -1)[:, :length]

  in_chunks: Any = nn.custom_vjp(_scan(_read), _forward, _backward)
  found = in_chunks(module, *jax.tree.map(split, (hidden, read)))
  return jax.tree.map(joined, found)


def _chunks(batch: int, length: int, vocab_size: int, limit: int) -> int:
  """How many chunks there are; each has at least one token of each row."""
  on_device = batch * length * vocab_size * 4 / _parts()
  wanted = min(max(math.ceil(on_device / limit), 1), length)
  # As many as there are of the size that this asks for.
  return -(-length // -(-length // wanted))


def _parts() -> int:
  """How many parts the rows of a batch are split into, on the mesh there is."""
  (axes,) = spmd.logical_to_mesh_axes(("batch",)) or (None,)
  names = (axes,) if isinstance(axes, str) else axes or ()
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes.get(name, 1) for name in names)


def _scan(function: Callable[..., Any]) -> Callable[..., Any]:
  """From a function of a module and a chunk to one of a module and chunks."""

  def of_chunk(module, carry, chunk):
    return carry, function(module, *chunk)

  scanned: Any = nn.scan(
    of_chunk,
    variable_broadcast="params",
    # Adapters draw their dropout in the head.
    split_rngs={"params": False, "dropout": True},
  )
  return lambda module, *chunks: scanned(module, None, chunks)[1]


def _read(module: Any, hidden: jax.Array, read: Read) -> Any:
  return read(module.head(hidden))


def _forward(module: Any, hidden: jax.Array, read: Read) -> tuple[Any, Any]:
  """What is read, and what the backward pass needs."""
  found, slopes = _scan(_with_slopes)(module, hidden, read)
  # Of this, what no gradient is asked of is never run; in a scan, XLA cannot
  # undo the remat by sharing what is computed twice.
  again = _scan(nn.remat(_read, prevent_cse=False))
  _, vjp = nn.vjp(again, module, hidden, read)
  return found, (slopes, vjp)


def _with_slopes(module: Any, hidden: jax.Array, read: Read) -> tuple[Any, Any]:
  """What is read, and the gradient of each float, None for the others."""
  found, vjp = nn.vjp(
    lambda module, hidden: _read(module, hidden, read),
    module,
    hidden,
    vjp_variables=(),
  )
  leaves, structure = jax.tree.flatten(found)

  def slope(i):
    if not jnp.issubdtype(leaves[i].dtype, jnp.floating):
      return None
    seeds = [_seed(x, float(i == j)) for j, x in enumerate(leaves)]
    return vjp(structure.unflatten(seeds))[1]

  return found, [slope(i) for i in range(len(leaves))]


def _seed(x: jax.Array, value: float) -> Any:
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jnp.full(x.shape, value, x.dtype)
  return np.zeros(x.shape, jax.dtypes.float0)


def _backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
  slopes, vjp = residuals
  of_params, of_hidden, of_read = vjp(cotangents)
  total = jnp.zeros(of_hidden.shape, jnp.float32)
  for cotangent, slope in zip(jax.tree.leaves(cotangents), slopes):
    if slope is not None:
      total += cotangent[..., None] * slope.astype(jnp.float32)
  return of_params, total.astype(of_hidden.dtype), of_read
