"""Adapters to PEFT and back, against PEFT's own: parity, runs, refusals."""

import dataclasses
import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import outcomes
import pytest
import safetensors.numpy

import bilora_jax
from bilora_jax import peft
from train import __main__ as program
from train.errors import UsageError
from train.finished import export
from train.methods import adapter
from train.models import registry
from train.models.bert import model as bert
from train.models.bert import weights as bert_weights
from train.models.decoder import config as decoder_config
from train.models.decoder import model as decoder
from train.models.decoder import weights as decoder_weights
from train.models.io import tensors, weights
from train.models.vit import model as vit
from train.models.vit import onnx_file
from train.models.vit import weights as vit_weights
from train.run import config as config_lib

DATA = pathlib.Path(__file__).parents[1] / "models" / "data"
# Of float32, and logits of about 1.
TOLERANCE = 1e-5


class _Case(types.SimpleNamespace):
  """A model, its variables, and rows that PEFT computed the logits of."""


def _llama(scan: bool) -> _Case:
  folder = DATA / "llama_tied"
  config = decoder_config.DecoderConfig.from_hf(weights.read_config(folder))
  stored = tensors.open_safetensors(folder)
  return _Case(
    model=decoder.Decoder(config, scan=scan),
    params=decoder_weights.params(config, stored, scan=scan),
    stored=tensors.read_all(stored),
    folder=DATA / "peft_llama",
    inputs=lambda tokens: (tokens,),
  )


def _bert() -> _Case:
  folder = DATA / "peft_bert"
  config = bert.BertConfig.from_hf(weights.read_config(folder))
  stored = tensors.read_all(tensors.open_safetensors(folder))
  head = {
    "kernel": jnp.asarray(stored["classifier.weight"].T),
    "bias": jnp.asarray(stored["classifier.bias"]),
  }
  encoder = bert_weights.params(config, stored)["encoder"]
  return _Case(
    model=bert.BertClassifier(config, 3),
    params={"encoder": encoder, "head": head},
    stored=stored,
    folder=folder,
    inputs=lambda tokens: (tokens, jnp.ones_like(tokens)),
  )


def _tensors(model, params):
  return registry.family_of(model).tensors(model, params)


_CASES = {
  "bert": _bert,
  "llama": lambda: _llama(False),
  "llama_scanned": lambda: _llama(True),
}


@pytest.fixture(scope="module", params=_CASES)
def case(request):
  found = _CASES[request.param]()
  folder = found.folder / "adapter"
  spec = dataclasses.replace(
    adapter.of(str(folder), found.model).spec(), auxiliary_rank=0
  )
  with np.load(found.folder / "reference.npz", allow_pickle=False) as file:
    rows = [(file[f"tokens_{i}"], file[f"logits_{i}"]) for i in range(3)]
  found.rows = rows
  example = found.inputs(jnp.ones((1, 2), int))
  found.adapted = bilora_jax.adapt(found.model, spec, *example)
  kind = registry.family_of(found.model).kind_of(found.model)
  found.adapters = peft.load(folder, found.adapted, kind.names)
  found.kind = kind
  return found


def _logits(case, apply):
  """Of the longest row, as a decoder's, or the mean that a BERT's head gets."""
  tokens, wanted = max(case.rows, key=lambda row: len(row[0]))
  got = apply(*case.inputs(jnp.asarray(tokens)[None]))[0]
  return got, wanted.mean(0) if got.ndim == 1 else wanted


def test_adapters_of_peft_give_the_same_logits(case):
  variables = {"params": case.params}
  got, wanted = _logits(
    case,
    lambda *x: case.adapted.apply(variables, case.adapters, *x),
  )
  np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)


def test_what_is_saved_again_is_what_peft_saved(case, tmp_path):
  kind = case.kind
  peft.save(
    tmp_path, case.adapted, case.adapters, kind.names, task_type=kind.task_type
  )
  ours, theirs = (
    safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    for folder in (tmp_path, case.folder / "adapter")
  )
  assert set(ours) == set(theirs)
  for name, value in theirs.items():
    assert ours[name].tobytes() == value.tobytes(), name
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  own = case.folder / "adapter" / "adapter_config.json"
  assert set(config) <= set(json.loads(own.read_text()))


def test_tensors_are_those_that_were_read(case):
  found = _tensors(case.model, case.params)
  assert set(found) == set(case.stored)
  for name, value in case.stored.items():
    np.testing.assert_array_equal(found[name], value)


