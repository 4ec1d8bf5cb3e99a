"""Models of strangers: sizes, ids and dtypes that do not fit, in a sentence."""

import json
import re
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as st_numpy
import test_gguf_file

from train.models import load
from train.models.io import tokenizer as tokenizers_
from train.models.io import weights

_HUGE = 10**12


@pytest.fixture
def copied(request, tmp_path):
  """A copy of a tiny model's folder, by its fixture."""

  def copy(name):
    return shutil.copytree(request.getfixturevalue(name), tmp_path / name)

  return copy


def _edit(path, **changes):
  config = json.loads(path.read_text()) if path.is_file() else {}
  path.write_text(json.dumps(config | changes))


def _refusal(folder):
  with pytest.raises(weights.WeightsError) as caught:
    load.open_pretrained(str(folder))
  message = str(caught.value)
  assert str(folder) in message
  assert "\n" not in message
  return message


_SIZES = {
  "tiny_model": (
    *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"),
    *("num_attention_heads", "max_position_embeddings", "type_vocab_size"),
  ),
  "tiny_decoder": (
    *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
  ),
  "tiny_t5": (
    *("vocab_size", "d_model", "num_layers", "num_decoder_layers", "d_ff"),
    *("num_heads", "d_kv", "relative_attention_num_buckets"),
    "relative_attention_max_distance",
  ),
}


@pytest.mark.parametrize(
  ("model", "key"), [(model, key) for model in _SIZES for key in _SIZES[model]]
)
def test_a_size_beyond_the_tensors_is_refused_when_a_model_is_opened(
  copied, model, key
):
  folder = copied(model)
  _edit(folder / "config.json", **{key: _HUGE})
  # By itself, or in a product with another.
  assert re.search(r"\d{13}", _refusal(folder))


def test_a_model_of_a_billion_layers_is_refused_by_its_tensors(copied):
  folder = copied("tiny_decoder")
  _edit(folder / "config.json", num_hidden_layers=10**9)
  assert _refusal(folder).endswith(
    "it has 1000000000 layers, and there are 20 tensors in all."
  )


def _retyped(folder, change):
  path = folder / "model.safetensors"
  tensors = st_numpy.load_file(path)
  name = next(x for x in tensors if x.endswith("word_embeddings.weight"))
  st_numpy.save_file(tensors | {name: change(tensors[name])}, path)


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "bool"])
def test_weights_that_are_no_floats_are_refused(copied, dtype):
  folder = copied("tiny_model")
  _retyped(folder, lambda x: x.astype(dtype))
  assert f"is of {dtype}, and weights are floats" in _refusal(folder)


@pytest.mark.parametrize("dtype", ["C64", "F8_E5M2"])
def test_weights_of_a_dtype_that_is_not_read_are_refused(copied, dtype):
  folder = copied("tiny_model")
  shape = np.float32 if dtype == "C64" else np.float16
  _retyped(folder, lambda x: x.astype(shape))
  path = folder / "model.safetensors"
  blob = path.read_bytes()
  size = struct.unpack("<Q", blob[:8])[0]
  header = json.loads(blob[8 : 8 + size])
  name = next(x for x in header if x.endswith("word_embeddings.weight"))
  rows, width = header[name]["shape"]
  # As many bytes, of a dtype twice or half as wide.
  header[name] |= {
    "dtype": dtype,
    "shape": [rows, width // 2 if dtype == "C64" else width * 2],
  }
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + blob[8 + size :])
  kind = "complex64" if dtype == "C64" else dtype
  assert f"is of {kind}, and weights are floats" in _refusal(folder)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_floats_are_read(copied, dtype):
  folder = copied("tiny_model")
  _retyped(folder, lambda x: x.astype(dtype))
  load.open_pretrained(str(folder))


def test_a_tensor_that_two_shards_have_is_refused(copied):
  folder = copied("tiny_decoder")
  first, second = sorted(folder.glob("*.safetensors"))
  tensors = st_numpy.load_file(second)
  name = "model.norm.weight"
  st_numpy.save_file(tensors | {name: np.ones(16, np.float32)}, second)
  assert f"too, or by model.safetensors.index.json: {name}" in _refusal(folder)
  index = folder / "model.safetensors.index.json"
  shards = json.loads(index.read_text())["weight_map"]
  # Nor by an index that leaves it out.
  del shards[name]
  _edit(index, weight_map=shards)
  assert f"by model.safetensors.index.json: {name}" in _refusal(folder)
  assert first.is_file()


