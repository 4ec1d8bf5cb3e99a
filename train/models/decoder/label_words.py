"""A decoder as a classifier: its answer is one of a few words."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import tokenizers

from ..io import tokenizer as tokenizers_
from . import model as decoder


class LabelWords(decoder.Decoder):
  """A decoder that is asked for the token after a prompt, of a few tokens.

  Its parameters are those of `Decoder`.

  Attributes:
    label_ids: the token that begins each label's word.
  """

  label_ids: tuple[int, ...] = ()

  def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
    self,
    tokens: jax.Array,
    mask: jax.Array,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """Logits of the labels' words, float32 (B, labels).

    Args:
      tokens: prompts, int (B, L), padded at the end.
      mask: 1 at a real token, 0 at padding, (B, L).
      token_types: not looked at; an encoder's.
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
    """The hidden state that the answer is made of, float32 (B, D)."""
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
  """The token that begins each word where it follows `after`, and a space.

  Raises:
    ValueError: if two words begin with the same token, or one has none.
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