def test_a_merged_model_gives_the_same_logits(case):
  merged = case.adapted.merge({"params": case.params}, case.adapters)
  found = _tensors(case.model, merged["params"])
  config = case.model.config
  if isinstance(case.model, decoder.Decoder):
    params = decoder_weights.params(config, found, scan=case.model.scan)
  else:
    head = {
      "kernel": found["classifier.weight"].T,
      "bias": found["classifier.bias"],
    }
    params = bert_weights.params(config, found) | {"head": head}
  got, wanted = _logits(
    case, lambda *x: case.model.apply({"params": params}, *x)
  )
  np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)


def test_a_vit_is_the_tensors_that_were_read():
  config = vit.VitConfig(2, 3, 128, 1, 2, 24)
  model = vit.VitClassifier(config, 5)
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 6, 6, 3), "float32")
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), shapes["params"]
  )
  found = _tensors(model, params)
  own = {
    name.removeprefix("dinov2."): value
    for name, value in found.items()
    if name.startswith("dinov2.")
  }
  assert onnx_file.config(own) == config
  jax.tree.map(
    np.testing.assert_array_equal,
    vit_weights.vit_params(config, own),
    params["encoder"],
  )
  head = found["classifier.weight"]
  np.testing.assert_array_equal(head[:, :128], params["head"]["kernel"].T)
  assert not head[:, 128:].any()
  targets = {f"encoder/{path}" for path in vit_weights.modules(config)}
  assert targets < set(registry.family_of(model).kind_of(model).names)


def test_a_head_that_means_something_else_is_refused(tmp_path):
  found = _bert()
  folder = tmp_path / "adapter"
  shutil.copytree(found.folder / "adapter", folder)
  path = folder / "adapter_config.json"
  config = json.loads(path.read_text()) | {"task_type": "SEQ_CLS"}
  path.write_text(json.dumps(config))
  with pytest.raises(
    ValueError, match=r"'SEQ_CLS'.*BertForTokenClassification.*--new-head"
  ):
    adapter.of(str(folder), found.model).spec()
  # As the sentence says.
  without = adapter.of(str(folder), found.model, new_head=True)
  spec = without.spec()
  assert spec.extra is None
  example = found.inputs(jnp.ones((1, 2), int))
  spec = dataclasses.replace(spec, extra="head/.*")
  adapted = bilora_jax.adapt(found.model, spec, *example)
  with pytest.warns(UserWarning, match="also has classifier, which this model"):
    init = without.started(adapted)
  start = init(jax.random.key(0), {"params": found.params})
  jax.tree.map(
    np.testing.assert_array_equal, start["extra"]["head"], found.params["head"]
  )


@pytest.fixture(scope="module")
def ended(prepared, tmp_path_factory):
  """What a run leaves behind, without its training: adapters all random."""
  ready = prepared(auxiliary_rank=3)
  folder = tmp_path_factory.mktemp("ended")
  (folder / "config.json").write_text(config_lib.to_json(ready.config))
  shapes = jax.eval_shape(
    ready.method.adapted.init, jax.random.key(0), ready.variables
  )
  rng = np.random.default_rng(0)
  adapters = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes
  )
  kept = bilora_jax.primary(adapters)
  bilora_jax.save_adapters(folder / "adapters", ready.method.adapted, kept)
  return _Case(folder=folder, ready=ready, kept=kept)


@pytest.fixture(scope="module")
def exported(ended, tmp_path_factory):
  folder = tmp_path_factory.mktemp("exported") / "adapter"
  options = ["--run", str(ended.folder), "--out", str(folder)]
  assert program.main(["export", *options]) == 0
  return folder


def test_a_run_is_exported_for_peft(ended, exported):
  config = json.loads((exported / "adapter_config.json").read_text())
  assert (config["r"], config["lora_alpha"]) == (4, 16)
  assert config["task_type"] == "TOKEN_CLS"
  assert config["modules_to_save"] == ["classifier"]
  # Nobody else has the folder of this one's base.
  assert config["base_model_name_or_path"] == "local model; give --base-model"


