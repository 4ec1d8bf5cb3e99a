"""A damaged file of any format is read, or refused in a sentence that names it.

A few mutants of each format here; with `--long`, thousands, in processes of
their own, which a crash of a library would end.
"""

import collections
from collections.abc import Callable
import functools
import importlib.util
import os
import pathlib

import formats
from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import trial
import worker

_QUICK, _LONG = 15, 1050
# Of those that take ten times as long as others.
_SLOW = {"run": (6, 300), "rows of a study": (10, 500), "yaml": (8, 500)}
_HAS_SENTENCEPIECE = importlib.util.find_spec("sentencepiece") is not None
_NAMES = [
  pytest.param(
    name,
    marks=pytest.mark.skipif(
      name == "spiece" and not _HAS_SENTENCEPIECE,
      reason="sentencepiece is not installed",
    ),
  )
  for name in formats.FORMATS
]

Seeds = Callable[[str], trial.Seed]


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Seeds:
  """The whole folder of each format."""

  @functools.cache
  def built(name: str) -> trial.Seed:
    return trial.Seed(name, tmp_path_factory.mktemp("seed") / "whole")

  return built


@pytest.mark.parametrize("name", _NAMES)
def test_a_mutant_is_read_or_refused_by_name(name, seeds):
  seed = seeds(name)

  @settings(
    max_examples=_SLOW.get(name, (_QUICK, 0))[0],
    derandomize=True,
    database=None,
    deadline=None,
  )
  @given(st.integers(0, 2**32))
  def tried(number):
    assert not seed.tried(*seed.mutant(number)).fault

  tried()


@pytest.mark.parametrize("name", _NAMES)
def test_what_is_no_file_is_refused_by_name(name, seeds):
  seed = seeds(name)
  files = list(seed.format.files)
  for file in files[:2] if name in ("images", "run") else files:
    for put in (pathlib.Path.mkdir, os.mkfifo, pathlib.Path.touch, _nothing):
      outcome = seed.without(file, put)
      assert not outcome.fault, (file, put, outcome.said)


def _nothing(path: pathlib.Path) -> None:
  del path


@pytest.mark.parametrize("name", ["bert", "decoder", "t5", "adapters", "peft"])
def test_json_that_is_written_otherwise_means_the_same(name, seeds):
  seed = seeds(name)
  file = next(x for x in seed.format.files if x.endswith(".json"))
  meant = repr(seed.tried(file, (seed.folder / file).read_bytes()).value)
  for number in range(12):
    file, content = seed.same(number)
    if file != "tokenizer.json":  # another library's, without a mark
      outcome = seed.tried(file, content)
      assert outcome.accepted, (file, number, outcome.said)
      assert repr(outcome.value) == meant


@pytest.mark.slow
def test_thousands_of_mutants_are_read_or_refused(request, tmp_path):
  if not request.config.getoption("--long"):
    pytest.skip("takes half an hour; --long runs it")
  counts = {
    name: _SLOW.get(name, (0, _LONG))[1]
    for name in formats.FORMATS
    if name != "spiece" or _HAS_SENTENCEPIECE
  }
  read: collections.Counter[str] = collections.Counter()
  faults = []
  for line in worker.tried(counts, tmp_path):
    read[line["format"]] += line["accepted"]
    if line["fault"]:
      faults.append(line)
  for name, count in counts.items():
    print(f"{name}: {count} mutants, {read[name]} of them read")
  assert not faults
