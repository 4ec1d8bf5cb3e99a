"""Loads a model folder's tokenizer from tokenizer.json or vocabulary files."""

from collections.abc import Callable
import pathlib
from typing import Any

import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from ... import checked
from ...errors import UsageError
from . import spiece, tokenizer, weights

_CONFIG, _ADDED = "tokenizer_config.json", "added_tokens.json"
_WORD_PIECE = "vocab.txt"
_BYTES = ("vocab.json", "merges.txt")
# Beginning, end, padding, unknown, mask.
_BERTS = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")
_GPT2: tuple[str, ...] = ("<|endoftext|>",)
_ROBERTAS = ("<s>", "</s>", "<pad>", "<unk>", "<mask>")


def load_tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """Returns the tokenizer of a model folder, without truncation and padding.

  If there is no tokenizer.json, the tokenizer is built from the files of older
  folders. A vocab.txt is BERT's WordPiece. A vocab.json with a merges.txt is
  the byte-level BPE of a RoBERTa, a DeBERTa or a GPT-2. The names of
  SentencePiece files say which model they belong to.

  Raises:
    WeightsError: there are no such files, or they cannot be read.
  """
  folder = pathlib.Path(folder)
  try:
    if not checked.is_file(folder / tokenizer.FILE):
      for names, read in _READERS.items():
        if all(checked.is_file(folder / name) for name in names):
          found = read(folder)
          _add_tokens(found, folder)
          return found
    return tokenizer.load_tokenizer(folder)
  except UsageError as error:
    raise weights.WeightsError(str(error)) from error


def _word_piece(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """Builds BERT's tokenizer, as transformers' tokenization_bert.py does."""
  path, config = folder / _WORD_PIECE, _config(folder)
  words = checked.read_text(path).split("\n")
  ids = {word.rstrip("\r"): i for i, word in enumerate(words) if word}
  cls, sep, _, unknown, _ = _require(ids, (_BERTS,), path)
  with weights.told_of(f"{path} is no vocabulary that `tokenizers` can read"):
    found = tokenizers.Tokenizer(models.WordPiece(ids, unk_token=unknown))
    found.normalizer = normalizers.BertNormalizer(
      lowercase=checked.truth(config, "do_lower_case", True),
      handle_chinese_chars=checked.truth(
        config, "tokenize_chinese_chars", True
      ),
      # None: the same as lowercase.
      strip_accents=checked.field(
        str(folder / _CONFIG), config, "strip_accents", bool | None, None
      ),
    )
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    found.add_special_tokens([x for x in _BERTS if x in ids])
    found.post_processor = processors.BertProcessing(
      (sep, ids[sep]), (cls, ids[cls])
    )
    return found


def _bytes(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """Builds GPT-2's tokenizer, or RoBERTa's or DeBERTa's.

  The last two add tokens to the beginning and end of a text.
  """
  path, merges = (folder / name for name in _BYTES)
  ids = weights.read_json(path)
  is_gpt2 = _is_gpt2(folder)
  special = _GPT2 if is_gpt2 else _require(ids, (_BERTS, _ROBERTAS), path)
  with_space = checked.truth(_config(folder), "add_prefix_space", False)
  with weights.told_of(f"{path} and {merges} are no BPE to `tokenizers`"):
    bpe = models.BPE.from_file(str(path), str(merges))
    found = tokenizers.Tokenizer(bpe)
    found.pre_tokenizer = pre_tokenizers.ByteLevel(with_space)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([x for x in special if x in ids])
    if is_gpt2:
      return found
    cls, sep, *_ = special
    found.post_processor = processors.TemplateProcessing(
      single=f"{cls} $A {sep}",
      pair=f"{cls} $A {sep} {sep} $B {sep}",
      special_tokens=[(token, ids[token]) for token in (cls, sep)],
    )
    return found


def _is_gpt2(folder: pathlib.Path) -> bool:
  """Whether config.json says GPT-2; other models share its files' names."""
  path = folder / "config.json"
  return (
    checked.is_file(path)
    and weights.read_json(path).get("model_type") == "gpt2"
  )


_READERS: dict[
  tuple[str, ...], Callable[[pathlib.Path], tokenizers.Tokenizer]
] = {
  (spiece.FILE,): spiece.load_tokenizer,
  (spiece.XLM_R,): spiece.load_xlm_r,
  (spiece.DEBERTA,): spiece.load_deberta,
  (spiece.LLAMA,): spiece.load_llama,
  (_WORD_PIECE,): _word_piece,
  _BYTES: _bytes,
}
"""From files to the function that reads them; the first complete entry wins."""

FILES = (*(name for names in _READERS for name in names), _ADDED)
"""All files that can replace a tokenizer.json."""


def _require(
  ids: dict[str, Any],
  kinds: tuple[tuple[str, ...], ...],
  path: pathlib.Path,
) -> tuple[str, ...]:
  """Returns the first kind of special tokens that the vocabulary has."""
  for kind in kinds:
    if all(token in ids for token in kind[:4]):
      return kind
  wanted = " nor ".join(", ".join(kind[:4]) for kind in kinds)
  raise weights.WeightsError(
    f"{path} has not the tokens {wanted}, by which a text begins and ends; put "
    f"a {tokenizer.FILE} beside it."
  )


def _add_tokens(found: tokenizers.Tokenizer, folder: pathlib.Path) -> None:
  """Adds the tokens of added_tokens.json, in the order of their ids."""
  path = folder / _ADDED
  if not checked.is_file(path):
    return
  added = weights.read_json(path)
  for token in added:
    checked.field(str(path), added, token, int)
  for token, number in sorted(added.items(), key=lambda item: item[1]):
    found.add_tokens([token])
    if found.token_to_id(token) != number:
      raise weights.WeightsError(
        f"{path} gives {token!r:.100} the id {number}, and after the folder's "
        f"vocabulary it is {found.token_to_id(token)}; put a {tokenizer.FILE} "
        "beside it."
      )


def _config(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / _CONFIG
  return weights.read_json(path) if checked.is_file(path) else {}
