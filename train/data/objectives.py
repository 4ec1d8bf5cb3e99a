"""What is learned from a batch: labels of rows, or the tokens that follow."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Batch = Mapping[str, Any]

# Of ImageNet's red, green and blue, as all its models use them.
_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)


class Items(NamedTuple):
  """What a loss is a mean of: rows, or tokens; arrays of one shape.

  Attributes:
    losses: cross-entropies in nats, float32.
    weights: of each in the mean, float32; 0 leaves it out. Of a row that is a
      mean itself, of how many.
    predictions: the likeliest labels or tokens, int32.
    right: 1 where they are the right ones, float32.
  """

  losses: jax.Array
  weights: jax.Array
  predictions: jax.Array
  right: jax.Array

  def mean(self, values: jax.Array) -> jax.Array:
    """Of the items' values, by weight; 0 if nothing is to be learned."""
    total = jnp.maximum(jnp.sum(self.weights), 1)
    return jnp.sum(values * self.weights) / total


class Objective(NamedTuple):
  """How a batch goes into a model, and what comes out is judged.

  Attributes:
    inputs: from a batch to the arguments of the model.
    items: from the logits and the batch to the items of the loss.
    weights: the items' weights, from the batch alone.
    tokens: of a batch that are not padding, or its images, int32 scalar.
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


def images(side: int) -> Objective:
  """One label an image, (B,), of images (B, height, width) in uint8.

  A model is given them as `prepared` makes them.

  Args:
    side: pixels along the side that the model is given.
  """
  return CLASSIFICATION._replace(
    inputs=lambda batch: (prepared(batch["images"], side),),
    tokens=lambda batch: jnp.int32(len(batch["labels"])),
  )


def prepared(images: Any, side: int) -> jax.Array:
  """Grey images as a model of coloured photographs wants them.

  Enlarged with the bicubic filter that Pillow has too, of equal channels, each
  normalised by ImageNet's mean and standard deviation.

  Args:
    images: uint8 (B, height, width), 255 for white.
    side: S, pixels along the side.

  Returns:
    float32 (B, S, S, 3).
  """
  pixels = jnp.asarray(images, jnp.float32) / 255
  pixels = jax.image.resize(pixels, (len(pixels), side, side), "cubic")
  # The filter goes beyond black and white at edges.
  pixels = jnp.clip(pixels, 0, 1)[..., None]
  return (pixels - jnp.asarray(_MEAN)) / jnp.asarray(_DEVIATION)


def words(tokens: Sequence[Sequence[int]]) -> Objective:
  """One label a row, (B,), whose word a T5 is to say.

  What is learned is what T5 learns: the tokens of the right label's word, given
  those before it, over the whole vocabulary. The loss of a batch is the mean
  over these tokens, and padding is none of them. The answer is the likeliest of
  the labels' words, by the sum of the log-probabilities of a word's tokens. As
  the one that ends it is among them, this is the probability of saying the word
  and nothing else, and words of any lengths compare.

  Args:
    tokens: of each label's word, with the one that ends it. Logits are
      (B, M, V), of the M tokens of all words, end to end.
  """
  targets_M = np.concatenate([np.asarray(word, np.int32) for word in tokens])
  lengths_C = np.asarray([len(word) for word in tokens])
  whose_MxC = np.repeat(np.eye(len(tokens), dtype=np.float32), lengths_C, 0)

  def lengths(batch):
    return jnp.asarray(lengths_C, jnp.float32)[batch["labels"]]

  def items(logits, batch):
    labels = batch["labels"]
    # One by one: a product may round to bfloat16 on an accelerator.
    losses_BxM = optax.softmax_cross_entropy_with_integer_labels(
      logits.astype(jnp.float32),
      jnp.broadcast_to(targets_M, logits.shape[:-1]),
    )
    losses_BxC = (losses_BxM[..., None] * whose_MxC).sum(1)
    right_B = jnp.take_along_axis(losses_BxC, labels[:, None], 1)[:, 0]
    predictions = jnp.argmin(losses_BxC, -1)
    return Items(
      losses=right_B / lengths(batch),
      weights=lengths(batch),
      predictions=predictions,
      right=(predictions == labels).astype(jnp.float32),
    )

  return CLASSIFICATION._replace(items=items, weights=lengths)


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