def test_a_run_starts_from_an_adapter(ended, exported, prepared):
  # Other ranks than the options'.
  ready = prepared(adapter=str(exported), rank=8, auxiliary_rank=2)
  start = ready.method.init(jax.random.key(0), ready.variables)
  assert set(start) == {"primary", "auxiliary", "extra"}
  assert bilora_jax.count_parameters(start)["auxiliary"]
  got = bilora_jax.primary(start)
  assert jax.tree.structure(got) == jax.tree.structure(ended.kept)
  jax.tree.map(np.testing.assert_array_equal, got, ended.kept)


def test_a_run_goes_on_from_another_s_adapters(finished, run, tmp_path):
  adapter = tmp_path / "adapter"
  options = ["--run", str(finished), "--out", str(adapter)]
  assert program.main(["export", *options]) == 0
  folder = tmp_path / "more"
  more = ("--adapter", str(adapter), "--rank", "8", "--epochs", "1")
  assert run(folder, *more, "--eval-first", "--no-baseline") == 0
  first, *rest = (
    row["validation_loss"]
    for row in outcomes.rows(folder)
    if "validation_loss" in row
  )
  best = json.loads((finished / "results.json").read_text())["best_step"]
  (before,) = (
    row["validation_loss"]
    for row in outcomes.rows(finished)
    if "validation_loss" in row and row["step"] == best
  )
  assert first == pytest.approx(before, abs=1e-6)
  assert rest[-1] != first
  shapes = {name: x.shape for name, x in outcomes.adapters(folder).items()}
  assert shapes == {n: x.shape for n, x in outcomes.adapters(finished).items()}


def test_a_run_is_exported_merged(ended, tiny_model, tmp_path, capsys):
  folder = tmp_path / "new" / "model"
  options = ["--run", str(ended.folder), "--out", str(folder), "--merged"]
  assert program.main(["export", *options]) == 0
  assert "BertForTokenClassification" in capsys.readouterr().out
  config = json.loads((folder / "config.json").read_text())
  assert config["architectures"] == ["BertForTokenClassification"]
  assert config["id2label"] == {"0": "negative", "1": "positive"}
  assert config["torch_dtype"] == "float32"
  assert [path.name for path in folder.parent.iterdir()] == ["model"]
  names = {"tokenizer.json", "model.safetensors", "config.json"}
  names |= {"tokenizer_config.json", "README.md"}
  assert {path.name for path in folder.iterdir()} == names
  found = safetensors.numpy.load_file(folder / "model.safetensors")
  merged = ended.ready.method.adapted.merge(ended.ready.variables, ended.kept)
  wanted = _tensors(ended.ready.model, merged["params"])
  assert set(found) == set(wanted)
  for name, value in wanted.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  # A folder with something in it is left alone.
  assert program.main(["export", *options]) == 2
  assert "a new or an empty folder" in capsys.readouterr().err
  assert program.main(["export", *options, "--overwrite"]) == 0


def test_a_large_model_is_exported_in_shards(ended, tmp_path, monkeypatch):
  one, several = tmp_path / "one", tmp_path / "several"
  options = ["--run", str(ended.folder), "--merged", "--out"]
  assert program.main(["export", *options, str(one)]) == 0
  monkeypatch.setattr(export, "_SHARD", 4000)
  assert program.main(["export", *options, str(several)]) == 0
  assert not (several / "model.safetensors").exists()
  got, wanted = (
    tensors.read_all(tensors.open_safetensors(folder))
    for folder in (several, one)
  )
  assert set(got) == set(wanted)
  for name, value in wanted.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_an_adapter_of_another_model_is_refused_before_any_step(prepared):
  folder = DATA / "peft_llama" / "adapter"
  with pytest.raises(UsageError, match=r"q_proj.*has no place in this model"):
    prepared(adapter=str(folder), rank=8)


@pytest.mark.parametrize(
  ("fields", "parts"),
  [
    ({"method": "head"}, ["--adapter", "--method head"]),
    ({"rank": 4}, ["--adapter", "--rank", "4"]),
    ({"dora": True}, ["--adapter", "--dora", "True"]),
    ({"adapter": "", "new_head": True}, ["--new-head", "without --adapter"]),
    ({"targets": ".*query"}, ["--adapter", "--targets"]),
    ({"adapter": "absent"}, ["--adapter", "adapter_config.json", "absent"]),
  ],
)
def test_an_adapter_that_cannot_be_is_refused_at_once(fields, parts):
  start = {"adapter": str(DATA / "peft_bert" / "adapter")}
  with pytest.raises(ValueError) as error:
    config_lib.check(config_lib.build(start | fields))
  for part in parts:
    assert part in str(error.value)
