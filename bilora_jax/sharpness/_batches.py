"""The mean loss of many batches, with the memory of one batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilora_jax.sharpness._space import Loss


def over(batch_loss: Callable[[Any, Any], jax.Array], batches: Any) -> Loss:
  """Returns the mean loss over batches, as a function of the parameters alone.

  Batches are computed one after the other, and again for the gradient, so that
  the memory is that of one batch.

  Args:
    batch_loss: `(params, batch)` to the loss, a scalar. If it is a mean over
      rows and all batches have as many rows, the result is the mean over rows.
    batches: a tree of arrays `[batches, ...]`.

  Returns:
    The loss, `params` to a float32 scalar.

  Raises:
    ValueError: if the arrays do not have the same number of batches, at
      least 1.

  Examples:
    >>> import jax.numpy as jnp
    >>> batches = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> loss = over(lambda w, x: jnp.mean(w * x), batches)
    >>> print(loss(jnp.float32(2.0)))
    5.0
  """
  counts = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(batches)}
  if len(counts) != 1 or 0 in counts:
    raise ValueError(
      "batches are arrays with one leading axis of the same size, at least 1; "
      f"got sizes {sorted(counts)}."
    )
  (count,) = counts
  one = jax.checkpoint(batch_loss)

  def loss(params):
    def add(total, batch):
      return total + one(params, batch).astype(jnp.float32), None

    total, _ = jax.lax.scan(add, jnp.float32(0), batches)
    return total / count

  return loss
