"""A spiece.model as a tokenizer, for a folder without tokenizer.json."""

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

# T5's, behind the pieces: what stands for spans that are left out.
_SENTINELS = [f"<extra_id_{i}>" for i in range(99, -1, -1)]
_SPACE = "▁"
# Of the file's pieces: those that no text is made of.
_CONTROL = 3


def load_tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """The tokenizer of a T5's folder with a spiece.model.

  It gives the tokens that SentencePiece gives (Kudo and Richardson, EMNLP
  2018), and `</s>` behind a text or each of a pair. The 100 sentinels of T5
  follow the file's pieces, unless it has them.

  Raises:
    WeightsError: the packages `sentencepiece` and `protobuf` are not installed,
      or the file is missing, cannot be read, or holds another kind of model
      than Unigram.
  """
  path = pathlib.Path(folder) / FILE
  proto = _read(path)
  if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
    raise weights.WeightsError(
      f"{path} is a SentencePiece model of another kind than Unigram, T5's; "
      "put a tokenizer.json beside it."
    )
  with weights.told_of(f"{path} is no SentencePiece model for a T5"):
    return _tokenizer(proto, path)


def _tokenizer(proto: Any, path: pathlib.Path) -> tokenizers.Tokenizer:
  pieces = [(piece.piece, piece.score) for piece in proto.pieces]
  control = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
  eos = proto.trainer_spec.eos_piece
  if eos not in control:
    raise weights.WeightsError(
      f"{path} has no token {eos!r} that ends a text, which a T5 needs."
    )
  special = [*control, proto.trainer_spec.unk_piece]
  if not {piece for piece, _ in pieces}.intersection(_SENTINELS):
    pieces += [(sentinel, 0.0) for sentinel in _SENTINELS]
    special += _SENTINELS
  tokenizer = tokenizers.Tokenizer(
    models.Unigram(
      pieces,
      unk_id=proto.trainer_spec.unk_id,
      byte_fallback=proto.trainer_spec.byte_fallback,
    )
  )
  tokenizer.normalizer = _normalizer(proto.normalizer_spec)
  scheme = "always" if proto.normalizer_spec.add_dummy_prefix else "never"
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
    _SPACE, prepend_scheme=scheme, split=False
  )
  tokenizer.decoder = decoders.Metaspace(_SPACE, prepend_scheme=scheme)
  tokenizer.add_special_tokens(special)
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"$A {eos}",
    pair=f"$A {eos} $B {eos}",
    special_tokens=[(eos, tokenizer.token_to_id(eos))],
  )
  return tokenizer


def _read(path: pathlib.Path) -> Any:
  """The file's own structure."""
  try:
    # Not in the package's namespace, and made by protobuf when imported.
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
  """SentencePiece's own, in its order."""
  found: list[normalizers.Normalizer] = []
  if spec.precompiled_charsmap:
    found.append(normalizers.Precompiled(spec.precompiled_charsmap))
  if spec.remove_extra_whitespaces:
    for pattern, content in ((r"\A +| +\z", ""), (" {2,}", " ")):
      found.append(normalizers.Replace(tokenizers.Regex(pattern), content))
  return normalizers.Sequence(found)
