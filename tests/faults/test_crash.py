"""Whatever ends it, the same command comes to the same bits.

Lives of a run, of an export and of a study are ended before an operation on
files, which `lives` counts; in the normal suite before a few of them, with
`--long` before each.
"""

from collections.abc import Callable, Iterator, Mapping
import json
import os
import pathlib
import random
import shutil
import signal
import time
from typing import NamedTuple

from lives import Ended, Lives
from outcomes import assert_no_step_twice, assert_same_outcome, files
import pytest

_SHORT = (
  *("--train-rows", "32", "--eval-rows", "16", "--epochs", "2"),
  *("--checkpoint-every", "3", "--eval-every", "4", "--log-every", "1"),
  # Of the methods with adapters the one that is traced soonest.
  *("--group-by-length", "0", "--no-baseline", "--method", "lora"),
)
_STUDY = """
[study]
name = "small"
folder = "{folder}"
seeds = [0, 1]
reference = "LoRA"
[defaults]
model = "{model}"
data_dir = "{data}"
train_rows = 16
eval_rows = 8
batch_size = 8
max_length = 16
rank = 4
epochs = 1
compilation_cache = false
[[task]]
name = "snippets"
[[method]]
name = "LoRA"
method = "lora"
[sharpness]
rows = 0
"""
# A run's picture is written where and when it would be, and not drawn.
_NOT_DRAWN = """
import pathlib
from matplotlib import figure
draw = figure.Figure.savefig
def savefig(self, target, **options):
  if isinstance(target, pathlib.Path):
    target.write_bytes(b"a picture")
  else:
    draw(self, target, **options)
figure.Figure.savefig = savefig
"""
# What no two runs have in common.
_OF_A_DAY = {"seconds", "step_seconds", "date", "machine", "config"}


class Life(NamedTuple):
  """A command, and what is to come of it.

  Attributes:
    root: the folder that it writes to.
    arguments: of the program.
    whole: how it ends where nothing happens.
    few: moments of the normal suite.
    check: asserts that it has ended so.
    kept: asserts that a command that was ended has harmed nothing.
    old: the files that are there before, by their paths.
  """

  name: str
  root: pathlib.Path
  arguments: tuple[str, ...]
  whole: Ended
  few: int
  check: Callable[[pathlib.Path], None]
  kept: Callable[[], None] = lambda: None
  old: Mapping[pathlib.Path, bytes] = {}

  @property
  def operations(self) -> int:
    return self.whole.operations

  @property
  def seconds(self) -> float:
    return self.whole.seconds

  def prepare(self) -> None:
    """Has only the old files there."""
    shutil.rmtree(self.root, ignore_errors=True)
    for path, content in self.old.items():
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
  environment = os.environ | {"PYTHONWARNINGS": "ignore"}
  with Lives(environment, _NOT_DRAWN) as started:
    yield started


@pytest.fixture(scope="module")
def ended(lives, options, tmp_path_factory) -> tuple[pathlib.Path, Ended]:
  """The folder of a run that nothing happened to, and how it ended."""
  folder = tmp_path_factory.mktemp("ended") / "run"
  found = lives.live(folder, *_run(options, folder))
  assert found.code == 0, found.err
  return folder, found


def _run(options, folder: pathlib.Path) -> tuple[str, ...]:
  return (*options, *_SHORT, "--run-dir", str(folder))


@pytest.fixture(scope="module")
def life(
  request, lives, options, ended, tmp_path_factory, tiny_model, data_dir
) -> Life:
  """Of a run, an export, a whole model that replaces one, or a study."""
  folder = tmp_path_factory.mktemp(request.param)
  if request.param == "run":
    return _of_run(folder / "run", options, *ended)
  if request.param == "study":
    return _of_study(lives, folder, tiny_model, data_dir)
  return _of_export(lives, folder, ended[0], request.param)


def _of_run(folder, options, finished, whole) -> Life:
  def check(folder):
    assert_same_outcome(folder, finished)
    assert_no_step_twice(folder)
    assert (folder / "report.md").is_file()
    assert (folder / "report.png").is_file()

  return Life("run", folder, _run(options, folder), whole, 2, check)


def _of_export(lives, folder, finished, kind) -> Life:
  out, other = folder / "out" / "model", folder / "expected" / "model"
  more = ["--merged"] if kind == "merged" else []
  old = {out / "config.json": b"{}", out / "weights": b"old"}
  before = {path.name: content for path, content in old.items()}

  def arguments(out):
    return (
      *("export", "--run", str(finished), "--out", str(out)),
      *("--overwrite", *more),
    )

  def kept():
    # In its place, or beside it until the next start.
    there = [files(x) for x in out.parent.glob("*model*") if x.is_dir()]
    assert before in there or expected in there

  def check(root):
    assert files(root / "model") == expected

  for path, content in old.items():
    moved = other / path.name
    moved.parent.mkdir(parents=True, exist_ok=True)
    moved.write_bytes(content)
  whole = lives.live(other.parent, *arguments(other))
  assert whole.code == 0, whole.err
  expected = files(other)
  return Life(kind, out.parent, arguments(out), whole, 1, check, kept, old)


