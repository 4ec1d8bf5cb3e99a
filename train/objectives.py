"""What is learned from a batch: labels of texts, or the tokens that follow."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Batch = Mapping[str, Any]


class Items(NamedTuple):
  """What a loss is a mean of: rows, or tokens; arrays of one shape.

  Attributes:
    losses: cross-entropies in nats, float32.
    weights: of each in the mean, float32; 0 leaves it out.
    predictions: the likeliest labels or tokens, int32.
    right: 1 where they are the right ones, float32.
  """

  losses: jax.Array
  weights: jax.Array
  predictions: jax.Array
  right: jax.Array


class Objective(NamedTuple):
  """How a batch goes into a model, and what comes out is judged.

  Attributes:
    inputs: from a batch to the arguments of the model.
    items: from the logits and the batch to the items of the loss.
    weights: the items' weights, from the batch alone.
    tokens: of a batch that are not padding, int32 scalar.
  """

  inputs: Callable[[Batch], tuple[Any, ...]]
  items: Callable[[jax.Array, Batch], Items]
  weights: Callable[[Batch], jax.Array]
  tokens: Callable[[Batch], jax.Array]


def _items(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> Items:
  logits = logits.astype(jnp.float32)
  predictions = jnp.argmax(logits, -1)
  return Items(
    losses=optax.softmax_cross_entropy_with_integer_labels(logits, targets),
    weights=weights,
    predictions=predictions,
    right=(predictions == targets).astype(jnp.float32),
  )


def _rows(batch: Batch) -> jax.Array:
  return jnp.ones(batch["labels"].shape, jnp.float32)


CLASSIFICATION = Objective(
  inputs=lambda batch: (batch["tokens"], batch["mask"], batch["token_types"]),
  items=lambda logits, batch: _items(logits, batch["labels"], _rows(batch)),
  weights=_rows,
  tokens=lambda batch: jnp.sum(batch["mask"]),
)
"""One label a row, (B,); logits are (B, classes)."""

NEXT_TOKEN = Objective(
  inputs=lambda batch: (
    batch["tokens"],
    batch["positions"],
    batch["segment_ids"],
  ),
  items=lambda logits, batch: _items(
    logits, batch["targets"], batch["weights"]
  ),
  weights=lambda batch: batch["weights"],
  tokens=lambda batch: jnp.sum(batch["segment_ids"] > 0),
)
"""The token after each, where it has a weight, (B, L); logits (B, L, V)."""
