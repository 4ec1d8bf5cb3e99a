"""A T5 as a classifier, which answers with one of a few words."""

from collections.abc import Sequence
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from .. import chunks
from ..io import tokenizer as tokenizer_
from . import model as t5


class T5LabelWords(t5.T5):
  """A T5 that computes how likely each of a few answers is.

  The encoder reads a source once. The decoder then reads all answers in one
  row, end to end without padding. Each answer is a separate segment with its
  own positions, so no answer sees another. The parameters are those of `T5`.

  Attributes:
    words: the tokens of each label's word, with the end token.
  """

  words: tuple[tuple[int, ...], ...] = ()

  def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
    self,
    tokens: jax.Array,
    mask: jax.Array,
    token_types: jax.Array | None = None,
    read: chunks.Read | None = None,
  ) -> Any:
    """Returns the logits of each word's tokens, or the results of `read`.

    The logits of a token depend on the tokens before it in its word.

    Args:
      tokens: the sources, int (B, S), padded at the end.
      mask: 1 at a real token, 0 at padding, (B, S).
      token_types: ignored; only encoders have them.
      read: what to compute from the logits of each token; its arrays are
        (B, M, *). None: the logits are returned.

    Returns:
      float32 (B, M, V), for the M tokens of all words, end to end; or the
      results of `read`, arrays (B, M), see `chunks.read`.
    """
    del token_types
    inputs, positions, segments = _row(self.words, self.config.pad_id)
    source_BxSxD = self.encode(tokens, mask)
    x_BxMxD = self.hidden(
      jnp.broadcast_to(inputs, (len(tokens), len(inputs))),
      source_BxSxD,
      mask,
      positions,
      segments,
    )
    return chunks.read(self, x_BxMxD, read)

  def features(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    token_types: jax.Array | None = None,
    read: chunks.Read | None = None,
  ) -> jax.Array:
    """Returns the mean of the encoder's hidden states, float32 (B, D).

    The mean is over the real tokens.
    """
    del token_types, read
    x_BxSxD = self.encode(tokens, mask).astype(jnp.float32)
    mask_BxSx1 = mask.astype(jnp.float32)[..., None]
    return (x_BxSxD * mask_BxSx1).sum(1) / jnp.maximum(mask_BxSx1.sum(1), 1.0)


def tokens(
  tokenizer: tokenizers.Tokenizer, words: Sequence[str], eos_id: int
) -> tuple[tuple[int, ...], ...]:
  """Returns the tokens of each word as a separate text, with the end token.

  Raises:
    ValueError: if two words have the same tokens, or a word has none.
  """
  by_tokens: dict[tuple[int, ...], str] = {}
  for word in words:
    with tokenizer_.refusing():
      encoded = tokenizer.encode(word, add_special_tokens=False)
    if not encoded.ids:
      raise ValueError(f"The label {word!r} has no tokens in this vocabulary.")
    ids = (*encoded.ids, eos_id)
    if ids in by_tokens:
      raise ValueError(
        f"The labels {by_tokens[ids]!r} and {word!r} have the same tokens, "
        f"{encoded.tokens}; they cannot be told apart."
      )
    by_tokens[ids] = word
  return tuple(by_tokens)


def _row(
  words: Sequence[Sequence[int]], start: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the decoder's inputs, their positions and their words, all (M,)."""
  lengths = [len(word) for word in words]
  inputs = [(start, *word[:-1]) for word in words]
  return (
    np.fromiter(itertools.chain(*inputs), np.int32),
    np.concatenate([np.arange(length) for length in lengths]),
    np.repeat(np.arange(len(words)), lengths),
  )
