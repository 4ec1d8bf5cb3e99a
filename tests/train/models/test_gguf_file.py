"""GGUF files: configuration, names, the order of rows, lazy reading, errors.

The files are written here by the `gguf` package, from Hugging Face's form by
the definitions in llama.cpp's converter, element by element.
"""

import math
import random
import tracemalloc

import gguf
from gguf import quants
import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from train.errors import UsageError
from train.models.decoder import config as decoder_config
from train.models.decoder import rope
from train.models.io import gguf_file, weights

WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 64, 4, 2, 16, 96, 10
TYPES = gguf.GGMLQuantizationType
METADATA = {
  "block_count": 2,
  "context_length": 128,
  "embedding_length": WIDTH,
  "feed_forward_length": INNER,
  "attention.head_count": HEADS,
  "attention.head_count_kv": KV_HEADS,
  "attention.layer_norm_rms_epsilon": 1e-5,
  "rope.freq_base": 50000.0,
}
LAYER = {
  "self_attn.q_proj": ("attn_q", (HEADS * HEAD_DIM, WIDTH)),
  "self_attn.k_proj": ("attn_k", (KV_HEADS * HEAD_DIM, WIDTH)),
  "self_attn.v_proj": ("attn_v", (KV_HEADS * HEAD_DIM, WIDTH)),
  "self_attn.o_proj": ("attn_output", (WIDTH, HEADS * HEAD_DIM)),
  "mlp.gate_proj": ("ffn_gate", (INNER, WIDTH)),
  "mlp.up_proj": ("ffn_up", (INNER, WIDTH)),
  "mlp.down_proj": ("ffn_down", (WIDTH, INNER)),
  "input_layernorm": ("attn_norm", (WIDTH,)),
  "post_attention_layernorm": ("ffn_norm", (WIDTH,)),
}


def _model(architecture, tied=True):
  """Hugging Face's name -> (GGUF's name, values), of a tiny model."""
  rng = np.random.default_rng(0)

  def values(*shape):
    return rng.normal(size=shape).astype(np.float32)

  model = {
    "model.embed_tokens.weight": ("token_embd.weight", values(VOCAB, WIDTH)),
    "model.norm.weight": ("output_norm.weight", values(WIDTH)),
  }
  if not tied:
    model["lm_head.weight"] = ("output.weight", values(VOCAB, WIDTH))
  for layer in range(METADATA["block_count"]):
    for theirs, (ours, shape) in LAYER.items():
      name, stored = f"model.layers.{layer}.{theirs}", f"blk.{layer}.{ours}"
      model[f"{name}.weight"] = (f"{stored}.weight", values(*shape))
      if architecture == "qwen2" and ours in ("attn_q", "attn_k", "attn_v"):
        model[f"{name}.bias"] = (f"{stored}.bias", values(shape[0]))
  return model