def test_a_tensor_by_two_names_is_refused(copied):
  folder = copied("tiny_model")
  path = folder / "model.safetensors"
  tensors = st_numpy.load_file(path)
  name = "embeddings.LayerNorm.weight"
  st_numpy.save_file(tensors | {f"bert.{name}": tensors[name] * 2}, path)
  message = _refusal(folder)
  assert f"bert.{name}" in message and "two names of one" in message


def _word(tokenizer):
  tokenizer["model"]["vocab"]["zebra"] = 9999


def _template(ids=0, segment=0):
  def change(tokenizer):
    sequence = {"Sequence": {"id": "A", "type_id": segment}}
    second = {"Sequence": {"id": "B", "type_id": segment}}
    token = {"SpecialToken": {"id": "[Z]", "type_id": 0}}
    tokenizer["post_processor"] = {
      "type": "TemplateProcessing",
      "single": [token, sequence],
      "pair": [token, sequence, token, second],
      "special_tokens": {"[Z]": {"id": "[Z]", "ids": [ids], "tokens": ["[Z]"]}},
    }

  return change


def _bert_post(tokenizer):
  tokenizer["post_processor"]["sep"] = ["[SEP]", 9999]


def _removed(tokenizer):
  """A word less, in place of which is one with the first id that is none."""
  vocabulary = tokenizer["model"]["vocab"]
  vocabulary["zebra"] = len(vocabulary)
  del vocabulary[max(vocabulary, key=lambda x: len(x))]


def _negative(tokenizer):
  tokenizer["model"]["vocab"]["zebra"] = -1


@pytest.mark.parametrize(
  ("change", "fault"),
  [
    (_word, "belong to different models"),
    (_removed, "gives 'zebra' the id"),
    (_template(9999), "adds a token with the id 9999 to texts"),
    (_template(0, 2), "with the segment 2 to texts, and the model's type_voc"),
    (_bert_post, "adds a token with the id 9999 to texts"),
    (_negative, "expected u32"),
  ],
)
def test_an_id_beyond_the_embedding_is_refused(copied, change, fault):
  folder = copied("tiny_model")
  path = folder / "tokenizer.json"
  tokenizer = json.loads(path.read_text())
  change(tokenizer)
  path.write_text(json.dumps(tokenizer))
  assert fault in _refusal(folder)


def test_an_added_token_is_numbered_behind_the_vocabulary(copied):
  folder = copied("tiny_t5")
  path = folder / "tokenizer.json"
  tokenizer = json.loads(path.read_text())
  tokenizer["added_tokens"][0]["content"] = "<other>"
  tokenizer["added_tokens"][0]["id"] = 9999
  path.write_text(json.dumps(tokenizer))
  # `tokenizers` numbers it itself, whatever the file says.
  found = load.open_pretrained(str(folder))
  ids = found.tokenizer.get_vocab().values()
  assert max(ids) < found.config.vocab_size


@pytest.mark.parametrize(
  ("file", "key", "value"),
  [
    ("config.json", "pad_token_id", 512),
    ("config.json", "eos_token_id", -1),
    ("config.json", "eos_token_id", [1, 99999]),
    ("config.json", "bos_token_id", 1.0),
    ("config.json", "bos_token_id", True),
    ("config.json", "eos_token_id", "1"),
    ("config.json", "mask_token_id", 99999),
    ("generation_config.json", "eos_token_id", 99999),
    ("tokenizer_config.json", "added_tokens_decoder", {"99999": {}}),
    ("tokenizer_config.json", "added_tokens_decoder", {"-1": {}}),
    ("tokenizer_config.json", "added_tokens_decoder", [3]),
  ],
)
@pytest.mark.parametrize("model", ["tiny_model", "tiny_decoder"])
def test_a_special_token_beyond_the_embedding_is_refused(
  copied, model, file, key, value
):
  folder = copied(model)
  _edit(folder / file, **{key: value})
  message = _refusal(folder)
  assert file in message and key in message


@pytest.mark.parametrize(
  "change",
  [{"pad_token_id": -1}, {"eos_token_id": [1, 2]}, {"bos_token_id": None}],
)
def test_special_tokens_as_they_are_published_are_read(copied, change):
  folder = copied("tiny_decoder")
  _edit(folder / "config.json", **change)
  load.open_pretrained(str(folder))


def test_an_embedding_may_have_more_rows_than_there_are_tokens(copied):
  folder = copied("tiny_model")
  path = folder / "model.safetensors"
  tensors = st_numpy.load_file(path)
  name = "embeddings.word_embeddings.weight"
  rows = len(tensors[name]) + 7
  tensors[name] = np.resize(tensors[name], (rows, 16))
  st_numpy.save_file(tensors, path)
  _edit(folder / "config.json", vocab_size=rows)
  assert load.open_pretrained(str(folder)).config.vocab_size == rows


