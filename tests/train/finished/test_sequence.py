"""A run on transformers' head for sequences: trained, exported, resumed."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from bilora_jax import primary
from train import __main__ as program
from train.finished import finished
from train.models import load


@pytest.fixture(scope="module")
def ran(run, tiny_decoder, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "sequence"
  options = ("--model", str(tiny_decoder), "--head", "sequence")
  assert run(folder, *options, "--epochs", "1", "--no-baseline") == 0
  return folder


def test_a_run_is_exported_for_peft_and_goes_on_from_there(
  ran, prepared, tiny_decoder, tmp_path, monkeypatch
):
  out = tmp_path / "out"
  options = ("--run", str(ran), "--out", str(out))
  assert program.main(["export", *options]) == 0
  config = json.loads((out / "adapter_config.json").read_text())
  assert (config["task_type"], config["modules_to_save"]) == (
    "SEQ_CLS",
    ["score"],
  )
  card = (out / "README.md").read_text()
  assert "AutoModelForSequenceClassification" in card
  assert "mean over the tokens" not in card
  ready = prepared(
    model=str(tiny_decoder), head="sequence", adapter=str(out), rank=8
  )
  start = ready.method.init(jax.random.key(0), ready.variables)
  run = finished.open_run(ran)
  jax.tree.map(np.testing.assert_array_equal, primary(start), run.adapters)
  (told,) = run.predict(["a lovely film"])
  assert told.sum() == pytest.approx(1, abs=1e-5)


def test_a_merged_run_is_a_sequence_classifier(ran, tmp_path):
  out = tmp_path / "out"
  options = ("--run", str(ran), "--out", str(out), "--merged")
  assert program.main(["export", *options]) == 0
  config = json.loads((out / "config.json").read_text())
  assert config["architectures"] == ["LlamaForSequenceClassification"]
  found = safetensors.numpy.load_file(out / "model.safetensors")
  assert found["score.weight"].shape == (2, 16)
  assert "lm_head.weight" not in found
  # It is a base of such a head as well.
  assert load.open_pretrained(str(out), head="sequence").family.has_new_head


def test_models_without_such_a_head_are_named(tiny_t5, tmp_path):
  with pytest.raises(ValueError, match=r"for --head sequence, got 't5'"):
    load.open_pretrained(str(tiny_t5), head="sequence")
  path = tmp_path / "model.onnx"
  path.write_bytes(b"x")
  with pytest.raises(ValueError, match="--head sequence is for models that"):
    load.open_pretrained(str(path), head="sequence")


def test_a_bert_without_a_pooler_is_named(tiny_model):
  with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.weight is miss"):
    load.open_pretrained(str(tiny_model), head="sequence")
