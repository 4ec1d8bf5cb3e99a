"""Vocabularies without a tokenizer.json, against those who made them.

Run by `make test-parity`.
"""

import json
import pathlib

import pytest
import sentencepiece
import tokenizers
import transformers

from train.data import movie_reviews
from train.models.io import spiece, vocabulary

pytestmark = pytest.mark.filterwarnings("default")

_TEXTS = [
  "The film was warm and funny.",
  "  Two  spaces,\ta tab,\nand a line. ",
  "Caf\u00e9 M\u00fcller \uff26\uff55\uff4c\uff4c \u00bd \u4e2d\u6587 \u00c5",
  "isn't it? 1987 [MASK] <mask>",
  "",
]
_PAIRS = [("One text.", "And another."), ("", "x")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
  path.write_text("\n".join(x.sentence for x in movie_reviews.read()[:800]))
  return path


def _sentence_piece(corpus, path: pathlib.Path, **options):
  """With the usual normalisation, nmt_nfkc."""
  sentencepiece.SentencePieceTrainer.train(
    input=str(corpus),
    model_prefix=str(path.with_suffix("")),
    vocab_size=400,
    character_coverage=0.995,
    minloglevel=2,
    **options,
  )
  return sentencepiece.SentencePieceProcessor(model_file=str(path))


def _config(folder, model_type, **more):
  (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
  if more:
    (folder / "tokenizer_config.json").write_text(json.dumps(more))


def _agree(folder, texts=(*_TEXTS, *_PAIRS)):
  ours = vocabulary.load_tokenizer(folder)
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  for text in texts:
    pair = text if isinstance(text, tuple) else (text,)
    found = ours.encode(*pair)
    wanted = theirs(*pair, return_token_type_ids=True)
    assert found.ids == wanted["input_ids"], text
    assert found.type_ids == wanted["token_type_ids"], text


def test_an_xlm_r_s_model_gives_its_pieces_between_the_ends(corpus, tmp_path):
  pieces = _sentence_piece(corpus, tmp_path / spiece.XLM_R)
  ours = vocabulary.load_tokenizer(tmp_path)
  for text in _TEXTS[:3]:
    # fairseq's ids: one more than the file's, and 3 for what is unknown.
    ids = [x + 1 if x else 3 for x in pieces.encode(text)]
    assert ours.encode(text).ids == [0, *ids, 2]
  assert ours.token_to_id("<mask>") == 401
  _config(tmp_path, "xlm-roberta")
  _agree(tmp_path, ["The film was warm.", *_PAIRS])


def test_a_deberta_s_model_gives_its_pieces_between_the_ends(corpus, tmp_path):
  names = ("pad", "bos", "eos", "unk")
  special = dict(zip(names, ("[PAD]", "[CLS]", "[SEP]", "[UNK]")))
  options = {f"{name}_piece": token for name, token in special.items()}
  options |= {f"{name}_id": i for i, name in enumerate(names)}
  pieces = _sentence_piece(corpus, tmp_path / spiece.DEBERTA, **options)
  ours = vocabulary.load_tokenizer(tmp_path)
  for text in _TEXTS[:3]:
    assert ours.encode(text).ids == [1, *pieces.encode(text), 2]
  assert ours.encode("[MASK]").ids[-2] == 400
  _config(tmp_path, "deberta-v2")
  _agree(tmp_path, ["The film was warm.", *_PAIRS])


@pytest.mark.parametrize("legacy", [True, False])
def test_a_llama_s_model_gives_its_pieces(corpus, tmp_path, legacy):
  pieces = _sentence_piece(
    corpus,
    tmp_path / spiece.LLAMA,
    model_type="bpe",
    byte_fallback=True,
    split_digits=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
  )
  _config(tmp_path, "llama", legacy=legacy, add_bos_token=True)
  ours = vocabulary.load_tokenizer(tmp_path)
  rows = [x.sentence for x in movie_reviews.read()[800:1000]]
  for text in (*rows, *_TEXTS):
    # The new way takes a space that begins a text for its own.
    if legacy or not text.startswith(" "):
      assert ours.encode(text).ids == [1, *pieces.encode(text)], text
    assert ours.decode(pieces.encode(text)) == text
  if not legacy:
    _agree(tmp_path, (*_TEXTS, "<s>[INST] a [/INST] b</s><s>c"))
  _config(tmp_path, "llama", add_bos_token=False, add_eos_token=True)
  found = vocabulary.load_tokenizer(tmp_path).encode("a b")
  assert found.ids == [*pieces.encode("a b"), 2]


@pytest.mark.parametrize("lower", [True, False, None])
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "electra"])
def test_a_vocab_txt_gives_transformers_tokens(
  corpus, tmp_path, model_type, lower
):
  own = tokenizers.BertWordPieceTokenizer(lowercase=lower is not False)
  own.train([str(corpus)], vocab_size=500, show_progress=False)
  own.save_model(str(tmp_path))
  more = {} if lower is None else {"do_lower_case": lower}
  _config(tmp_path, model_type, **more)
  _agree(tmp_path)


@pytest.mark.parametrize(
  ("model_type", "special"),
  [
    ("roberta", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]),
    ("deberta", ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]),
    ("gpt2", ["<|endoftext|>"]),
  ],
)
@pytest.mark.parametrize("with_space", [True, False])
def test_a_vocab_json_and_merges_give_transformers_tokens(
  corpus, tmp_path, model_type, special, with_space
):
  own = tokenizers.ByteLevelBPETokenizer()
  own.train(
    [str(corpus)], vocab_size=600, special_tokens=special, show_progress=False
  )
  own.save_model(str(tmp_path))
  _config(tmp_path, model_type, add_prefix_space=with_space)
  _agree(tmp_path)
