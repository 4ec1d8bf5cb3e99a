"""Every option has bounds: an extreme value is taken, or refused by name."""

from collections.abc import Iterator
import dataclasses
from typing import Any, Literal, get_origin

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from train import __main__ as program
from train import options
from train.errors import UsageError
from train.finished.options import Evaluate, Export, Generate, Predict
from train.methods import optimizers
from train.methods import spec as methods
from train.methods.options import OptimisationOptions
from train.planning.options import Compile
from train.run import config as config_lib
from train.study import main as study

_COMMANDS = (
  *(Evaluate, Export, Generate, Predict),
  *(Compile, study.Options),
)
_PLACE = ("--num-processes", "1", "--process-id", "0", "--coordinator")
_INTEGERS = st.sampled_from(
  [0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 10**12, 10**400]
)
_FLOATS = st.sampled_from(
  [0.0, -0.0, -1.0, 0.999999, 1.0, 1e300, -1e300, 5e-324]
)
_TEXTS = st.sampled_from(["", "a\0b", "\ud800", "\udcff", "x" * 5000, "(", "é"])


def _values(kind: Any) -> st.SearchStrategy:
  if kind is bool or get_origin(kind) is Literal:
    return st.nothing()
  if kind is int:
    return _INTEGERS | st.integers()
  if kind is float:
    return _FLOATS | st.floats()
  return _TEXTS | st.text() if kind is str else st.nothing()


def _every() -> Iterator[tuple[str, str, Any]]:
  """Each method with each of its options, and the option's type."""
  for method in methods.every():
    for group in config_lib.groups(method).values():
      for name, field in options.fields(group).items():
        # A plugin runs what is in it.
        if field.type in (int, float, str) and name != "plugins":
          yield method, name, field.type


_EVERY = list(_every())


@settings(max_examples=600, derandomize=True, database=None, deadline=None)
@given(st.data())
def test_an_extreme_value_is_taken_or_refused_by_its_option(data):
  method, name, kind = data.draw(st.sampled_from(_EVERY))
  value = data.draw(_values(kind))
  try:
    config = config_lib.build({"method": method, name: value}, "here")
    config_lib.check(config)
    config.folder()
    config_lib.to_json(config)
  except UsageError as error:
    assert len(str(error)) < 6000
    # A task has a sentence of its own.
    assert options.spelt(name) in str(error) or name == "task"
  else:
    assert config_lib.flat(config)[name] == value


@pytest.mark.parametrize(
  ("name", "value", "told"),
  [
    (
      "seed",
      2**63,
      "--seed must be below 9223372036854775808; got 92233",
    ),
    ("epochs", 10**12, "--epochs must be below 1000000; got 1000000000000"),
    ("batch_size", 10**12, "--batch-size must be below 1048576"),
    ("max_length", 10**9, "--max-length must be below 2097152"),
    ("rank", 10**9, "--rank must be below 65536"),
    ("log_every", 2**31, "--log-every must be below 2147483648"),
    ("alpha", 1e300, r"--alpha must be in \(0, 1e\+06\); got 1e\+300"),
    ("alpha", 0.0, r"--alpha must be in \(0, 1e\+06\); got 0.0"),
    ("alpha", -1.0, r"--alpha must be in \(0, 1e\+06\); got -1.0"),
    ("learning_rate", 1e300, r"--learning-rate must be in \[0, 1e\+06\)"),
    ("learning_rate", float("nan"), r"--learning-rate must be in .* got nan"),
    ("rho", 1e300, r"--rho must be in \[0, 1e\+06\)"),
    (
      "max_grad_norm",
      float("inf"),
      r"--max-grad-norm must be in \[0, 1e\+09\)",
    ),
    (
      "run_dir",
      "a\0b",
      r"--run-dir must be a Unicode text without NUL; got 'a\\x00b'",
    ),
    ("run_dir", "a\ud800", "--run-dir must be a Unicode text"),
  ],
)
def test_what_a_run_cannot_hold_is_refused(name, value, told):
  with pytest.raises(UsageError, match=told):
    config_lib.build({name: value})


@pytest.mark.parametrize(
  ("given_", "told"),
  [
    (("--seed", str(2**63)), "--seed must be below"),
    (("--seed", "9" * 5000), ""),  # what reads the command line refuses it
    (("--run-dir", "a\0b"), "--run-dir must be a Unicode text"),
    (("--config", "a\0b"), "is not a valid path"),
    (("--from-run", "a\0b"), "cannot be read"),
    (("--run-dir", "r" * 5000), "cannot be written: File name too long"),
    (("--run-dir", "/dev/null"), "cannot be written"),
    (("--mesh", f"data={'1' * 5000}"), "the size of data is a positive number"),
    (_PLACE[:-1], "given together"),
    (
      (*_PLACE, "h:\uff11\uff12"),
      "--coordinator must be HOST:PORT",
    ),
    ((*_PLACE, "h:65536"), "--coordinator must be HOST:PORT"),
    ((*_PLACE, "h:0"), "--coordinator must be HOST:PORT"),
    ((*_PLACE, "h\0:1"), "--coordinator must be HOST:PORT"),
  ],
)
def test_a_command_line_of_extremes_is_a_sentence(given_, told, capsys):
  code: int | str | None
  try:
    code = program.main(["--no-compilation-cache", *given_])
  except SystemExit as stop:
    code = stop.code
  assert code == 2
  said = capsys.readouterr().err
  assert told in said
  assert "Traceback" not in said


def test_a_warm_up_leaves_steps_to_fall_in():
  made = OptimisationOptions(warmup_ratio=0.999999)
  with pytest.raises(
    UsageError, match=r"--warmup-ratio must leave at least one step .* 24"
  ):
    optimizers.schedule(made, 24)
  optimizers.schedule(made, 0)
  optimizers.schedule(OptimisationOptions(warmup_ratio=0.9), 24)


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(st.data())
def test_the_other_commands_options_have_bounds_too(data):
  group = data.draw(st.sampled_from(_COMMANDS))
  chosen = [x for x in dataclasses.fields(group) if x.type in (int, float, str)]
  field = data.draw(st.sampled_from(chosen))
  own = {
    x.name: "x"
    for x in dataclasses.fields(group)
    if x.default is x.default_factory is dataclasses.MISSING
  }
  made = group(**{**own, field.name: data.draw(_values(field.type))})
  try:
    options.check(made)
  except UsageError as error:
    assert options.spelt(field.name) in str(error)


@pytest.mark.parametrize(
  "option", ["temperature", "top_p", "top_k", "max_new_tokens", "seed", "limit"]
)
def test_sampling_has_bounds(option):
  for value in (float("nan"), float("inf"), -1, 10**20):
    given: Any = {option: value}
    made = Generate(model="m", prompt=("a",), **given)
    with pytest.raises(UsageError, match=options.spelt(option)):
      options.check(made)
