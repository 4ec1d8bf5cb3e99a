"""Names in a spec that no module has are errors, others matching or not."""

from flax import linen as nn
import jax.numpy as jnp
import pytest

from bilora_jax import LoraSpec, _unmatched, adapt

LAYERS = [f"layers_{i}/{x}" for i in range(3) for x in ("query", "key", "up")]
MODULES = [*LAYERS, "embed", "norm"]


def _message(**kwargs):
  with pytest.raises(ValueError) as caught:
    _unmatched.check(LoraSpec(**kwargs), LAYERS, MODULES)
  return str(caught.value)


@pytest.mark.parametrize(
  "kwargs",
  [
    {"targets": ("query", "layers_0/up")},
    {"targets": {".*": {}, ".*query": {"rank": 2}}},
    {"targets": ("query",), "exclude": ".*query"},
    {"exclude": "norm"},
    {"exclude": "layers_0/.*|nothing"},
  ],
  ids=str,
)
def test_entries_that_match_pass_even_if_they_change_nothing(kwargs):
  _unmatched.check(LoraSpec(**kwargs), LAYERS, MODULES)


def test_an_entry_of_a_sequence_that_matches_nothing_is_named():
  message = _message(targets=("layers_0/up", "qeury", "value"))
  assert message.startswith(
    "of targets=('layers_0/up', 'qeury', 'value'), 'qeury', 'value' match no "
    "module; these could be adapted: 'layers_0/query', "
  )


def test_a_key_of_a_mapping_that_matches_nothing_is_named():
  assert "'.*kye' match no module" in _message(targets={".*": {}, ".*kye": {}})


def test_a_target_that_no_adapter_fits_matches_nothing():
  assert "'norm' match no module" in _message(targets=("query", "norm"))


def test_an_exclude_that_matches_nothing_is_named():
  assert _message(exclude="normm") == (
    "exclude='normm' matches no module; there are 'norm', 'embed', "
    "'layers_0/key', 'layers_0/query', 'layers_0/up', 'layers_1/key', "
    "'layers_1/query', 'layers_1/up', ... (11 in all)."
  )


def test_near_names_come_first():
  names = _message(targets=("keyy",)).split("adapted: ")[1].split(", ")
  assert names[:4] == [
    "'layers_0/key'",
    "'layers_1/key'",
    "'layers_2/key'",
    "'layers_0/query'",
  ]


def test_adapt_refuses_what_passed_beside_others():
  model, x = nn.Sequential([nn.Dense(2), nn.Dense(2)]), jnp.ones((1, 2))
  with pytest.raises(ValueError, match="'layer_1' match no module; these"):
    adapt(model, LoraSpec(targets=("layers_0", "layer_1")), x)
  with pytest.raises(ValueError, match="exclude='head' matches no module"):
    adapt(model, LoraSpec(exclude="head"), x)
  with pytest.raises(ValueError, match=r"are left out, by exclude='layers_\.'"):
    adapt(model, LoraSpec(exclude="layers_."), x)
