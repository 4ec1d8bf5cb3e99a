"""The configuration: its checks, its JSON form."""

import functools
import json
import math
import pathlib
import re

from hypothesis import given
from hypothesis import strategies as st
import pytest

from train import options
from train.errors import UsageError
from train.methods import spec as methods
from train.run import config as config_lib
from train.run.config import Config

# Options of other methods than the default.
METHODS = {
  "sam_every": {"method": "looksam"},
  "sharpness_weight": {"method": "wsam"},
  "weight_fraction": {"method": "esam"},
  "sample_fraction": {"method": "esam"},
  "balance": {"method": "obar"},
}


@pytest.mark.parametrize(
  ("name", "wrong", "allowed"),
  [
    ("rank", 0, "at least 1"),
    ("auxiliary_rank", 0, "at least 1"),
    ("epochs", 0, "at least 1"),
    ("batch_size", 0, "at least 1"),
    ("max_length", 2, "at least 3"),
    ("train_rows", -1, "at least 0"),
    ("group_by_length", -1, "at least 0"),
    ("eval_every", -1, "at least 0"),
    ("checkpoint_every", 0, "at least 1"),
    ("log_every", 0, "at least 1"),
    ("seed", -1, "at least 0"),
    ("rho", -0.1, "[0, 1e+06)"),
    ("rho", math.nan, "[0, 1e+06)"),
    ("alpha", -1.0, "(0, 1e+06)"),
    ("learning_rate", math.inf, "[0, 1e+06)"),
    ("weight_decay", -1.0, "[0, 1e+06)"),
    ("max_grad_norm", -1.0, "[0, 1e+09)"),
    ("warmup_ratio", 1.0, "[0, 1)"),
    ("dropout", 1.0, "[0, 0.99)"),
    ("sam_every", 0, "at least 1"),
    ("sharpness_weight", 1.0, "[0, 0.999)"),
    ("weight_fraction", 0.0, "(0, 1]"),
    ("sample_fraction", 1.1, "(0, 1]"),
    ("balance", -0.1, "[0, 1e+09)"),
    ("rho_ratio", -1.0, "[0, 1e+06)"),
  ],
)
def test_a_value_out_of_bounds_is_named_with_its_bounds(name, wrong, allowed):
  with pytest.raises(UsageError) as error:
    config_lib.check(
      config_lib.replace(Config(), **METHODS.get(name, {}), **{name: wrong})
    )
  option = "--" + name.replace("_", "-")
  for part in (option, str(wrong), allowed):
    assert part in str(error.value)


@pytest.mark.parametrize(
  ("fields", "sentence"),
  [
    (
      {"auxiliary_optimizer": "power", "clip": "none"},
      "scales the auxiliary into a ball and needs one; got --clip none",
    ),
    (
      {"auxiliary_start": "scattered", "rho": 0.0},
      "surface of a ball and needs a --rho above 0; got --rho 0",
    ),
    (
      {"method": "esam", "accumulate": 2},
      "so --accumulate must be 1; got --accumulate 2",
    ),
    (
      {"method": "lora", "diagnose_every": 5},
      "or nystroem_bilora, and a base that is not quantised; got --method lora",
    ),
    (
      {"diagnose_every": 5, "base_dtype": "nf4"},
      "got --method bilora and --base-dtype nf4",
    ),
    (
      {"method": "flat_lora", "dora": True},
      "do not perturb the whole weights; got --method flat_lora",
    ),
    (
      {"method": "bilora", "keep_auxiliary": True},
      "--keep-auxiliary is an option of --method dual_lora; got --method",
    ),
    (
      {"method": "full_sam", "base_dtype": "bfloat16"},
      "trains the weights and does not freeze them; got bfloat16",
    ),
  ],
  ids=str,
)
def test_options_that_do_not_go_together_are_refused(fields, sentence):
  with pytest.raises(UsageError, match=re.escape(sentence)):
    config_lib.check(config_lib.replace(Config(), **fields))


# What a path and a file can hold.
_TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@given(
  st.builds(
    functools.partial(config_lib.replace, Config()),
    rho=st.floats(0, 1e6, exclude_max=True),
    learning_rate=st.floats(0, 1),
    targets=_TEXTS,
    run_dir=_TEXTS,
    rank=st.integers(1, 2**16 - 1),
    baseline=st.booleans(),
  )
)
def test_json_keeps_every_field(tmp_path_factory, config):
  folder = tmp_path_factory.getbasetemp() / "json"
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(config_lib.to_json(config))
  assert config_lib.from_run(folder) == config


