"""Encoders by their model_type: parity with transformers, tokens, refusals."""

import dataclasses
import functools
import importlib.util
import json
import shutil

import encoder_cases
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as st_numpy

import bilora_jax
from train.models import load, pooling
from train.models.io import tensors, tokenizer, vocabulary, weights
from train.models.modernbert import config as modernbert

# Of float32, and hidden states of about 1.
TOLERANCE = 1e-5


@pytest.fixture(params=encoder_cases.NAMES)
def case(request):
  return encoder_cases.load_case(request.param)


def test_hidden_states_and_logits_are_transformers(case):
  hidden, logits = case.apply(*case.inputs)
  real = case.inputs[1].astype(bool)
  np.testing.assert_allclose(
    hidden[real], case.hidden[real], rtol=0, atol=TOLERANCE
  )
  wanted = case.logits
  if wanted.ndim == 3:
    wanted = np.stack([x[row].mean(0) for x, row in zip(wanted, real)])
  np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", encoder_cases.NAMES)
def test_tokens_are_those_of_transformers(name, tmp_path):
  folder = encoder_cases.DATA / name
  found = [vocabulary.load_tokenizer(folder)]
  if name in encoder_cases.SENTENCE_PIECE and importlib.util.find_spec(
    "sentencepiece"
  ):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    found.append(vocabulary.load_tokenizer(tmp_path))
  with np.load(folder / "reference.npz", allow_pickle=False) as file:
    reference = dict(file)
  texts = [(a, b) if b else a for a, b in reference["texts"].T.tolist()]
  for own in found:
    encoded = tokenizer.encode(own, texts, 48)
    for i, (ids, types) in enumerate(encoded):
      real = reference["mask"][i].astype(bool)
      np.testing.assert_array_equal(ids, reference["tokens"][i][real])
      np.testing.assert_array_equal(types, reference["token_types"][i][real])


def test_tensors_are_those_that_were_read(case):
  stored = tensors.read_all(case.pretrained.tensors)
  found = case.pretrained.tensors_of(case.model, case.variables["params"])
  assert {*found} == {*stored}
  for name, value in stored.items():
    np.testing.assert_array_equal(found[name], value)


def test_names_for_peft_are_of_all_modules_and_of_those_that_are_there(case):
  kind = case.pretrained.kind(case.model)
  assert [kind.architecture] == case.pretrained.hf_config["architectures"]
  flat = traverse_util.flatten_dict(case.variables["params"])
  # The first DeBERTa's two are of no module's weight or bias.
  apart = ("q_bias", "v_bias")
  paths = {"/".join(path) for path in flat if path[-1] not in apart}
  assert paths == {*kind.names}
  for path, module in kind.names.items():
    end = "bias" if path.endswith("/bias") else "weight"
    assert f"{module}.{end}" in case.pretrained.tensors


def test_every_axis_of_the_variables_has_a_name_or_none(case):
  axes = case.pretrained.logical_axes(case.variables)
  jax.tree.map(
    lambda x, names: np.testing.assert_equal(len(names), x.ndim),
    case.variables,
    axes,
  )
  flat = traverse_util.flatten_dict(axes["params"]["encoder"])
  # Weights of layers are split over devices along their inputs and outputs.
  for path, names in flat.items():
    assert path[-1] != "kernel" or {*names} & {"embed", "heads", "mlp"}, path


def test_a_bare_model_without_the_prefix_is_read(case, tmp_path):
  kind = case.pretrained.kind(case.model)
  _copy(case, tmp_path)
  bare = {
    name.removeprefix(kind.prefix): value
    for name, value in tensors.read_all(case.pretrained.tensors).items()
    if name.startswith(kind.prefix)
  }
  st_numpy.save_file(bare, tmp_path / "model.safetensors")
  pretrained = load.open_pretrained(str(tmp_path))
  found = pretrained.variables(pretrained.classifier(2))
  jax.tree.map(
    np.testing.assert_array_equal,
    found["params"]["encoder"],
    case.variables["params"]["encoder"],
  )


