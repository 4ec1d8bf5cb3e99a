"""Writes tests/train/models/data: small encoders, and what PyTorch computes.

Run it in an environment of its own, on Python 3.11, from anywhere:

  pip install torch==2.13.0
  pip install transformers==5.24.0 sentencepiece protobuf safetensors numpy
  python tests/parity/make_encoder_references.py [NAME ...]

Each case is a folder with the config.json and model.safetensors that
transformers saves of a classifier of random weights; the files of its
tokenizer, as the family has them, trained here on a few sentences; and
reference.npz: texts, what transformers' tokenizer makes of them, padded, the
hidden states of the last layer and the logits, in float32 with eager attention.
The files are committed; CI needs no PyTorch.
"""

import json
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers
import torch
import transformers

OUT = pathlib.Path(__file__).parents[1] / "train" / "models" / "data"

_CORPUS = """\
A small model learns a little, and a large model learns a little more.
The film was warm and funny; its ending, alas, was neither.
He said that it would rain, and it did: for three days and three nights.
Nobody reads the manual until the machine has stopped.
She's seen it twice, and wouldn't see it a third time for money.
The committee met on 4 May 1987, in room 12, to talk about tea.
Read the first line, then the second line, then the line after that.
What a waste of good actors, good music and a good idea!
The tokens at the end of a row are padding, and nobody looks at them.
It is easier to be kind than to be right, but harder than it sounds.
""".splitlines()
_TEXTS: list[str | tuple[str, str]] = [
  "The film was warm and nobody looked.",
  "What a waste!",
  ("Is it  good?", "Not on Caf\u00e9 M\u00fcller."),
  "A second line, then a third:",
]

_SIZES = {
  "hidden_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "intermediate_size": 28,
  "max_position_embeddings": 48,
  # So that attention looks somewhere: at 0.02 it would be nearly uniform.
  "initializer_range": 0.25,
}
_VOCABULARY = 110
_BERTS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ROBERTAS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def _word_piece(folder: pathlib.Path) -> None:
  own = tokenizers.BertWordPieceTokenizer(lowercase=True)
  own.train_from_iterator(
    _CORPUS,
    vocab_size=_VOCABULARY,
    min_frequency=1,
    special_tokens=list(_BERTS),
    show_progress=False,
  )
  own.save_model(str(folder))


def _cased_word_piece(folder: pathlib.Path) -> None:
  _word_piece(folder)
  path = folder / "vocab.txt"
  # As of a cased checkpoint: letters of both kinds.
  words = path.read_text().splitlines()
  words += [chr(code) for code in range(ord("A"), ord("Z") + 1)]
  path.write_text("\n".join(words) + "\n")
  _write_json(folder / "tokenizer_config.json", {"do_lower_case": False})


def _bytes(folder: pathlib.Path, special: tuple[str, ...]) -> None:
  own = tokenizers.ByteLevelBPETokenizer()
  own.train_from_iterator(
    _CORPUS,
    # Beside the 256 bytes.
    vocab_size=256 + 40,
    special_tokens=list(special),
    show_progress=False,
  )
  own.save_model(str(folder))


def _sentence_piece(folder: pathlib.Path, name: str, **options: Any) -> None:
  with tempfile.TemporaryDirectory() as scratch:
    corpus = pathlib.Path(scratch) / "corpus.txt"
    corpus.write_text("\n".join(_CORPUS))
    sentencepiece.SentencePieceTrainer.train(
      input=str(corpus),
      model_prefix=str(pathlib.Path(scratch) / "own"),
      vocab_size=_VOCABULARY,
      model_type="unigram",
      # The table of the usual rule alone has 240 kB.
      normalization_rule_name="identity",
      minloglevel=2,
      **options,
    )
    shutil.copyfile(pathlib.Path(scratch) / "own.model", folder / name)


def _debertas_sentence_piece(folder: pathlib.Path) -> None:
  _sentence_piece(
    folder,
    "spm.model",
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    pad_piece="[PAD]",
    bos_piece="[CLS]",
    eos_piece="[SEP]",
    unk_piece="[UNK]",
  )


def _modern(folder: pathlib.Path) -> None:
  own = tokenizers.Tokenizer(models.BPE())
  own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  special = list(_BERTS)
  own.train_from_iterator(
    _CORPUS,
    trainers.BpeTrainer(
      vocab_size=_VOCABULARY,
      special_tokens=special,
      initial_alphabet=[],
      show_progress=False,
    ),
  )
  own.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B [SEP]",
    special_tokens=[(x, own.token_to_id(x)) for x in ("[CLS]", "[SEP]")],
  )
  own.save(str(folder / "tokenizer.json"))
  _write_json(
    folder / "tokenizer_config.json",
    {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "model_input_names": ["input_ids", "attention_mask"],
      "pad_token": "[PAD]",
      "cls_token": "[CLS]",
      "sep_token": "[SEP]",
      "unk_token": "[UNK]",
    },
  )