def test_a_folder_without_a_configuration_is_no_run(tmp_path):
  with pytest.raises(UsageError, match=r"is not a run: .*config\.json"):
    config_lib.from_run(tmp_path)


@pytest.mark.parametrize(
  "text",
  [
    "",
    '{"rank": 8',
    "[]",
    '{"colour": "blue"}',
    '{"rank": "8"}',
    '{"rank": null}',
    '{"baseline": 1}',
    '{"method": "magic"}',
    '{"method": {"method": "lora", "rho": "big"}}',
    '{"adapter": {"rank": 4, "colour": 1}}',
    '{"optimisation": {"seed": true}}',
    '{"rank": {"rank": 8}}',
  ],
)
def test_a_configuration_that_cannot_be_is_refused_by_name(tmp_path, text):
  path = tmp_path / "config.json"
  path.write_text(text)
  with pytest.raises(UsageError) as error:
    config_lib.from_run(tmp_path)
  assert str(path) in str(error.value)


def test_a_whole_number_does_for_a_fraction(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"rho": 1}))
  assert config_lib.from_run(tmp_path).method.options.rho == 1.0


def test_differences_are_those_that_change_the_numbers():
  old = Config()
  new = config_lib.replace(
    old,
    rank=4,
    seed=3,
    run_dir="a",
    data_dir="b",
    log_every=1,
    compilation_cache=False,
  )
  assert config_lib.differences(old, new) == {"rank": (8, 4), "seed": (0, 3)}


@pytest.mark.parametrize(
  ("fields", "folder"),
  [
    ({}, "runs/snippets-bilora-seed0"),
    ({"task": "glue/rte", "seed": 2}, "runs/glue-rte-bilora-seed2"),
    ({"run_dir": "here"}, "here"),
  ],
)
def test_a_run_has_a_folder_of_its_own(fields, folder):
  assert config_lib.build(fields).folder() == pathlib.Path(folder)


@pytest.mark.parametrize(
  ("fields", "sentence"),
  [
    (
      {"method": "lora", "rho": 0.5},
      "--rho is an option of --method bilora, dual_lora, lora_sam",
    ),
    ({"method": "lora", "rho": 0.5}, "got --method lora, which has none"),
    (
      {"method": "looksam", "clip": "none"},
      "whose own options are --rho, --sam-every, --sam-reuse",
    ),
    (
      {"method": "full", "rank": 64},
      "--rank is an option of adapters, which --method full does not train",
    ),
    ({"method": "head", "start": "pissa"}, "--start is an option of adapters"),
    ({"colour": "blue"}, "there is no option --colour"),
  ],
  ids=str,
)
def test_an_option_of_another_method_is_refused(fields, sentence):
  with pytest.raises(UsageError, match=re.escape(sentence)):
    config_lib.build(fields)


def test_another_method_leaves_the_options_of_the_old_one():
  old = config_lib.replace(Config(), rho=0.2, rank=4)
  new = config_lib.replace(old, method="lora")
  assert new.adapter.rank == 4
  assert "rho" not in config_lib.flat(new)
  assert config_lib.replace(new, method="lora_sam").method.options.rho == 0.05


@pytest.mark.parametrize("name", list(methods.every()))
def test_a_method_that_is_chosen_has_its_own_defaults(name):
  chosen = config_lib.replace(Config(), method=name).method.options
  assert chosen == type(chosen)()
  # What was set stays, where the method has it.
  old = config_lib.replace(Config(), rho=0.2, auxiliary_rank=3)
  chosen = config_lib.replace(old, method=name).method.options
  for flag, value in (("rho", 0.2), ("auxiliary_rank", 3)):
    assert getattr(chosen, flag, value) == value


def test_flags_are_unique_over_all_groups_of_a_method():
  for method in methods.every():
    groups = config_lib.groups(method).values()
    flags = [flag for group in groups for flag in options.fields(group)]
    assert len(flags) == len(set(flags)), method


def test_an_older_run_has_all_options_in_one_table(tmp_path):
  fields = {"method": "lora", "rank": 4, "rho": 0.05, "model": "minilm"}
  (tmp_path / "config.json").write_text(json.dumps(fields))
  found = config_lib.from_run(tmp_path)
  assert found == config_lib.replace(Config(), method="lora", rank=4)