def _of_study(lives, folder, tiny_model, data_dir) -> Life:
  def arguments(name):
    file = folder / f"{name}.toml"
    file.write_text(
      _STUDY.format(folder=folder / name, model=tiny_model, data=data_dir)
    )
    return "study", str(file)

  whole = lives.live(folder / "expected", *arguments("expected"))
  assert whole.code == 0, whole.err
  rows = _rows(folder / "expected")
  assert len(rows) == 2

  def check(folder):
    assert _rows(folder) == rows
    assert (folder / "report.md").is_file()
    assert not any((folder / "running").iterdir())

  return Life("study", folder / "study", arguments("study"), whole, 1, check)


def _rows(folder):
  found = map(json.loads, (folder / "runs.jsonl").read_text().splitlines())
  return [
    {name: x for name, x in row.items() if name not in _OF_A_DAY}
    for row in found
  ]


def _assert_swept(folder: pathlib.Path) -> None:
  """Nothing is left that was there for a while."""
  left = [
    str(path.relative_to(folder))
    for path in folder.rglob("*")
    if path.name.endswith((".part", ".old", ".lock", "-tmp"))
    or ".orbax-checkpoint-tmp" in path.name
  ]
  assert not left


def _moments(life: Life, long: int) -> list[int]:
  """The numbers of the operations before which something happens, mixed."""
  every = range(1, life.operations + 1)
  few = min(long, life.operations) or life.few
  return random.Random(0).sample(every, few)


_LIVES = ("export", "merged", "study", "run")


@pytest.mark.slow
@pytest.mark.parametrize("life", _LIVES, indirect=True)
def test_after_kills_at_any_moments_the_same_command_ends_at_the_same_bits(
  lives, life, pytestconfig
):
  long = pytestconfig.getoption("long")
  draws = random.Random(1)
  moments = _moments(life, long)
  killed = 0
  for i, at in enumerate(moments, 1):
    life.prepare()
    # Then, before an operation of what is left of it.
    more = [draws.randint(1, life.operations) for _ in range(2 * bool(long))]
    for number in (at, *more):
      found = lives.live(life.root, *life.arguments, fault="kill", at=number)
      life.kept()
      if found.code == 0:
        break
      assert found.code == -signal.SIGKILL, found.err
      killed += 1
    else:
      # The clock may be set meanwhile.
      found = lives.live(life.root, *life.arguments, fault="back", at=1)
    assert found.code == 0, found.err
    life.check(life.root)
    _assert_swept(life.root)
    if long:
      print(f"{life.name}: {killed} kills, {i} of {len(moments)} the same")


@pytest.mark.slow
@pytest.mark.parametrize("life", ["merged", "run"], indirect=True)
def test_a_disk_that_is_full_at_any_moment_is_a_sentence_and_harms_nothing(
  lives, life, pytestconfig
):
  long = pytestconfig.getoption("long")
  moments = _moments(life, long)
  for i, at in enumerate(moments, 1):
    life.prepare()
    found = lives.live(life.root, *life.arguments, fault="full", at=at)
    life.kept()
    if found.code:
      assert found.code in (1, 2), found.err
      assert "Traceback" not in found.err
      assert found.err.splitlines()[-1].startswith("error: ")
      found = lives.live(life.root, *life.arguments)
    assert found.code == 0, found.err
    life.check(life.root)
    _assert_swept(life.root)
    if long:
      print(f"{life.name}: {i} of {len(moments)} full disks")


@pytest.mark.slow
@pytest.mark.parametrize("life", ["export", "run"], indirect=True)
def test_a_ctrl_c_at_any_moment_is_one_line_and_never_lost(
  lives, life, pytestconfig
):
  long = pytestconfig.getoption("long")
  for at in _moments(life, long):
    life.prepare()
    found = lives.live(life.root, *life.arguments, fault="interrupt", at=at)
    life.kept()
    told = found.err.splitlines()
    lines = [x for x in told if not x.startswith("warning: ")]
    assert len(lines) == 1, (at, life.operations, found)
    (line,) = lines
    # In the steps these are saved first, or were the last.
    code = 0 if line.startswith("stopping: ") else 130
    assert found.code == code, found.err
    assert code == 0 or line == "interrupted."
    found = lives.live(life.root, *life.arguments)
    assert found.code == 0, found.err
    life.check(life.root)
    _assert_swept(life.root)


@pytest.mark.slow
@pytest.mark.parametrize("life", ["run"], indirect=True)
def test_of_two_commands_on_one_folder_the_second_is_refused_at_once(
  lives, life, pytestconfig
):
  long = pytestconfig.getoption("long")
  draws, refusals, longest = random.Random(2), 0, 0.0
  while refusals < (min(long, 20) or 1):
    life.prepare()
    first = lives.start(life.root, *life.arguments)
    # From before the claim to the last file.
    offset = draws.uniform(0, 0.8 * life.seconds)
    time.sleep(offset)
    second = lives.start(life.root, *life.arguments)
    both = [lives.end(second), lives.end(first)]
    if "was finished on" in both[0].out:
      continue  # it came too late
    refused, whole = sorted(both, key=lambda x: -x.code)
    assert (refused.code, whole.code) == (2, 0), both
    assert f"{life.root} is in use by process " in refused.err
    assert refused.err.count("\n") == 1
    life.check(life.root)
    _assert_swept(life.root)
    longest = max(longest, refused.seconds)
    refusals += 1
    if long:
      print(f"{refusals} refused, this at {offset:.1f} s, in {longest:.2f} s")