def _stored_rows(architecture, name, value):
  """The rows as llama.cpp has them: halves of a head become neighbours."""
  if architecture != "llama" or not name.endswith(
    ("q_proj.weight", "k_proj.weight")
  ):
    return value
  stored, half = np.empty_like(value), HEAD_DIM // 2
  for head in range(len(value) // HEAD_DIM):
    for i in range(half):
      start = head * HEAD_DIM
      stored[start + 2 * i] = value[start + i]
      stored[start + 2 * i + 1] = value[start + half + i]
  return stored


def _add(writer, key, value):
  if isinstance(value, bool):
    writer.add_bool(key, value)
  elif isinstance(value, str):
    writer.add_string(key, value)
  elif isinstance(value, float):
    writer.add_float32(key, value)
  else:
    writer.add_uint32(key, value)


def _write(
  path,
  architecture="llama",
  kind=TYPES.F32,
  tied=True,
  metadata=None,
  tensors=None,
  without=(),
  endianess=gguf.GGUFEndian.LITTLE,
):
  """A tiny model in a GGUF file, with some things added or left out."""
  writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
  keys = {f"{architecture}.{key}": value for key, value in METADATA.items()}
  for key, value in (keys | (metadata or {})).items():
    if key not in without:
      _add(writer, key, value)
  stored = {
    ours: _stored_rows(architecture, name, value)
    for name, (ours, value) in _model(architecture, tied).items()
  }
  for name, value in (stored | (tensors or {})).items():
    if name in without:
      continue
    own = kind if value.ndim == 2 and value.dtype == np.float32 else None
    if own not in (None, TYPES.F32):
      value = quants.quantize(value, own)
    writer.add_tensor(name, value, raw_dtype=own)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture
def path(tmp_path):
  return tmp_path / "model.gguf"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
  """A whole file in 4 bits, as the models that are published."""
  folder = tmp_path_factory.mktemp("llama")
  return _write(folder / "model.gguf", kind=TYPES.Q4_1)


# What is in the file.


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize(
  "kind", [TYPES.F32, TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q4_1]
)
def test_tensors_have_hugging_faces_names_and_rows(path, architecture, kind):
  opened = gguf_file.open_gguf(_write(path, architecture, kind))
  model = _model(architecture)
  assert opened.tensors.keys() == model.keys()
  for name, (_, value) in model.items():
    tensor = opened.tensors[name]
    assert tensor.shape == value.shape and tensor.dtype == np.float32
    if value.ndim == 2 and kind != TYPES.F32:
      value = quants.dequantize(quants.quantize(value, kind), kind)
    read = tensor[(slice(None),) * value.ndim]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, value, err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_configuration_is_that_of_the_decoder(path, architecture, tied):
  opened = gguf_file.open_gguf(_write(path, architecture, tied=tied))
  assert decoder_config.DecoderConfig.from_hf(
    opened.config
  ) == decoder_config.DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_layers=2,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    intermediate_size=INNER,
    max_positions=128,
    rms_norm_eps=1e-5,
    rope_theta=50000.0,
    tied=tied,
    qkv_bias=architecture == "qwen2",
    model_type=architecture,
  )


def test_what_may_be_absent_has_llama_cpps_defaults(path):
  without = ("llama.attention.head_count_kv", "llama.rope.freq_base")
  shape = (HEADS * HEAD_DIM, WIDTH)
  keys = {f"blk.{i}.attn_k.weight": np.ones(shape, np.float32) for i in (0, 1)}
  config = gguf_file.open_gguf(
    _write(path, without=without, tensors=keys)
  ).config
  assert config["num_key_value_heads"] == HEADS
  assert config["rope_theta"] == 10000.0


def test_tokens_and_template_are_told(path, llama):
  told = {
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.chat_template": "{{ messages }}",
  }
  for file, expected in (
    (_write(path, metadata=told), (1, 2, 0, "{{ messages }}")),
    (llama, (None,) * 4),
  ):
    model = gguf_file.open_gguf(file)
    found = (model.bos_id, model.eos_id, model.pad_id, model.chat_template)
    assert found == expected
    assert model.metadata["general.architecture"] == "llama"


def _llama3_factors(factor):
  """Of Llama 3.1 (arXiv:2407.21783), pair by pair, for 8192 positions."""
  factors = []
  for i in range(0, HEAD_DIM, 2):
    wavelength = 2 * math.pi * METADATA["rope.freq_base"] ** (i / HEAD_DIM)
    if wavelength < 8192 / 4:
      factors.append(1.0)
    elif wavelength > 8192:
      factors.append(factor)
    else:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      factors.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3s_rotary_factors_are_recognised(path, factor):
  factors = _llama3_factors(factor)
  assert len(np.unique(factors)) > 2  # the transition is among them
  model = gguf_file.open_gguf(
    _write(path, tensors={"rope_freqs.weight": factors})
  )
  config = decoder_config.DecoderConfig.from_hf(model.config)
  assert config.rope_scaling == rope.Llama3(factor, 1, 4, 8192)
  assert not any("rope" in name for name in model.tensors)