def test_padding_does_not_change_the_logits(case):
  tokens, mask, types = case.inputs
  other = np.where(mask, tokens, 7)
  assert (other != tokens).any()
  np.testing.assert_array_equal(
    case.apply(tokens, mask, types)[1], case.apply(other, mask, types)[1]
  )


def test_a_row_of_padding_alone_is_finite(case):
  tokens, mask, types = case.inputs
  mask = mask.copy()
  mask[1] = 0
  for found in case.apply(tokens, mask, types):
    assert np.isfinite(found).all()


def test_tensors_of_wrong_shapes_and_names_are_refused(case, tmp_path):
  _copy(case, tmp_path)
  own = tensors.read_all(case.pretrained.tensors)
  kind = case.pretrained.kind(case.model)
  first, second, third = sorted(
    f"{x}.weight" for key, x in kind.names.items() if "layer" in key
  )[:3]
  own[first] = own[first][:-1]
  own[second] = own[second].astype(np.int32)
  own[f"{third}.lost"] = own.pop(third)
  st_numpy.save_file(own, tmp_path / "model.safetensors")
  with pytest.raises(weights.WeightsError) as error:
    load.open_pretrained(str(tmp_path))
  for part in (
    f"{first} has shape {own[first].shape}",
    f"{second} is of int32",
    f"{third} is missing",
    f"{third}.lost has no place",
  ):
    assert part in str(error.value)


def test_projections_that_positions_share_have_their_adapters_in_both_uses():
  case = encoder_cases.load_case("deberta_v3")
  spec = bilora_jax.LoraSpec(
    rank=2, alpha=4.0, auxiliary_rank=0, targets=".*/(query|key)"
  )
  adapted = bilora_jax.adapt(case.model, spec, *case.inputs)
  shapes = jax.eval_shape(adapted.init, jax.random.key(0), case.variables)
  rng = np.random.default_rng(0)
  adapters = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes
  )
  logits = jax.jit(adapted.apply)(case.variables, adapters, *case.inputs)
  merged = adapted.merge(case.variables, adapters)
  wanted = case._replace(variables=merged).apply(*case.inputs)[1]
  np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE)
  assert np.abs(wanted - case.apply(*case.inputs)[1]).max() > 0.1


def test_a_modernbert_without_its_pretraining_s_head_pools_alone(tmp_path):
  case = encoder_cases.load_case("modernbert")
  _copy(case, tmp_path)
  own = tensors.read_all(case.pretrained.tensors)
  del own["head.dense.weight"], own["head.norm.weight"]
  st_numpy.save_file(own, tmp_path / "model.safetensors")
  _sentence_transformer(tmp_path, pooling_mode="cls")
  pretrained = load.open_pretrained(str(tmp_path))
  model = pretrained.classifier(2)
  assert (model.config.prediction, model.config.pooling) == (False, "cls")
  shapes = jax.eval_shape(model.init, jax.random.key(0), *case.inputs)
  assert set(shapes["params"]) == {"encoder", "head"}
  with pytest.raises(ValueError, match=r"has no head\.dense\.weight"):
    pretrained.kind(model)


