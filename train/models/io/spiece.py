"""Tokenizers of SentencePiece models, for folders without tokenizer.json."""

import importlib
import pathlib
from typing import Any

from google.protobuf import message
import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from ... import checked
from . import weights

FILE = "spiece.model"
XLM_R = "sentencepiece.bpe.model"
DEBERTA = "spm.model"
LLAMA = "tokenizer.model"

# The tokens that T5 adds after the pieces; they replace spans of a text.
_SENTINELS = [f"<extra_id_{i}>" for i in range(99, -1, -1)]
_SPACE = "▁"
# Types of pieces: those that may be merged, those that are not in any text, and
# those that are never cut.
_NORMAL, _CONTROL, _WHOLE = 1, 3, 4


def load_tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """Returns the tokenizer of a T5's folder with a spiece.model.

  It gives the same tokens as SentencePiece (Kudo and Richardson, EMNLP 2018),
  and adds `</s>` to each text. The 100 sentinels of T5 follow the file's
  pieces, unless the file has them.

  Raises:
    WeightsError: the packages `sentencepiece` and `protobuf` are not installed,
      or the file is missing, cannot be read, or holds a model that is not
      Unigram.
  """
  path = pathlib.Path(folder) / FILE
  proto = _unigrams(path)
  with weights.told_of(f"{path} is no SentencePiece model for a T5"):
    return _t5(proto, path)


def load_xlm_r(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """Returns the tokenizer of an XLM-R's folder with a sentencepiece.bpe.model.

  fairseq's tokens `<s>`, `<pad>`, `</s>` and `<unk>` replace the first three
  pieces of the file. The last token is `<mask>` (transformers,
  convert_slow_tokenizer.py).

  Raises:
    WeightsError: as `load_tokenizer`.
  """
  path = pathlib.Path(folder) / XLM_R
  proto = _unigrams(path)
  special = ["<s>", "<pad>", "</s>", "<unk>"]
  pieces = [(piece, 0.0) for piece in special]
  pieces += [(piece.piece, piece.score) for piece in proto.pieces[3:]]
  pieces.append(("<mask>", 0.0))
  with weights.told_of(f"{path} is no SentencePiece model for an XLM-R"):
    tokenizer = _assembled(proto, pieces, special.index("<unk>"))
    tokenizer.add_special_tokens([*special, "<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
      single="<s> $A </s>",
      pair="<s> $A </s> </s> $B </s>",
      special_tokens=[("<s>", 0), ("</s>", special.index("</s>"))],
    )
    return tokenizer


def load_deberta(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """Returns the tokenizer of a DeBERTa v2's or v3's folder with an spm.model.

  `[MASK]` follows the file's pieces, unless the file has it.

  Raises:
    WeightsError: as `load_tokenizer`, or if tokenizer_config.json has an option
      that is not implemented.
  """
  path = pathlib.Path(folder) / DEBERTA
  config = _config(path)
  if checked.truth(config, "split_by_punct", False):
    raise weights.WeightsError(
      f"{path.parent}: split_by_punct must be false where {DEBERTA} is read; "
      "put a tokenizer.json beside it."
    )
  proto = _unigrams(path)
  pieces = [(piece.piece, piece.score) for piece in proto.pieces]
  names = {piece for piece, _ in pieces}
  missing = {"[CLS]", "[SEP]"} - names
  if missing:
    raise weights.WeightsError(
      f"{path} has no token {' nor '.join(sorted(missing))}, which a DeBERTa "
      "needs."
    )
  if "[MASK]" not in names:
    pieces.append(("[MASK]", 0.0))
  with weights.told_of(f"{path} is no SentencePiece model for a DeBERTa"):
    tokenizer = _assembled(proto, pieces, proto.trainer_spec.unk_id)
    if checked.truth(config, "do_lower_case", False):
      tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), tokenizer.normalizer]
      )
    unknown = proto.trainer_spec.unk_piece
    tokenizer.add_special_tokens([*_control(proto), unknown, "[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
      single="[CLS] $A [SEP]",
      pair="[CLS] $A [SEP] $B:1 [SEP]:1",
      special_tokens=[
        (token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")
      ],
    )
    return tokenizer


def load_llama(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """Returns the tokenizer of a Llama or Mistral folder with a tokenizer.model.

  It gives the same tokens as SentencePiece's BPE, after the token that begins a
  text. Three keys of tokenizer_config.json have the meaning of transformers:
  `add_bos_token` can turn the first token off, `add_eos_token` adds an end
  token, and `legacy` adds a space after each special token.

  Raises:
    WeightsError: as `load_tokenizer`; the model must be a BPE.
  """
  path = pathlib.Path(folder) / LLAMA
  config, proto = _config(path), _read(path)
  trainer = proto.trainer_spec
  if trainer.model_type != trainer.BPE:
    raise weights.WeightsError(
      f"{path} is a SentencePiece model of another kind than BPE, which Llama "
      "and Mistral have; put a tokenizer.json beside it."
    )
  ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
  before = (
    [trainer.bos_piece] if checked.truth(config, "add_bos_token", True) else []
  )
  after = (
    [trainer.eos_piece] if checked.truth(config, "add_eos_token", False) else []
  )
  missing = {*before, *after} - {*ids}
  if missing:
    raise weights.WeightsError(
      f"{path} has no token {' nor '.join(sorted(missing))}, which begins or "
      "ends its texts."
    )
  with weights.told_of(f"{path} is no SentencePiece model for a Llama"):
    tokenizer = tokenizers.Tokenizer(
      models.BPE(
        ids,
        _merges(proto),
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
      )
    )
    normalizer, scheme = _normalizer(proto.normalizer_spec), "never"
    if proto.normalizer_spec.add_dummy_prefix:
      legacy = checked.truth(config, "legacy", False)
      scheme = "always" if legacy else "first"
      if legacy:
        # If a text begins with a space, the pre-tokenizer adds none. But
        # SentencePiece does, so this adds it.
        own = normalizers.Replace(tokenizers.Regex(r"\A "), "  ")
        normalizer = normalizers.Sequence([normalizer, own])
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
      _SPACE, prepend_scheme=scheme, split=False
    )
    tokenizer.decoder = decoders.Sequence(
      [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        *([decoders.Strip(" ", 1, 0)] if scheme != "never" else []),
      ]
    )
    tokenizer.add_special_tokens([*_control(proto), trainer.unk_piece])
    tokenizer.add_tokens(
      [
        tokenizers.AddedToken(piece.piece, normalized=False)
        for piece in proto.pieces
        if piece.type == _WHOLE
      ]
    )
    if before or after:
      single = [*before, "$A", *after]
      second = [f"{part}:1" for part in (*before, "$B", *after)]
      tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=single + second,
        special_tokens=[(token, ids[token]) for token in {*before, *after}],
      )
    return tokenizer


def _merges(proto: Any) -> list[tuple[str, str]]:
  """Returns all pairs that merge to a piece, those of the best pieces first."""
  found = {
    piece.piece: (-piece.score, i)
    for i, piece in enumerate(proto.pieces)
    if piece.type == _NORMAL
  }
  ranked = [
    (rank, piece[:i], piece[i:])
    for piece, rank in found.items()
    for i in range(1, len(piece))
    if piece[:i] in found and piece[i:] in found
  ]
  return [(left, right) for _, left, right in sorted(ranked)]


def _config(path: pathlib.Path) -> dict[str, Any]:
  """Returns the tokenizer_config.json in a file's folder, if there is one."""
  beside = path.with_name("tokenizer_config.json")
  return weights.read_json(beside) if checked.is_file(beside) else {}


def _unigrams(path: pathlib.Path) -> Any:
  """Returns the structure of a file that holds a Unigram model."""
  proto = _read(path)
  if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
    raise weights.WeightsError(
      f"{path} is a SentencePiece model of another kind than Unigram, which "
      "these models have; put a tokenizer.json beside it."
    )
  return proto


def _control(proto: Any) -> list[str]:
  return [piece.piece for piece in proto.pieces if piece.type == _CONTROL]


def _t5(proto: Any, path: pathlib.Path) -> tokenizers.Tokenizer:
  pieces = [(piece.piece, piece.score) for piece in proto.pieces]
  control = _control(proto)
  eos = proto.trainer_spec.eos_piece
  if eos not in control:
    raise weights.WeightsError(
      f"{path} has no token {eos!r} that ends a text, which a T5 needs."
    )
  special = [*control, proto.trainer_spec.unk_piece]
  if not {piece for piece, _ in pieces}.intersection(_SENTINELS):
    pieces += [(sentinel, 0.0) for sentinel in _SENTINELS]
    special += _SENTINELS
  tokenizer = _assembled(proto, pieces, proto.trainer_spec.unk_id)
  tokenizer.add_special_tokens(special)
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"$A {eos}",
    pair=f"$A {eos} $B {eos}",
    special_tokens=[(eos, tokenizer.token_to_id(eos))],
  )
  return tokenizer


