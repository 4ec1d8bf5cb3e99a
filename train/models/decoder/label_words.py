"""A decoder as a classifier, which answers with one of a few words."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import tokenizers

from ..io import tokenizer as tokenizers_
from . import model as decoder


class LabelWords(decoder.Decoder):
  """A decoder that chooses the token after a prompt from a few tokens.

  The parameters are those of `Decoder`.

  Attributes:
    label_ids: the first token of each label's word.
  """

  label_ids: tuple[int, ...] = ()

  def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
    self,
    tokens: jax.Array,
    mask: jax.Array,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the logits of the labels' words, float32 (B, labels).

    Args:
      tokens: the prompts, int (B, L), padded at the end.
      mask: 1 at a real token, 0 at padding, (B, L).
      token_types: ignored; only encoders have them.
    """
    del token_types
    logits_BxV = self.head(self._last(tokens, mask))
    return logits_BxV[:, jnp.asarray(self.label_ids)]

  def features(
    self,
    tokens: jax.Array,
    mask: jax.Array,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the hidden state behind the answer, float32 (B, D)."""
    del token_types
    return self._last(tokens, mask).astype(jnp.float32)

  def _last(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    lengths_Bx1 = mask.astype(jnp.int32).sum(1, keepdims=True)
    x_BxLxD = self.hidden(tokens, lengths=lengths_Bx1)
    last_B = jnp.maximum(lengths_Bx1[:, 0] - 1, 0)
    return jnp.take_along_axis(x_BxLxD, last_B[:, None, None], 1)[:, 0]


def tokens(
  tokenizer: tokenizers.Tokenizer, words: Sequence[str], after: str
) -> tuple[tuple[int, ...], ...]:
  """Returns the first token of each word, after `after` and a space.

  Raises:
    ValueError: if two words begin with the same token, or a word has no token.
  """
  by_token: dict[int, str] = {}
  for word in words:
    ids = tokenizers_.continuation(tokenizer, after, f" {word}")
    if not ids:
      raise ValueError(f"The label {word!r} has no tokens in this vocabulary.")
    first = ids[0]
    if first in by_token:
      raise ValueError(
        f"The labels {by_token[first]!r} and {word!r} begin with the same "
        f"token, {tokenizer.id_to_token(first)!r}; a decoder can tell labels "
        "apart by their first tokens only."
      )
    by_token[first] = word
  return tuple((first,) for first in by_token)