def test_an_end_of_text_that_is_no_token_is_refused(copied):
  folder = copied("tiny_decoder")
  _edit(folder / "tokenizer_config.json", eos_token="<nothing>")
  assert "eos_token '<nothing>'" in _refusal(folder)


@pytest.mark.parametrize(
  ("files", "stops"),
  [
    ({"special_tokens_map.json": {"eos_token": "<|im_end|>"}}, ["<|im_end|>"]),
    (
      {"special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}}},
      ["<|im_end|>"],
    ),
    ({"config.json": {"eos_token_id": 0}}, ["<s>"]),
    (
      # As Llama 3's: the end of a text, and those of a turn and of a message.
      {
        "generation_config.json": {"eos_token_id": [1, 2]},
        "config.json": {"eos_token_id": 1},
        "tokenizer_config.json": {"eos_token": "<|im_end|>"},
      },
      ["<|im_end|>", "<|im_start|>"],
    ),
  ],
)
def test_every_file_that_names_an_end_is_read(copied, files, stops):
  folder = copied("tiny_decoder")
  _edit(folder / "tokenizer_config.json", eos_token=None)
  for name, values in files.items():
    if not (folder / name).exists():
      (folder / name).write_text("{}")
    _edit(folder / name, **values)
  found = load.open_pretrained(str(folder))
  tokens = [found.tokenizer.id_to_token(x) for x in found.stop_ids]
  assert tokens == stops
  assert found.eos_id == found.stop_ids[0]
  assert found.template.eos == stops[0]
  assert not found.notes


def test_a_model_without_an_end_of_text_is_said(copied):
  folder = copied("tiny_decoder")
  _edit(folder / "tokenizer_config.json", eos_token=None)
  found = load.open_pretrained(str(folder))
  assert found.eos_id is None and found.stop_ids == ()
  (note,) = found.notes
  assert "no token that ends a text (eos_token of tokenizer_config" in note


def test_a_pattern_without_an_end_is_a_sentence(copied, capfd):
  folder = copied("tiny_model")
  path = folder / "tokenizer.json"
  split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}}
  split |= {"behavior": "Isolated", "invert": False}
  _edit(path, pre_tokenizer=split)
  found = load.open_pretrained(str(folder)).tokenizer
  fault = r"cannot read a text \(Onig"
  for texts in (["a" * 40 + "!"], [("b", "a" * 40 + "!")]):
    with pytest.raises(weights.WeightsError, match=fault):
      tokenizers_.encode(found, texts, 100)
  with pytest.raises(weights.WeightsError, match=fault):
    tokenizers_.continuation(found, "b", "a" * 40 + "!")


@pytest.mark.parametrize("end", ["bos", "eos", "padding"])
@pytest.mark.parametrize("number", [10**6, True])
def test_a_special_token_of_a_gguf_beyond_the_embedding_is_refused(
  tmp_path, end, number
):
  key = f"tokenizer.ggml.{end}_token_id"
  path = tmp_path / "model.gguf"
  test_gguf_file._write(path, metadata={key: number})
  assert f"{key} must be a token's id" in _refusal(path)


@pytest.mark.parametrize(
  "key",
  [
    *("embedding_length", "block_count", "attention.head_count"),
    *("feed_forward_length", "attention.key_length"),
  ],
)
def test_a_size_of_a_gguf_beyond_its_tensors_is_refused(tmp_path, key):
  path = tmp_path / "model.gguf"
  factors = np.full(8, 4.0, np.float32)
  test_gguf_file._write(
    path,
    metadata={f"llama.{key}": 2**30},
    tensors={"rope_freqs.weight": factors} if "key" in key else None,
  )
  _refusal(path)


def _gguf_of(kind, count):
  key = b"general.name"
  return (
    struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
    + struct.pack("<Q", len(key))
    + key
    + struct.pack("<IIQ", 9, kind, count)
    + bytes(64)
  )


@pytest.mark.parametrize(
  "content",
  [
    _gguf_of(0, 2**40),  # numbers
    _gguf_of(8, 2**60),  # texts
    _gguf_of(9, 2**40),  # arrays
    struct.pack("<4sIQQ", b"GGUF", 3, 2**40, 0),
    struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**62),
  ],
)
def test_counts_of_a_gguf_end_with_the_file(tmp_path, content):
  path = tmp_path / "model.gguf"
  path.write_bytes(content)
  assert "is not a whole GGUF file" in _refusal(path)