def test_rotary_factors_of_one_are_no_scaling(path):
  factors = {"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}
  config = gguf_file.open_gguf(_write(path, tensors=factors)).config
  assert config["rope_scaling"] is None


@pytest.mark.parametrize(
  "factors", [np.full(HEAD_DIM // 2, 4.0), _llama3_factors(8.0)[:-1]]
)
def test_other_rotary_factors_are_refused(path, factors):
  tensors = {"rope_freqs.weight": factors.astype(np.float32)}
  with pytest.raises(weights.WeightsError, match="not those of Llama 3"):
    gguf_file.open_gguf(_write(path, tensors=tensors))


# Reading a part.

_BOUNDS = st.none() | st.integers(-130, 130)
_SLICES = st.builds(slice, _BOUNDS, _BOUNDS)


@hypothesis.given(rows=_SLICES, columns=_SLICES)
@hypothesis.settings(max_examples=60, deadline=None)
def test_a_part_is_that_part_of_the_whole(llama, rows, columns):
  tensors = gguf_file.open_gguf(llama).tensors
  for name in ("self_attn.q_proj", "mlp.down_proj"):
    tensor = tensors[f"model.layers.1.{name}.weight"]
    whole = tensor[()]
    for index in ((rows, columns), (rows,)):
      np.testing.assert_array_equal(tensor[index], whole[index])
  norm = tensors["model.norm.weight"]
  np.testing.assert_array_equal(norm[(rows,)], norm[()][rows])


def test_a_read_needs_little_more_memory_than_what_it_returns(path):
  # Long enough to be dequantised in several goes.
  rng = np.random.default_rng(0)
  big = rng.normal(size=(2**17, WIDTH)).astype(np.float32)
  _write(path, kind=TYPES.Q8_0, tensors={"token_embd.weight": big})
  tensor = gguf_file.open_gguf(path).tensors["model.embed_tokens.weight"]

  def peak(rows):
    tracemalloc.reset_peak()
    read = tensor[rows, slice(None)]
    return tracemalloc.get_traced_memory()[1], read

  tracemalloc.start()
  try:
    for rows in (slice(64), slice(2**16, 2**16 + 64)):
      assert peak(rows)[0] < big.nbytes / 16
    # `gguf` by itself holds all it returns twice.
    whole, read = peak(slice(None))
    assert whole < 1.75 * big.nbytes
  finally:
    tracemalloc.stop()
  expected = quants.quantize(big, TYPES.Q8_0)
  np.testing.assert_array_equal(read, quants.dequantize(expected, TYPES.Q8_0))


def test_what_is_read_is_the_readers_own(llama):
  tensor = gguf_file.open_gguf(llama).tensors["model.norm.weight"]
  before = tensor[()].copy()
  tensor[()][:] = 0.0
  np.testing.assert_array_equal(tensor[()], before)


@pytest.mark.parametrize(
  ("index", "message"),
  [
    ((slice(None),) * 3, r"takes 2 slices, got 3"),
    ((slice(None, None, 2),), r"must have step 1, got .*2\)"),
    ((slice(None), slice(None, None, -1)), r"must have step 1"),
  ],
)
def test_a_bad_index_is_named(llama, index, message):
  tensor = gguf_file.open_gguf(llama).tensors["model.embed_tokens.weight"]
  with pytest.raises(IndexError, match=message):
    tensor[index]


# Files that are refused.


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\3\4", b"\x80\x04pickle"])
def test_another_kind_of_file_is_named(path, content):
  path.write_bytes(content)
  with pytest.raises(weights.WeightsError, match="is not a GGUF file"):
    gguf_file.open_gguf(path)


def test_a_missing_file_is_named(tmp_path):
  for absent, told in {
    tmp_path: "is a folder; it must be a file",
    tmp_path / "none.gguf": "is not there",
  }.items():
    with pytest.raises(UsageError, match=told):
      gguf_file.open_gguf(str(absent))


def test_a_file_cut_short_anywhere_is_named(path, llama):
  whole = llama.read_bytes()
  # The last tensor is padded to the alignment; a byte of it must go.
  for length in np.linspace(4, len(whole) - 65, 40).astype(int):
    path.write_bytes(whole[:length])
    with pytest.raises(weights.WeightsError, match=rf"at its {length} bytes"):
      gguf_file.open_gguf(path)


def test_a_garbled_file_is_refused_or_read(path, llama):
  whole = llama.read_bytes()
  header = whole.index(b"blk.1.ffn_norm.weight")
  draw = random.Random(0)
  refused = 0
  for _ in range(80):
    garbled = bytearray(whole)
    garbled[draw.randrange(4, header)] = draw.randrange(256)
    path.write_bytes(garbled)
    try:
      gguf_file.open_gguf(path)
    except weights.WeightsError:
      refused += 1
  assert refused > 40


def test_a_missing_tensor_or_key_is_named_with_the_others(path):
  without = (
    "llama.block_count",
    "llama.attention.layer_norm_rms_epsilon",
    "output_norm.weight",
  )
  with pytest.raises(weights.WeightsError, match=f"lacks {', '.join(without)}"):
    gguf_file.open_gguf(_write(path, without=without))


@pytest.mark.parametrize(
  ("metadata", "message"),
  [
    ({"llama.rope.scaling.type": "yarn"}, "'none' or absent.*got 'yarn'"),
    ({"llama.attention.sliding_window": 64}, "sliding_window must be 0 or"),
    ({"llama.attention.causal": False}, "causal must be True or absent"),
    ({"llama.rope.dimension_count": 8}, "dimension_count must be 16.*got 8"),
    ({"llama.attention.value_length": 8}, "value_length must be 16"),
    ({"llama.attention.key_length": 15}, "a head must be even, got 15"),
    ({"llama.attention.head_count": 0}, "heads must be a positive integer"),
    ({"llama.block_count": "two"}, "positive integer, got 'two'"),
    ({"llama.rope.freq_base": "10000"}, "freq_base must be a number"),
    ({"llama.attention.head_count": 2}, "k.weight has 32 rows, expected 64"),
    ({"split.count": 3}, "one of 3 parts of a model"),
  ],
)
def test_what_is_not_implemented_is_named(path, metadata, message):
  with pytest.raises(weights.WeightsError, match=message) as caught:
    gguf_file.open_gguf(_write(path, metadata=metadata))
  assert str(caught.value).startswith(str(path))


def test_another_architecture_is_named(path):
  with pytest.raises(
    weights.WeightsError, match="'llama' or 'qwen2', got 'gem"
  ):
    gguf_file.open_gguf(_write(path, "gemma"))


def test_tensors_without_a_place_are_named_together(path):
  odd = ("blk.0.ffn_gate_inp.weight", "blk.0.attn_q.scale", "cls.weight")
  tensors = {name: np.ones((4, 4), np.float32) for name in odd}
  with pytest.raises(weights.WeightsError) as caught:
    gguf_file.open_gguf(_write(path, tensors=tensors))
  for name in odd:
    assert f"{name} has no place in it" in str(caught.value)


def test_types_that_are_not_weights_are_named(path):
  tensors = {"output_norm.weight": np.ones(WIDTH, np.int32)}
  message = r"cannot dequantise: output_norm\.weight \(I32\)"
  with pytest.raises(weights.WeightsError, match=message):
    gguf_file.open_gguf(_write(path, tensors=tensors))


def test_the_other_byte_order_is_named(path):
  _write(path, endianess=gguf.GGUFEndian.BIG)
  with pytest.raises(weights.WeightsError, match="the other byte order"):
    gguf_file.open_gguf(path)
