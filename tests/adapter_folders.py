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
from train.models import family, registry
from train.models.io import tensors, weights

DATA = pathlib.Path(__file__).parent / "train" / "models" / "data"
# Of float32, and logits of about 1.
TOLERANCE = 1e-5
LABELS = 3


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
    return self.adapted.apply(
      self.variables, adapters, *inputs(self.model, row)
    )[0]


@functools.cache
def base(name: str, scan: bool, head: str = "own") -> Any:
  """A model of DATA: itself, its variables, and its tensors as stored."""
  hf_config = weights.read_config(DATA / name)
  found = registry.by_model_type(hf_config["model_type"], head=head)
  opened = family.Pretrained(
    DATA / name,
    found,
    found.config.from_hf(hf_config),
    tensors.open_safetensors(DATA / name),
  )
  options = {"scan": scan} if found.scans else {}
  if not found.has_new_head:
    model = opened.language_model(**options)
    return model, opened.variables(model), opened.tensors
  model = opened.classifier(LABELS, **options)
  variables = opened.variables(model)
  if "classifier.weight" in opened.tensors:
    own = tensors.read_all(opened.tensors)
    variables["params"]["head"] = {
      "kernel": jnp.asarray(own["classifier.weight"].T),
      "bias": jnp.asarray(own["classifier.bias"]),
    }
  return model, variables, opened.tensors


def inputs(model: Any, row: Any) -> tuple[Any, ...]:
  """What the model is given of rows of tokens; a classifier also the mask."""
  if registry.family_of(model).has_new_head:
    return row, jnp.ones_like(row)
  return (row,)


def load(
  folder: pathlib.Path, name: str, scan: bool = False, head: str = "own"
) -> Loaded:
  """As a run does that starts from the folder, on a base of DATA."""
  model, variables, stored = base(name, scan, head)
  found = Loaded(model=model, variables=variables)
  found.kind = registry.family_of(model).kind_of(model)
  given = adapter.of(str(folder), model, stored)
  spec = dataclasses.replace(given.spec(), auxiliary_rank=0)
  found.adapted = bilora_jax.adapt(
    model, spec, *inputs(model, jnp.ones((1, 2), int))
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
      load(own, facts["base"], scan, facts["head"])
    assert re.search(facts["refusal"], str(error.value)), error.value
    assert str(own) in str(error.value)
    return None
  if scan and facts["selective"]:
    with pytest.raises(
      ValueError, match="are scanned, so they must be adapted alike"
    ):
      load(own, facts["base"], scan, facts["head"])
    return None
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".*not use; these tensors are ignored")
    loaded = load(own, facts["base"], scan, facts["head"])
  got = loaded.logits(loaded.adapters, tokens)
  if got.ndim < wanted.ndim:  # of a BERT, the mean over the tokens
    wanted = wanted.mean(0)
  np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)
  return loaded
