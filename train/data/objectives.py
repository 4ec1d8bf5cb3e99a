"""What is learned from a batch: labels of rows, or the tokens that follow."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..models import chunks

Batch = Mapping[str, Any]

"""Of ImageNet's red, green and blue, as all its models use them."""


class Items(NamedTuple):
  """What a loss is a mean of: rows, or tokens; arrays of one shape.

  Attributes:
    losses: cross-entropies in nats, or squared errors, float32.
    weights: of each in the mean, float32; 0 leaves it out. Of a row that is a
      mean itself, of how many.
    predictions: the likeliest labels or tokens, int32; or values, float32.
    right: 1 where they are the right ones, float32; NaN of values.
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
    inputs: from a batch to the arguments of the model; the last may be what
      the model is to read from its logits, see `models.chunks`.
    items: from what the model returns and the batch to the items of the loss.
    weights: the items' weights, from the batch alone.
    tokens: of a batch that are not padding, or its images, int32 scalar.
    answers: from what the model returns to what is told of a row: the
      probabilities of the labels, float32 (B, labels), or its value, (B,); of
      conversations, the likeliest tokens, int32 (B, L).
    of_classes: whether a model returns the logits of a row's classes,
      (B, classes).
  """

  inputs: Callable[[Batch], tuple[Any, ...]]
  items: Callable[[Any, Batch], Items]
  weights: Callable[[Batch], jax.Array]
  tokens: Callable[[Batch], jax.Array]
  answers: Callable[[Any], jax.Array]
  of_classes: bool = False


class Told(NamedTuple):
  """What a loss needs of logits (..., V); arrays (...).

  Attributes:
    losses: cross-entropies of the targets in nats, float32.
    predictions: the likeliest labels or tokens, int32.
  """

  losses: jax.Array
  predictions: jax.Array


def _losses(targets: jax.Array, logits: jax.Array) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), targets
  )


def _told(targets: jax.Array, logits: jax.Array) -> Told:
  return Told(_losses(targets, logits), jnp.argmax(logits, -1))


def _items(told: Told, targets: jax.Array, weights: jax.Array) -> Items:
  return Items(
    losses=told.losses,
    weights=weights,
    predictions=told.predictions,
    right=(told.predictions == targets).astype(jnp.float32),
  )


def _rows(batch: Batch) -> jax.Array:
  return jnp.ones(batch["labels"].shape, jnp.float32)


def _probabilities(logits: jax.Array) -> jax.Array:
  return jax.nn.softmax(logits.astype(jnp.float32), -1)


CLASSIFICATION = Objective(
  inputs=lambda batch: (batch["tokens"], batch["mask"], batch["token_types"]),
  items=lambda logits, batch: _items(
    _told(batch["labels"], logits), batch["labels"], _rows(batch)
  ),
  weights=_rows,
  tokens=lambda batch: jnp.sum(batch["mask"]),
  answers=_probabilities,
  of_classes=True,
)
"""One label a row, (B,); logits are (B, classes)."""


def smoothed(objective: Objective, share: float) -> Objective:
  """The objective with a share of each label spread over all classes.

  Args:
    objective: of classes.
    share: from 0 to 1. The loss is that of `optax.smooth_labels`.
  """

  def items(logits, batch):
    found = objective.items(logits, batch)
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    uniform = -jnp.mean(log_probabilities, -1)
    return found._replace(losses=(1 - share) * found.losses + share * uniform)

  return objective._replace(items=items)


def regression(centre: float, spread: float) -> Objective:
  """One value a row, (B,); what a model gives for it is (B, 1).

  The loss is the squared error of standardised values, so that one learning
  rate does for labels of any unit; predictions are in the labels' own.

  Args:
    centre: mean of the training labels.
    spread: their standard deviation.
  """

  def items(logits, batch):
    found = logits.astype(jnp.float32)[:, 0]
    predictions = answers(logits)
    return Items(
      losses=jnp.square(found - (batch["labels"] - centre) / spread),
      weights=_rows(batch),
      predictions=predictions,
      right=jnp.full(predictions.shape, jnp.nan),
    )

  def answers(logits):
    return logits.astype(jnp.float32)[:, 0] * spread + centre

  return CLASSIFICATION._replace(items=items, answers=answers, of_classes=False)