# Name -> what writes the files of a tokenizer, and the configuration of a
# vocabulary of that size.
_CASES = {
  "roberta": (
    lambda folder: _bytes(folder, _ROBERTAS),
    lambda size: transformers.RobertaConfig(
      **_SIZES, vocab_size=size, type_vocab_size=1
    ),
  ),
  "xlm_roberta": (
    lambda folder: _sentence_piece(folder, "sentencepiece.bpe.model"),
    lambda size: transformers.XLMRobertaConfig(
      **_SIZES, vocab_size=size, type_vocab_size=1, layer_norm_eps=1e-5
    ),
  ),
  "distilbert": (
    _word_piece,
    lambda size: transformers.DistilBertConfig(
      vocab_size=size,
      dim=24,
      n_layers=2,
      n_heads=3,
      hidden_dim=28,
      max_position_embeddings=48,
      initializer_range=0.25,
    ),
  ),
  "electra": (
    _cased_word_piece,
    lambda size: transformers.ElectraConfig(
      **_SIZES, vocab_size=size, embedding_size=12
    ),
  ),
  # All that later ones do without: absolute positions too, segments, relative
  # positions that are cut off.
  "deberta": (
    lambda folder: _bytes(folder, _BERTS),
    lambda size: transformers.DebertaConfig(
      **_SIZES,
      vocab_size=size,
      relative_attention=True,
      max_relative_positions=9,
      pos_att_type="c2p|p2c",
      type_vocab_size=2,
    ),
  ),
  "deberta_v2": (
    _debertas_sentence_piece,
    lambda size: transformers.DebertaV2Config(
      **_SIZES,
      vocab_size=size,
      relative_attention=True,
      max_relative_positions=-1,
      position_biased_input=False,
      pos_att_type=["p2c", "c2p"],
    ),
  ),
  # As microsoft/deberta-v3-base.
  "deberta_v3": (
    _debertas_sentence_piece,
    lambda size: transformers.DebertaV2Config(
      **_SIZES,
      vocab_size=size,
      relative_attention=True,
      max_relative_positions=-1,
      position_buckets=8,
      norm_rel_ebd="layer_norm",
      share_att_key=True,
      pos_att_type="p2c|c2p",
      position_biased_input=False,
    ),
  ),
  "modernbert": (
    _modern,
    lambda size: transformers.ModernBertConfig(
      **(_SIZES | {"num_hidden_layers": 3}),
      vocab_size=size,
      local_attention=8,
      global_attn_every_n_layers=2,
      pad_token_id=0,
      bos_token_id=2,
      cls_token_id=2,
      eos_token_id=3,
      sep_token_id=3,
      classifier_pooling="mean",
    ),
  ),
}
# In these a head stands between the hidden states and the classifier.
_SEQUENCES = ("modernbert",)


def _model(name: str, config: transformers.PretrainedConfig) -> Any:
  torch.manual_seed(0)
  kind = (
    transformers.AutoModelForSequenceClassification
    if name in _SEQUENCES
    else transformers.AutoModelForTokenClassification
  )
  config.num_labels = 3
  model = kind.from_config(
    config, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  # Norms start at one and biases at zero, where a mistake would not show, and
  # so do the embeddings of padding.
  with torch.no_grad():
    for key, value in model.named_parameters():
      if value.dim() == 1:
        value += 0.3 * torch.randn_like(value)
      elif "embeddings" in key:
        value += 0.1 * torch.randn_like(value)
  return model


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n")


def _write(name: str) -> None:
  write_tokenizer, configuration = _CASES[name]
  folder = OUT / name
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  write_tokenizer(folder)
  kind = configuration(_VOCABULARY).model_type
  # Which of transformers' tokenizers it is follows from the model.
  _write_json(folder / "config.json", {"model_type": kind})
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  if list(folder.glob("*.model")):
    # For where there is no sentencepiece.
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
  config = configuration(len(tokenizer) + 3)
  model = _model(name, config)
  model.save_pretrained(folder)
  firsts, seconds = zip(
    *(x if isinstance(x, tuple) else (x, "") for x in _TEXTS)
  )
  encoded = [
    tokenizer(*((a, b) if b else (a,)), return_token_type_ids=True)
    for a, b in zip(firsts, seconds)
  ]
  batch = {
    key: torch.nn.utils.rnn.pad_sequence(
      [torch.tensor(x[key]) for x in encoded],
      batch_first=True,
      padding_value=tokenizer.pad_token_id if key == "input_ids" else 0,
    )
    for key in ("input_ids", "attention_mask", "token_type_ids")
  }
  segments = batch.pop("token_type_ids")
  if getattr(config, "type_vocab_size", 0) > 1:
    batch["token_type_ids"] = segments
  with torch.no_grad():
    hidden = model.base_model(**batch).last_hidden_state
    logits = model(**batch).logits
  np.savez_compressed(
    folder / "reference.npz",
    texts=np.array([firsts, seconds]),
    tokens=batch["input_ids"].numpy().astype(np.int32),
    mask=batch["attention_mask"].numpy().astype(np.int32),
    token_types=segments.numpy().astype(np.int32),
    hidden=hidden.numpy(),
    logits=logits.numpy(),
  )
  sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
  print(
    f"{name}: {sum(sizes.values())} bytes {sizes}, {tuple(hidden.shape)}, "
    f"hidden states of standard deviation {hidden.std():.2f}, logits of "
    f"{logits.std():.2f}"
  )
  print(f"  {tokenizer.convert_ids_to_tokens(encoded[2]['input_ids'])}")


def main() -> None:
  for name in sys.argv[1:] or _CASES:
    _write(name)


if __name__ == "__main__":
  main()
