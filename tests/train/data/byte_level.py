"""A small byte-level BPE, of the kind that decoders come with."""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers


def train(
  texts: Iterable[str], special: Iterable[str] = (), merges: int = 200
) -> tokenizers.Tokenizer:
  """A tokenizer of `special`, all bytes, and merges learned from `texts`."""
  special = list(special)
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=len(special) + len(alphabet) + merges,
    initial_alphabet=alphabet,
    special_tokens=special,
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


def decode(tokenizer: tokenizers.Tokenizer, ids: Iterable[int]) -> str:
  """The text of ids, special tokens and all."""
  return tokenizer.decode(list(ids), skip_special_tokens=False)