def images(
  side: int,
  objective: Objective,
  mean: Sequence[float],
  deviation: Sequence[float],
) -> Objective:
  """One label an image, (B,), of images as `images.Images` has them.

  A model is given them as `prepared` makes them.

  Args:
    side: pixels along the side that the model is given.
    objective: what is learned of them.
    mean: of the three channels, as `prepared` takes it.
    deviation: of them, likewise.
  """
  return objective._replace(
    inputs=lambda batch: (prepared(batch["images"], side, mean, deviation),),
    tokens=lambda batch: jnp.int32(len(batch["labels"])),
  )


def prepared(
  images: Any, side: int, mean: Sequence[float], deviation: Sequence[float]
) -> jax.Array:
  """Images as a model of photographs wants them.

  Resized with the bicubic filter that Pillow has too, grey ones to equal
  channels, each normalised by a mean and a standard deviation.

  Args:
    images: uint8 (B, height, width), 255 for white; or (B, height, width, 3).
    side: S, pixels along the side.
    mean: of the three channels, in [0, 1].
    deviation: of them, likewise.

  Returns:
    float32 (B, S, S, 3).
  """
  pixels = jnp.asarray(images, jnp.float32) / 255
  shape = (len(pixels), side, side, *pixels.shape[3:])
  pixels = jax.image.resize(pixels, shape, "cubic")
  # The filter goes beyond black and white at edges.
  pixels = jnp.clip(pixels, 0, 1)
  if pixels.ndim == 3:
    pixels = pixels[..., None]
  return (pixels - jnp.asarray(mean)) / jnp.asarray(deviation)


def words(tokens: Sequence[Sequence[int]]) -> Objective:
  """One label a row, (B,), whose word a T5 is to say.

  What is learned is what T5 learns: the tokens of the right label's word, given
  those before it, over the whole vocabulary. The loss of a batch is the mean
  over these tokens, and padding is none of them. The answer is the likeliest of
  the labels' words, by the sum of the log-probabilities of a word's tokens. As
  the one that ends it is among them, this is the probability of saying the word
  and nothing else, and words of any lengths compare.

  Args:
    tokens: of each label's word, with the one that ends it. A model is given
      what to read from the logits of the M tokens of all words, end to end, and
      returns their losses, (B, M).
  """
  targets_M = np.concatenate([np.asarray(word, np.int32) for word in tokens])
  lengths_C = np.asarray([len(word) for word in tokens])
  whose_MxC = np.repeat(np.eye(len(tokens), dtype=np.float32), lengths_C, 0)

  def lengths(batch):
    return jnp.asarray(lengths_C, jnp.float32)[batch["labels"]]

  def inputs(batch):
    targets_BxM = jnp.broadcast_to(
      targets_M, (len(batch["tokens"]), len(targets_M))
    )
    read = chunks.Read(_losses, targets_BxM)
    return *CLASSIFICATION.inputs(batch), read

  def of_words(losses_BxM):
    # One by one: a product may round to bfloat16 on an accelerator.
    return (losses_BxM[..., None] * whose_MxC).sum(1)

  def items(losses_BxM, batch):
    labels, losses_BxC = batch["labels"], of_words(losses_BxM)
    right_B = jnp.take_along_axis(losses_BxC, labels[:, None], 1)[:, 0]
    predictions = jnp.argmin(losses_BxC, -1)
    return Items(
      losses=right_B / lengths(batch),
      weights=lengths(batch),
      predictions=predictions,
      right=(predictions == labels).astype(jnp.float32),
    )

  return CLASSIFICATION._replace(
    inputs=inputs,
    items=items,
    weights=lengths,
    # Of the words alone, as a label is told; the vocabulary has more.
    answers=lambda losses: jax.nn.softmax(-of_words(losses), -1),
    of_classes=False,
  )


NEXT_TOKEN = Objective(
  inputs=lambda batch: (
    batch["tokens"],
    batch["positions"],
    batch["lengths"],
    chunks.Read(_told, batch["targets"]),
  ),
  items=lambda told, batch: _items(told, batch["targets"], batch["weights"]),
  weights=lambda batch: batch["weights"],
  tokens=lambda batch: jnp.sum(batch["lengths"]),
  answers=lambda told: told.predictions,
)
"""The token after each, where it has a weight, (B, L).

A model is given what to read from its logits, and returns `Told`.
"""
