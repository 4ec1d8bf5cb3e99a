"""`LoraSpec`: what it matches, and what it refuses in words."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from bilora_jax import LoraSpec

REFUSED = {
  "rank is an integer of at least 1; got 0.": {"rank": 0},
  "rank is an integer of at least 1; got 2.0.": {"rank": 2.0},
  "rank is an integer of at least 1; got True.": {"rank": True},
  "rank is an integer of at least 1; got np.True_.": {"rank": np.True_},
  ("auxiliary_rank is an integer of at least 0 (0: plain LoRA); got -1."): {
    "auxiliary_rank": -1
  },
  "alpha is a positive number; got -1.": {"alpha": -1},
  "alpha is a positive number; got 0.": {"alpha": 0},
  "alpha is a positive number; got nan.": {"alpha": float("nan")},
  "alpha is a positive number; got inf.": {"alpha": float("inf")},
  "dropout is in [0, 1); got 1.": {"dropout": 1},
  "dropout is in [0, 1); got -0.1.": {"dropout": -0.1},
  ("dtype is the name of a floating-point dtype, as 'bfloat16'; got 'int8'."): {
    "dtype": "int8"
  },
  (
    "dtype is the name of a floating-point dtype, as 'bfloat16'; got 'half4'."
  ): {"dtype": "half4"},
  "base_dtype is one of nf4, int8, fp8, or None; got 'int4'.": {
    "base_dtype": "int4"
  },
  "tile_size is an integer of at least 1, or None; got 0.": {"tile_size": 0},
  "'(' is not a regular expression: missing ), unterminated": {"targets": "("},
  "'a(' is not a regular expression: missing )": {"targets": {"a(": {}}},
  "'*' is not a regular expression: nothing to repeat": {"exclude": "*"},
  "'[' is not a regular expression: unterminated": {"extra": "["},
  "['a'] is not a regular expression: ": {"exclude": ["a"]},
  "a target may override rank, alpha, auxiliary_rank; got ['scale'] for 'q'.": {
    "targets": {"q": {"scale": 2.0}}
  },
  "as {'rank': 4}; got 4 for 'q'.": {"targets": {"q": 4}},
  "rank is an integer of at least 1; got 0 for target 'q'.": {
    "targets": {"q": {"rank": 0}}
  },
}


@pytest.mark.parametrize("message", REFUSED)
def test_is_refused_in_words(message):
  with pytest.raises(ValueError) as caught:
    LoraSpec(**REFUSED[message])
  assert message in str(caught.value)


@pytest.mark.parametrize("targets", ["", (), [], {}])
def test_no_targets_are_refused(targets):
  with pytest.raises(ValueError, match="targets is empty: it must name"):
    LoraSpec(targets=targets)


def test_a_spec_is_frozen_and_a_dtype_becomes_its_name():
  spec = LoraSpec(targets=["q"], dtype=jnp.bfloat16)
  assert (spec.targets, spec.dtype) == (("q",), "bfloat16")
  assert spec == LoraSpec(targets=("q",), dtype="bfloat16")
  with pytest.raises(dataclasses.FrozenInstanceError):
    spec.rank = 3


def test_numpys_numbers_are_taken_as_pythons():
  spec = LoraSpec(
    rank=np.int64(4),
    alpha=np.float32(2.5),
    auxiliary_rank=np.uint8(3),
    targets={"q": {"rank": np.int32(2)}},
    tile_size=np.int64(32),
  )
  plain = LoraSpec(
    rank=4,
    alpha=2.5,
    auxiliary_rank=3,
    targets={"q": {"rank": 2}},
    tile_size=32,
  )
  assert repr(spec) == repr(plain)
  # A file of it is written.
  assert json.loads(json.dumps(vars(spec))) == vars(plain)


def test_patterns_match_whole_paths():
  spec = LoraSpec(targets="a/.*", exclude="a/b", extra="a/bias")
  assert [spec.match(p) is not None for p in ("a/c", "a/b", "x/a/c", "a")] == [
    True,
    False,
    False,
    False,
  ]
  assert [spec.is_extra(p) for p in ("a/bias", "x/a/bias")] == [True, False]


def test_a_sequence_matches_the_last_whole_parts():
  spec = LoraSpec(targets=("b/c",), exclude="no/.*")
  paths = ("b/c", "a/b/c", "ab/c", "b/c/d", "no/b/c")
  assert [spec.match(p) is not None for p in paths] == [
    True,
    True,
    False,
    False,
    False,
  ]


def test_dots_in_a_sequence_are_no_patterns():
  assert LoraSpec(targets=("a.c",)).match("abc") is None
  assert LoraSpec(targets="a.c").match("abc") is not None
