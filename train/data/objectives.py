"""Objectives: how a model learns labels of rows, or next tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..models import chunks

Batch = Mapping[str, Any]


class Items(NamedTuple):
  """The rows or tokens that a loss is a mean of, as arrays of one shape.

  Attributes:
    losses: cross-entropies in nats, or squared errors, float32.
    weights: the weight of each item in the mean, float32; 0 leaves an item out.
      If the loss of a row is itself a mean, its weight is the number of terms.
    predictions: the likeliest labels or tokens, int32; or values, float32.
    right: 1 where a prediction is right, else 0, float32; NaN for values.
  """

  losses: jax.Array
  weights: jax.Array
  predictions: jax.Array
  right: jax.Array

  def mean(self, values: jax.Array) -> jax.Array:
    """Returns the weighted mean of `values`; 0 if all weights are 0."""
    total = jnp.maximum(jnp.sum(self.weights), 1)
    return jnp.sum(values * self.weights) / total


class Objective(NamedTuple):
  """How a model reads a batch, and how its outputs are scored.

  Attributes:
    inputs: from a batch to the arguments of the model. The last argument may
      be a `models.chunks.Read`, which says what to compute from the logits.
    items: from the model's outputs and the batch to the items of the loss.
    weights: from the batch to the items' weights.
    tokens: from the batch to its number of tokens without padding, or of
      images, int32 scalar.
    answers: from the model's outputs to its answers: the labels' probabilities,
      float32 (B, labels); or a value for each row, (B,); or, for
      conversations, the likeliest tokens, int32 (B, L).
    of_classes: whether the model's outputs are the logits of classes,
      (B, classes).
  """

  inputs: Callable[[Batch], tuple[Any, ...]]
  items: Callable[[Any, Batch], Items]
  weights: Callable[[Batch], jax.Array]
  tokens: Callable[[Batch], jax.Array]
  answers: Callable[[Any], jax.Array]
  of_classes: bool = False


class Told(NamedTuple):
  """What a loss needs from logits (..., V), as arrays of shape (...).

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
"""Each row has one label, (B,); the model returns logits (B, classes)."""


def smoothed(objective: Objective, share: float) -> Objective:
  """Returns the objective with label smoothing, as `optax.smooth_labels`.

  Args:
    objective: an objective whose model returns the logits of classes.
    share: the share of each label that is spread over all classes, from 0 to 1.
  """

  def items(logits, batch):
    found = objective.items(logits, batch)
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    uniform = -jnp.mean(log_probabilities, -1)
    return found._replace(losses=(1 - share) * found.losses + share * uniform)

  return objective._replace(items=items)


def regression(centre: float, spread: float) -> Objective:
  """Returns the objective of a regression.

  Each row has one value, (B,), and the model returns (B, 1). The loss is the
  squared error of standardised values, so one learning rate fits labels of any
  unit. Predictions have the unit of the labels.

  Args:
    centre: the mean of the training labels.
    spread: the standard deviation of the training labels.
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
  """Returns an objective for batches of `images`: one label an image, (B,).

  The model gets the images as `prepared` returns them.

  Args:
    side: the side of the model's images, in pixels.
    objective: the objective of the labels.
    mean: the mean of each of the three channels, in [0, 1].
    deviation: the standard deviation of each channel, in [0, 1].
  """
  return objective._replace(
    inputs=lambda batch: (prepared(batch["images"], side, mean, deviation),),
    tokens=lambda batch: jnp.int32(len(batch["labels"])),
  )


def prepared(
  images: Any, side: int, mean: Sequence[float], deviation: Sequence[float]
) -> jax.Array:
  """Returns images as the inputs of a model of photographs.

  Images are resized with a bicubic filter, the same as Pillow's. A grey image
  gets three equal channels. Each channel is normalised.

  Args:
    images: uint8 (B, height, width), 255 for white; or (B, height, width, 3).
    side: S, the side of the resized images, in pixels.
    mean: the mean of each of the three channels, in [0, 1].
    deviation: the standard deviation of each channel, in [0, 1].

  Returns:
    float32 (B, S, S, 3).
  """
  pixels = jnp.asarray(images, jnp.float32) / 255
  shape = (len(pixels), side, side, *pixels.shape[3:])
  pixels = jax.image.resize(pixels, shape, "cubic")
  # At edges, the filter gives values beyond black and white.
  pixels = jnp.clip(pixels, 0, 1)
  if pixels.ndim == 3:
    pixels = pixels[..., None]
  return (pixels - jnp.asarray(mean)) / jnp.asarray(deviation)


def words(tokens: Sequence[Sequence[int]]) -> Objective:
  """Returns the objective of a T5 that answers with the word of a label.

  Each row has one label, (B,). The model learns the tokens of the right label's
  word, over the whole vocabulary, as T5 learns any text. The loss of a batch is
  the mean over these tokens.

  The answer is the likeliest of the labels' words. The log-probability of a
  word is the sum over its tokens. These include the end token, so it is the
  probability of this word and no further text, and words of different lengths
  can be compared.

  The model gets a `chunks.Read` for the M tokens of all words, end to end, and
  returns the losses of these tokens, (B, M).

  Args:
    tokens: the tokens of each label's word, with the end token.
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
    # No matrix product: an accelerator may round its inputs to bfloat16.
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
    # The probabilities are normalised over the labels' words alone.
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
"""Each token with a weight predicts the next token, (B, L).

The model gets a `chunks.Read` and returns `Told`.
"""