def _assembled(
  proto: Any, pieces: list[tuple[str, float]], unk_id: int
) -> tokenizers.Tokenizer:
  """Returns a file's tokenizer with these pieces, without special tokens."""
  tokenizer = tokenizers.Tokenizer(
    models.Unigram(
      pieces,
      unk_id=unk_id,
      byte_fallback=proto.trainer_spec.byte_fallback,
    )
  )
  tokenizer.normalizer = _normalizer(proto.normalizer_spec)
  scheme = "always" if proto.normalizer_spec.add_dummy_prefix else "never"
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
    _SPACE, prepend_scheme=scheme, split=False
  )
  tokenizer.decoder = decoders.Metaspace(_SPACE, prepend_scheme=scheme)
  return tokenizer


def _read(path: pathlib.Path) -> Any:
  """Returns the structure of a SentencePiece file."""
  try:
    # The package does not export this module, which protobuf builds on import.
    layout: Any = importlib.import_module(
      "sentencepiece.sentencepiece_model_pb2"
    )
  except ImportError as error:
    raise weights.WeightsError(
      f"{path.parent} has a {path.name} and no tokenizer.json; to read it, pip "
      f"install sentencepiece protobuf ({error}), or put a tokenizer.json "
      "beside it."
    ) from error
  proto = layout.ModelProto()
  try:
    proto.ParseFromString(checked.read_bytes(path))
  except message.DecodeError as error:
    raise weights.WeightsError(
      f"{path} is not a SentencePiece model that can be read ({error})."
    ) from error
  if not proto.pieces:
    raise weights.WeightsError(f"{path} is a SentencePiece model of no pieces.")
  return proto


def _normalizer(spec: Any) -> normalizers.Normalizer:
  """Returns SentencePiece's normalisation steps, in its order."""
  found: list[normalizers.Normalizer] = []
  if spec.precompiled_charsmap:
    found.append(normalizers.Precompiled(spec.precompiled_charsmap))
  if spec.remove_extra_whitespaces:
    for pattern, content in ((r"\A +| +\z", ""), (" {2,}", " ")):
      found.append(normalizers.Replace(tokenizers.Regex(pattern), content))
  return normalizers.Sequence(found)
