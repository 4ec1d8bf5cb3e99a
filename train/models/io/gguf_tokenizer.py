"""Reads a byte-level BPE tokenizer from a GGUF file's metadata."""

from typing import Any

import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from . import gguf_file, weights

# The pattern that cuts a text into words, from the tokenizer.json of Llama 3
# and of Qwen2. The two differ only in how they group digits.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE = ("smollm", "llama-bpe", "qwen2")
_KEYS = ("pre", "tokens", "token_type", "merges")
# Values of tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


def tokenizer(model: gguf_file.GgufModel) -> tokenizers.Tokenizer:
  """Returns the tokenizer that the model was trained with.

  A control token such as '<|im_start|>' is one token anywhere in a text, and
  `decode` leaves it out. `decode` keeps user-defined tokens. Bytes that the
  vocabulary lacks are left out, as in Hugging Face's tokenizer; SmolLM2's
  vocabulary lacks six control characters.

  Args:
    model: from `gguf_file.open_gguf`.

  Returns:
    A tokenizer without truncation and padding. It adds the model's first and
    last tokens to a text if the file says so.

  Raises:
    WeightsError: the file has no tokenizer or a broken one, or its tokenizer is
      not byte-level BPE or has unknown rules for words.
  """
  metadata = {
    key.removeprefix("tokenizer.ggml."): value
    for key, value in model.metadata.items()
    if key.startswith("tokenizer.ggml.")
  }
  try:
    return _build(metadata, model)
  except weights.WeightsError as error:
    raise weights.WeightsError(f"{model.path}: {error}") from None


def _build(
  metadata: dict[str, Any], model: gguf_file.GgufModel
) -> tokenizers.Tokenizer:
  if metadata.get("model") != "gpt2":
    raise weights.WeightsError(
      "tokenizer.ggml.model must be 'gpt2', byte-level BPE, got "
      f"{metadata.get('model')!r}."
    )
  missing = [f"tokenizer.ggml.{key}" for key in _KEYS if key not in metadata]
  if missing:
    raise weights.WeightsError(f"it lacks {', '.join(missing)}.")
  pre, tokens, types, merges = (metadata[key] for key in _KEYS)
  if pre not in _PRE:
    raise weights.WeightsError(
      f"tokenizer.ggml.pre must be one of {', '.join(_PRE)}, got {pre!r}."
    )
  if len(types) != len(tokens) or len(tokens) > model.config["vocab_size"]:
    raise weights.WeightsError(
      f"it has {len(tokens)} tokens, {len(types)} types of tokens and "
      f"{model.config['vocab_size']} embeddings; the first two must be as many "
      "and the last no fewer."
    )
  vocabulary = {
    token: i
    for i, (token, kind) in enumerate(zip(tokens, types))
    if kind != _UNUSED
  }
  with weights.told_of("its tokens and merges are not a BPE tokenizer"):
    built = tokenizers.Tokenizer(
      models.BPE(
        vocabulary,
        [_pair(merge) for merge in merges],
        # In Llama 3, a word that is a token needs no merges.
        ignore_merges=pre == "llama-bpe",
      )
    )
  if pre == "qwen2":
    built.normalizer = normalizers.NFC()
  built.pre_tokenizer = _pre_tokenizer(pre)
  built.decoder = decoders.ByteLevel()
  built.add_tokens(
    [
      tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
      for token, kind in zip(tokens, types)
      if kind in (_CONTROL, _USER_DEFINED)
    ]
  )
  # Llama 3 begins every text with a token, though older files do not say so.
  begin = _ends(metadata, "bos", pre == "llama-bpe")
  end = _ends(metadata, "eos", False)
  if begin or end:
    single = [*begin, "$A", *end]
    second = [f"{part}:1" for part in (*begin, "$B", *end)]
    built.post_processor = processors.TemplateProcessing(
      single=single,
      pair=single + second,
      special_tokens=list((begin | end).items()),
    )
  return built


def _pair(merge: str) -> tuple[str, str]:
  left, right = merge.split(" ")
  return left, right


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
  if pre == "smollm":
    # Single digits first, then GPT-2's words.
    return pre_tokenizers.Sequence(
      [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
    )
  words = _WORDS % (r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}")
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


def _ends(metadata: dict[str, Any], end: str, default: bool) -> dict[str, int]:
  """Returns the token that begins or ends every text, with its id, if any."""
  if not metadata.get(f"add_{end}_token", default):
    return {}
  token, tokens = metadata.get(f"{end}_token_id"), metadata["tokens"]
  if not isinstance(token, int) or not 0 <= token < len(tokens):
    raise weights.WeightsError(
      f"tokenizer.ggml.{end}_token_id must be the id of one of the "
      f"{len(tokens)} tokens, got {token!r}."
    )
  return {tokens[token]: token}