def test_a_modernbert_of_transformers_4_is_that_of_5():
  hf = dict(encoder_cases.load_case("modernbert").pretrained.hf_config)
  new = modernbert.ModernBertConfig.from_hf(hf)
  assert [new.is_local(i) for i in range(3)] == [False, True, False]
  del hf["layer_types"], hf["rope_parameters"]
  hf |= {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
  assert modernbert.ModernBertConfig.from_hf(hf) == dataclasses.replace(
    new, local_layers=None
  )


def test_texts_longer_than_the_positions_are_refused():
  case = encoder_cases.load_case("roberta")
  # Two of 48 rows stand for padding.
  tokens = np.full((1, 47), 5)
  with pytest.raises(ValueError, match=r"at most 46 long.* got 47"):
    jax.eval_shape(case.model.apply, case.variables, tokens, tokens > 0)


_POOLING = {
  "mean": lambda x, mask: x[mask].mean(0),
  "cls": lambda x, mask: x[0],
  "max": lambda x, mask: x[mask].max(0),
}


def _sentence_transformer(folder, **config):
  modules = [
    {"type": "sentence_transformers.models.Transformer", "path": ""},
    {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
  ]
  (folder / "modules.json").write_text(json.dumps(modules))
  (folder / "1_Pooling").mkdir(exist_ok=True)
  (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("how", _POOLING)
def test_a_model_pools_as_sentence_transformers_was_told(tmp_path, how):
  case = encoder_cases.load_case("electra")
  _copy(case, tmp_path)
  key = {"cls": "cls_token"}.get(how, f"{how}_tokens")
  modes = dict.fromkeys(("cls_token", "mean_tokens", "max_tokens"), False)
  config = {f"pooling_mode_{name}": value for name, value in modes.items()}
  _sentence_transformer(tmp_path, **config | {f"pooling_mode_{key}": True})
  pretrained = load.open_pretrained(str(tmp_path))
  model = pretrained.classifier(encoder_cases.LABELS)
  features = jax.jit(functools.partial(model.apply, method="features"))
  found = features(case.variables, *case.inputs)
  for row, hidden, mask in zip(found, case.hidden, case.inputs[1]):
    wanted = _POOLING[how](hidden, mask.astype(bool))
    np.testing.assert_allclose(row, wanted, rtol=0, atol=TOLERANCE)
  if how == "max":
    with pytest.raises(ValueError, match="no classifier that pools by the max"):
      pretrained.kind(model)
  else:
    assert pretrained.kind(model).first == (how == "cls")


def test_a_row_of_padding_pools_to_zeros():
  for how in pooling.CHOICES:
    found = pooling.pooled(jnp.ones((1, 3, 2)), jnp.zeros((1, 3)), how)
    np.testing.assert_array_equal(found, np.zeros((1, 2)))


def test_a_sequence_classifier_pools_its_first_token(tmp_path):
  _copy(encoder_cases.load_case("roberta"), tmp_path)
  _edit(
    tmp_path / "config.json",
    architectures=["RobertaForSequenceClassification"],
  )
  assert load.open_pretrained(str(tmp_path)).config.pooling == "cls"


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"pooling_mode": "lasttoken"}, "one of mean, cls, max, got"),
    ({}, "one of mean, cls, max, got"),
    (
      {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
      r"one of mean, cls, max, got \['mean', 'max'\]",
    ),
  ],
)
def test_another_pooling_is_refused(tmp_path, config, message):
  _copy(encoder_cases.load_case("electra"), tmp_path)
  _sentence_transformer(tmp_path, **config)
  with pytest.raises(weights.WeightsError, match=message):
    load.open_pretrained(str(tmp_path))


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc"])
def test_a_pooling_folder_elsewhere_is_refused(tmp_path, name):
  modules = [{"type": "sentence_transformers.models.Pooling", "path": name}]
  (tmp_path / "modules.json").write_text(json.dumps(modules))
  with pytest.raises(weights.WeightsError, match="must name folders beside"):
    pooling.read(tmp_path, {})


