"""Adapter folders by PEFT, loaded on the models of tests/train/models/data."""

import dataclasses
import functools
import pathlib
import re
import types
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilora_jax
from train.methods import adapter
from train.models import registry
from train.models.bert import model as bert
from train.models.bert import weights as bert_weights
from train.models.decoder import config as decoder_config
from train.models.decoder import model as decoder
from train.models.decoder import weights as decoder_weights
from train.models.io import tensors, weights

DATA = pathlib.Path(__file__).parent / "train" / "models" / "data"
# Of float32, and logits of about 1.
TOLERANCE = 1e-5


class Loaded(types.SimpleNamespace):
  """A folder's adapters on their base.

  Attributes:
    model: the base.
    adapted: the same with the adapters' spec.
    adapters: as a run starts from them.
    variables: of the base.
    kind: what the base is in transformers.
  """

  def logits(self, adapters: Any, tokens: np.ndarray) -> np.ndarray:
    """Of one row (L,), as the model answers."""
    row = jnp.asarray(tokens)[None]
    return self.adapted.apply(self.variables, adapters, *inputs(self, row))[0]


@functools.cache
def base(name: str, scan: bool) -> Any:
  """A model of DATA: itself, its parameters, and its tensors as stored."""
  folder = DATA / name
  hf_config = weights.read_config(folder)
  stored = tensors.open_safetensors(folder)
  if hf_config["model_type"] == "bert":
    config = bert.BertConfig.from_hf(hf_config)
    params = bert_weights.params(config, stored)
    own = tensors.read_all(stored)
    params["head"] = {
      "kernel": jnp.asarray(own["classifier.weight"].T),
      "bias": jnp.asarray(own["classifier.bias"]),
    }
    return (
      bert.BertClassifier(config, len(own["classifier.bias"])),
      params,
      (stored),
    )
  config = decoder_config.DecoderConfig.from_hf(hf_config)
  params = decoder_weights.params(config, stored, scan=scan)
  return decoder.Decoder(config, scan=scan), params, stored


def inputs(loaded: Any, row: Any) -> tuple[Any, ...]:
  if isinstance(loaded.model, bert.BertClassifier):
    return row, jnp.ones_like(row)
  return (row,)


def load(folder: pathlib.Path, name: str, scan: bool) -> Loaded:
  """As a run does that starts from the folder, on a base of DATA."""
  model, params, stored = base(name, scan)
  found = Loaded(model=model, variables={"params": params})
  found.kind = registry.of(model).kind_of(model)
  given = adapter.of(str(folder), model, stored)
  spec = dataclasses.replace(given.spec(), auxiliary_rank=0)
  found.adapted = bilora_jax.adapt(
    model, spec, *inputs(found, jnp.ones((1, 2), int))
  )
  start = given.started(found.adapted)
  found.adapters = start(jax.random.key(0), found.variables)
  return found


def check(folder: pathlib.Path, facts: dict[str, Any], scan: bool) -> Any:
  """Asserts that PEFT's logits come out, or the sentence that refuses.

  Args:
    folder: with `adapter` and reference.npz, that make_adapter_folders.py
      writes.
    facts: of the case.
    scan: whether layers are scanned.

  Returns:
    What was loaded; None of a refused folder.
  """
  own = folder / "adapter"
  with np.load(folder / "reference.npz", allow_pickle=False) as file:
    tokens, wanted = file["tokens"], file.get("logits")
  if facts["refusal"]:
    with pytest.raises(ValueError) as error:
      load(own, facts["base"], scan)
    assert re.search(facts["refusal"], str(error.value)), error.value
    assert str(own) in str(error.value)
    return None
  if scan and facts["selective"]:
    with pytest.raises(ValueError, match="are scanned, and so adapted alike"):
      load(own, facts["base"], scan)
    return None
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".*goes without; it is left out")
    loaded = load(own, facts["base"], scan)
  got = loaded.logits(loaded.adapters, tokens)
  if got.ndim == 1:  # of a BERT, the mean over the tokens
    wanted = wanted.mean(0)
  np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)
  return loaded
