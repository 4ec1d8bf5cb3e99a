"""Folders that PEFT wrote over its options: loaded, or refused helpfully."""

import json

import adapter_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilora_jax import peft
from train.data.objectives import NEXT_TOKEN
from train.run import assemble
from train.run import config as config_lib

FOLDER = adapter_folders.DATA / "adapters"
CASES = json.loads((FOLDER / "cases.json").read_text())


def _scans(facts) -> bool:
  """Decoders are scanned, if their layers are alike."""
  return not facts["selective"] and "bert" not in facts["base"]


@pytest.mark.parametrize("name", CASES)
def test_a_folder_computes_what_peft_does_or_is_refused(name, tmp_path):
  facts = CASES[name]
  loaded = adapter_folders.check(FOLDER / name, facts, scan=_scans(facts))
  if loaded is None:
    return
  # There and back.
  names = loaded.kind.names
  peft.save(tmp_path, loaded.adapted, loaded.adapters, names)
  stored = adapter_folders.base(facts["base"], _scans(facts), facts["head"])[-1]
  again = peft.load(tmp_path, loaded.adapted, names, base=stored)
  assert jax.tree.structure(again) == jax.tree.structure(loaded.adapters)
  jax.tree.map(np.testing.assert_array_equal, again, loaded.adapters)


@pytest.mark.parametrize("name", ["patterns", "exclude"])
def test_layers_that_differ_cannot_be_scanned(name):
  adapter_folders.check(FOLDER / name, CASES[name], scan=True)


def test_what_a_model_goes_without_is_said():
  with pytest.warns(UserWarning, match="has pooler.dense, which this model"):
    adapter_folders.load(
      FOLDER / "bare_encoder" / "adapter", "peft_bert", False
    )


def test_without_the_base_what_needs_it_is_said():
  loaded = adapter_folders.load(FOLDER / "head" / "adapter", "qwen2", False)
  names = loaded.kind.names
  with pytest.raises(
    ValueError, match="base=, to compare it with, is not given"
  ):
    peft.load(FOLDER / "head" / "adapter", loaded.adapted, names)


def _method(name: str, **fields):
  """As a run has it that starts from a folder."""
  model, variables, stored = adapter_folders.base(CASES[name]["base"], False)
  given = {"method": "bilora", "adapter": str(FOLDER / name / "adapter")}
  config = config_lib.build(given | fields)
  inputs = (jnp.ones((1, 2), int),)
  built = assemble.method_of(config, model, inputs, 9, NEXT_TOKEN, stored)
  return built, variables


@pytest.mark.parametrize("name", ["saved_head", "dora"])
def test_a_run_goes_on_with_all_that_a_folder_has(name):
  method, variables = _method(name)
  start = method.init(jax.random.key(0), variables)
  assert set(start) == {"primary", "auxiliary", "extra"}
  with np.load(FOLDER / name / "reference.npz") as file:
    tokens, wanted = file["tokens"], file["logits"]
  got = method.apply(variables, method.evaluated(start), tokens[None])[0]
  np.testing.assert_allclose(
    got, wanted, rtol=0, atol=adapter_folders.TOLERANCE
  )


def test_a_dora_is_for_methods_that_leave_the_weights_alone():
  with pytest.raises(ValueError, match="is a DoRA, whose magnitudes scale the"):
    _method("dora", method="lora_full_sam")
  with pytest.raises(ValueError, match="is a DoRA, whose magnitudes scale the"):
    _method("dora", method="dual_lora", keep_auxiliary=True)


def test_a_decoder_has_no_new_head():
  with pytest.raises(
    ValueError, match="--new-head is only for models that get"
  ):
    _method("saved_head", new_head=True)