_REFUSED = [
  ("roberta", {"pad_token_id": None}, "pad_token_id must be a token's id"),
  ("roberta", {"pad_token_id": 47}, "must be above pad_token_id"),
  ("roberta", {"is_decoder": True}, "is_decoder must be false"),
  (
    "xlm_roberta",
    {"position_embedding_type": "relative_key"},
    "position_embedding_type must be 'absolute'",
  ),
  ("distilbert", {"activation": "mish"}, "hidden_act must be one of"),
  ("distilbert", {"dim": 0}, "dim must be a positive integer, got 0"),
  ("electra", {"embedding_size": "12"}, "embedding_size must be a positive"),
  ("deberta", {"relative_attention": False}, "relative_attention must be true"),
  ("deberta", {"talking_head": True}, "talking_head must be False"),
  ("deberta", {"pos_att_type": "p2p"}, "pos_att_type must be a list of c2p"),
  ("deberta", {"embedding_size": 12}, "embedding_size must be 24"),
  ("deberta", {"type_vocab_size": -1}, "type_vocab_size must be a positive"),
  ("deberta_v3", {"conv_kernel_size": 3}, "conv_kernel_size must be 0"),
  ("deberta_v3", {"attention_head_size": 4}, "attention_head_size must be 8"),
  ("deberta_v3", {"norm_rel_ebd": "rms"}, "norm_rel_ebd must be 'none' or"),
  ("deberta_v3", {"position_buckets": 96}, "position_buckets must be at least"),
  ("deberta_v3", {"max_relative_positions": 1.5}, "must be an integer"),
  ("deberta_v3", {"hidden_act": "mish"}, "hidden_act must be one of"),
  ("modernbert", {"attention_bias": True}, "attention_bias must be False"),
  ("modernbert", {"classifier_pooling": "last"}, "pooling must be one of"),
  ("modernbert", {"layer_types": ["full_attention"]}, "num_hidden_layers, 3"),
  ("modernbert", {"layer_types": [[]]}, "layer_types must be a list of"),
  ("modernbert", {"local_attention": 0}, "local_attention must be a positive"),
  ("modernbert", {"num_attention_heads": 24}, "a multiple of twice"),
  (
    "modernbert",
    {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
    "rope_type must be 'default'",
  ),
  ("modernbert", {"rope_parameters": [1]}, "rope_parameters must be an object"),
  (
    "modernbert",
    {"rope_parameters": None, "rope_scaling": {"factor": 2.0}},
    "rope_scaling must be null",
  ),
]


@pytest.mark.parametrize(("name", "change", "message"), _REFUSED)
def test_unsupported_configs_are_refused(tmp_path, name, change, message):
  _copy(encoder_cases.load_case(name), tmp_path)
  _edit(tmp_path / "config.json", **change)
  with pytest.raises(weights.WeightsError, match=message):
    load.open_pretrained(str(tmp_path))


@pytest.mark.parametrize(
  ("name", "file", "content", "message"),
  [
    ("electra", "vocab.txt", "a\nb\n", "has not the tokens"),
    ("electra", "vocab.txt", "\udcff", "is not UTF-8"),
    ("roberta", "vocab.json", '{"a": 0}', "has not the tokens"),
    ("roberta", "vocab.json", "[]", "must hold an object"),
    ("roberta", "merges.txt", "a b c\n", "are no BPE"),
    ("roberta", "merges.txt", "x yz\n", "are no BPE"),
    ("roberta", "added_tokens.json", '{"new": 9}', "gives 'new' the id 9"),
  ],
)
def test_garbled_vocabularies_are_named(tmp_path, name, file, content, message):
  _copy(encoder_cases.load_case(name), tmp_path)
  (tmp_path / file).write_text(content, errors="surrogateescape")
  with pytest.raises(weights.WeightsError, match=message):
    load.open_pretrained(str(tmp_path))


def test_added_tokens_follow_the_vocabulary(tmp_path):
  case = encoder_cases.load_case("roberta")
  _copy(case, tmp_path)
  size = case.pretrained.tokenizer.get_vocab_size()
  (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": size}))
  found = load.open_pretrained(str(tmp_path)).tokenizer
  assert found.encode("a<new>", add_special_tokens=False).ids[-1] == size


def _copy(case, folder):
  shutil.copytree(case.pretrained.path, folder, dirs_exist_ok=True)


def _edit(path, **change):
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
