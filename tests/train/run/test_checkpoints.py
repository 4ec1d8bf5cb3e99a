"""Checkpoints: what they hold, refuse, and keep through a failure."""

import asyncio
import gc
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from outcomes import checkpoint, files
import pytest

from train.errors import RunError, UsageError
from train.run import checkpoints as checkpoints_lib
from train.run.step import TrainState

LOOP = {"iterator": {"next_index": 7}, "best": {"metric": 0.5, "step": 0}}


def _state(value: float, width: int = 3) -> TrainState:
  trained = {
    "primary": {"a": jnp.full((2, width), value)},
    "extra": {"bias": jnp.full(width, value)},
  }
  return TrainState(
    jnp.int32(value),
    trained,
    (jnp.float32(value), {"mu": trained}),
    (),
    jnp.zeros(2, jnp.uint32),
  )


def _save(checkpoints, step):
  """A step that is the best so far."""
  checkpoints.save_best(step, _state(step).trained)
  checkpoints.save_last(
    step, _state(step), LOOP | {"best": {"metric": 0.5, "step": step}}
  )


@pytest.fixture
def open_at():
  """Opens checkpoints, and closes them at the end."""
  opened = []

  def start(folder):
    opened.append(checkpoints_lib.Checkpoints(folder))
    return opened[-1]

  yield start
  for checkpoints in opened:
    checkpoints.close()


def _same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
    np.testing.assert_array_equal(x, y)
    assert x.dtype == y.dtype


def test_the_last_checkpoint_comes_back_whole(open_at, tmp_path):
  checkpoints = open_at(tmp_path)
  for step in (1, 2, 3):
    checkpoints.save_last(step, _state(step), LOOP | {"at": step})
  checkpoints.wait()
  resumed = open_at(tmp_path).resume(_state(0))
  assert resumed is not None
  _same(resumed.state, _state(3))
  assert resumed.loop == LOOP | {"at": 3}


def _kept(folder):
  return {
    kind: sorted(int(path.name) for path in (folder / kind).iterdir())
    for kind in ("last", "best")
  }


def test_the_last_two_are_kept_and_each_best_that_they_name(open_at, tmp_path):
  checkpoints = open_at(tmp_path)
  for step in (1, 2, 3):
    _save(checkpoints, step)
  # Better and better, and none of them named yet.
  for step in (4, 5, 6):
    checkpoints.save_best(step, _state(step).trained)
  checkpoints.wait()
  assert _kept(tmp_path) == {"last": [2, 3], "best": [2, 3, 6]}
  _same(checkpoints.best(2, _state(0).trained), _state(2).trained)
  # As after a kill.
  again = open_at(tmp_path)
  again.save_best(7, _state(7).trained)
  again.wait()
  assert _kept(tmp_path) == {"last": [2, 3], "best": [2, 3, 7]}


def test_a_best_that_comes_again_after_a_kill_is_there(open_at, tmp_path):
  checkpoints = open_at(tmp_path)
  checkpoints.save_best(4, _state(4).trained)
  checkpoints.wait()
  again = open_at(tmp_path)
  again.save_best(4, _state(5).trained)
  again.wait()
  _same(again.best(4, _state(0).trained), _state(5).trained)


def test_an_earlier_best_after_a_kill_replaces_the_later_one(open_at, tmp_path):
  checkpoints = open_at(tmp_path)
  _save(checkpoints, 2)
  checkpoints.save_best(6, _state(6).trained)
  checkpoints.wait()
  again = open_at(tmp_path)  # of a machine that does not repeat its bits
  again.save_best(4, _state(4).trained)
  again.wait()
  _same(again.best(4, _state(0).trained), _state(4).trained)
  _same(again.best(2, _state(0).trained), _state(2).trained)


def test_an_empty_folder_has_none(open_at, tmp_path):
  checkpoints = open_at(tmp_path)
  assert checkpoints.resume(_state(0)) is None
  with pytest.raises(UsageError, match="has no checkpoint of step 3"):
    checkpoints.best(3, _state(0).trained)


def test_a_save_reads_nothing_that_the_next_step_overwrites(open_at, tmp_path):
  checkpoints = open_at(tmp_path)
  overwrite = jax.jit(
    lambda state: jax.tree.map(jnp.zeros_like, state), donate_argnums=0
  )
  state = _state(5)
  checkpoints.save_last(5, state, LOOP)
  jax.block_until_ready(overwrite(state))
  checkpoints.wait()
  resumed = checkpoints.resume(_state(0))
  assert resumed is not None
  _same(resumed.state, _state(5))


def test_the_best_is_on_disk_before_the_last_that_names_it(
  open_at, tmp_path, monkeypatch
):
  checkpoints = open_at(tmp_path)
  save, there = checkpoints._last.save, []

  def look(*args, **kwargs):
    there.append((tmp_path / "best" / "4").is_dir())
    return save(*args, **kwargs)

  monkeypatch.setattr(checkpoints._last, "save", look)
  checkpoints.save_best(4, _state(4).trained)
  checkpoints.save_last(4, _state(4), LOOP)
  assert there == [True]


@pytest.mark.parametrize(
  "like",
  [
    _state(0, width=4),
    _state(0)._replace(trained={"primary": _state(0).trained["primary"]}),
    _state(0)._replace(opt_state=()),
  ],
  ids=["shape", "tree", "optimizer"],
)
def test_a_checkpoint_of_another_spec_is_refused(open_at, tmp_path, like):
  checkpoints = open_at(tmp_path)
  checkpoints.save_last(1, _state(1), LOOP)
  checkpoints.save_best(1, _state(1).trained)
  checkpoints.wait()
  before = files(tmp_path)
  with pytest.raises(UsageError, match="does not fit this run") as error:
    checkpoints.resume(like)
  assert str(tmp_path / "last" / "1") in str(error.value)
  assert files(tmp_path) == before


@pytest.mark.parametrize("damage", ["cut", "lost", "loop"])
def test_a_damaged_checkpoint_is_refused(open_at, tmp_path, damage):
  checkpoints = open_at(tmp_path)
  checkpoints.save_last(1, _state(1), LOOP)
  checkpoints.wait()
  saved = tmp_path / "last" / "1"
  if damage == "loop":
    (saved / "loop" / "metadata").write_text('{"iterator": ')
  for path in (saved / "state").rglob("d/*"):
    if damage == "cut":
      path.write_bytes(path.read_bytes()[:20])
    if damage == "lost":
      path.unlink()
  before = files(tmp_path)
  with pytest.raises(
    UsageError, match=r"is damaged: .* It is left as"
  ) as error:
    open_at(tmp_path).resume(_state(0))
  assert str(saved) in str(error.value)
  assert files(tmp_path) == before


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """Checkpoints of the steps 5 and 8, whose best are of 4 and 7."""
  folder = tmp_path_factory.mktemp("two")
  checkpoints = checkpoints_lib.Checkpoints(folder)
  for step in (5, 8):
    checkpoints.save_best(step - 1, _state(step - 1).trained)
    checkpoints.save_last(step, _state(step), _loop(step, step - 1))
  checkpoints.wait()
  checkpoints.close()
  return folder


def _loop(step, best):
  return {"iterator": {"next_index": step}, "best": {"step": best}}


def _flip(path, draws):
  content = bytearray(path.read_bytes())
  if content:
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
  path.write_bytes(content)


@pytest.mark.parametrize("how", ["lost", "flipped"])
@pytest.mark.parametrize("kind", ["best", "last"])
def test_with_any_file_damaged_a_run_goes_on_with_bits_that_were_saved(
  open_at, two, tmp_path, kind, how
):
  draws, went_back = random.Random(0), 0
  paths = [x.relative_to(two) for x in two.rglob("*") if x.is_file()]
  for i, path in enumerate(x for x in sorted(paths) if x.parts[0] == kind):
    folder = shutil.copytree(two, tmp_path / str(i))
    if how == "lost":
      (folder / path).unlink()
    else:
      _flip(folder / path, draws)
    checkpoints = open_at(folder)
    resumed = checkpoints.resume(_state(0), lambda trained: trained)
    assert resumed is not None
    step = int(resumed.state.step)
    assert step == (5 if resumed.damaged else 8)
    _same(resumed.state, _state(step))
    assert resumed.loop == _loop(step, step - 1)
    best = checkpoints.best(step - 1, _state(0).trained)
    _same(best, _state(step - 1).trained)
    if resumed.damaged:
      went_back += 1
      (sentence,) = resumed.damaged
      assert "is damaged" in sentence and "\n" not in sentence
      # It is whole again once the run is beyond it.
      checkpoints.save_best(7, _state(7).trained)
      checkpoints.save_last(8, _state(8), _loop(8, 7))
      checkpoints.wait()
      again = open_at(folder).resume(_state(0), lambda trained: trained)
      assert again is not None and not again.damaged
      _same(again.state, _state(8))
    shutil.rmtree(folder)
  assert went_back


def test_arrays_that_orbax_takes_for_whole_are_compared(open_at, two, tmp_path):
  folder = shutil.copytree(two, tmp_path / "two")
  # Of another run: Orbax cannot tell.
  shutil.rmtree(folder / "last" / "8" / "state")
  shutil.copytree(
    folder / "last" / "5" / "state", folder / "last" / "8" / "state"
  )
  checkpoints = open_at(folder)
  resumed = checkpoints.resume(_state(0))
  assert resumed is not None and int(resumed.state.step) == 5
  assert "its arrays are not what was saved" in resumed.damaged[0]


def test_a_best_of_the_last_step_is_made_again_of_the_state(open_at, tmp_path):
  checkpoints = open_at(tmp_path)
  _save(checkpoints, 3)
  checkpoints.wait()
  shutil.rmtree(tmp_path / "best" / "3" / "evaluated")
  again = open_at(tmp_path)
  resumed = again.resume(_state(0), lambda trained: trained)
  assert resumed is not None and not resumed.damaged
  again.wait()
  _same(again.best(3, _state(0).trained), _state(3).trained)


def test_only_where_no_checkpoint_is_whole_is_it_an_error(
  open_at, two, tmp_path
):
  folder = shutil.copytree(two, tmp_path / "two")
  (folder / "best" / "4" / "evaluated" / "manifest.ocdbt").unlink()
  (folder / "last" / "8" / "loop" / "metadata").unlink()
  before = files(folder)
  with pytest.raises(UsageError, match=r"last/8 is damaged: .* So is the one"):
    open_at(folder).resume(_state(0), lambda trained: trained)
  assert files(folder) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_a_digest_is_of_every_bit_and_of_no_layout(dtype):
  x = jnp.arange(24).reshape(4, 6).astype(dtype)
  digest = checkpoints_lib._digest
  before = digest({"x": x})
  devices = jax.sharding.Mesh(
    np.array(jax.devices()[:4]).reshape(2, 2), ("d", "e")
  )
  for axes in ("d", "e"), (("d", "e"), None), (None, "d"), (None, None):
    layout = jax.sharding.NamedSharding(devices, jax.P(*axes))
    assert digest({"x": jax.device_put(x, layout)}) == before
  if dtype == "bool":
    assert digest({"x": ~x}) != before
    return
  words = np.asarray(x).view(np.uint8)
  for place in range(words.size):
    flipped = words.copy()
    flipped.flat[place] ^= 1 << (place % 8)
    other = jnp.asarray(flipped.view(np.asarray(x).dtype))
    assert digest({"x": other}) != before


@pytest.mark.parametrize(
  "content",
  [
    *("5", "[]", "{}", '{"loop": 5, "shapes": {}}', '{"loop": {}}'),
    *('{"loop": {"best": 5}, "shapes": {}}', '{"loop": {}, "shapes": 5}'),
    *("[" * 100_000, "\xff"),
  ],
)
def test_json_of_other_shapes_is_damaged(two, tmp_path, content):
  folder = shutil.copytree(two, tmp_path / "two")
  path = folder / "last" / "8" / "loop" / "metadata"
  path.write_bytes(content.encode("latin-1"))
  assert [step for step, _ in checkpoints_lib.stored(folder)] == [5]
  with pytest.raises(checkpoints_lib.DamagedError, match="8 is damaged"):
    checkpoints_lib._read(folder / "last" / "8")


def test_what_a_kill_left_half_written_is_not_resumed(open_at, tmp_path):
  checkpoints = open_at(tmp_path)
  checkpoints.save_last(1, _state(1), LOOP)
  checkpoints.wait()
  last = tmp_path / "last"
  half = shutil.copytree(last / "1", last / "2.orbax-checkpoint-tmp")
  (half / "commit_success.txt").unlink(missing_ok=True)
  resumed = open_at(tmp_path).resume(_state(0))
  assert resumed is not None
  _same(resumed.state, _state(1))
  assert [path.name for path in last.iterdir()] == ["1"]


@pytest.mark.parametrize("kind", ["last", "best"])
def test_too_little_space_is_a_sentence_and_harms_nothing(
  open_at, tmp_path, monkeypatch, kind
):
  checkpoints = open_at(tmp_path)
  checkpoints.save_last(1, _state(1), LOOP)
  checkpoints.save_best(1, _state(1).trained)
  checkpoints.wait()
  before = files(tmp_path)
  with monkeypatch.context() as patch:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    patch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=r"the same command resumes.* 0\.0 MiB"):
      if kind == "last":
        checkpoints.save_last(2, _state(2), LOOP)
      else:
        checkpoints.save_best(2, _state(2).trained)
  checkpoints.wait()
  assert files(tmp_path) == before
  # There is space again.
  checkpoints.save_last(2, _state(2), LOOP)
  checkpoints.wait()
  resumed = checkpoints.resume(_state(0))
  assert resumed is not None
  _same(resumed.state, _state(2))


def test_a_failure_in_the_background_is_told_by_wait_and_not_by_close(
  open_at, tmp_path, monkeypatch
):
  checkpoints = open_at(tmp_path)
  checkpoints.save_last(1, _state(1), LOOP)
  checkpoints.wait()

  def full(step):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checkpoints._last, "_finalize_checkpoint", full)
  checkpoints.save_last(2, _state(2), LOOP)
  with pytest.raises(RunError, match="No space left on device"):
    checkpoints.wait()
  checkpoints.close()

  other = open_at(tmp_path / "other")
  monkeypatch.setattr(other._last, "_finalize_checkpoint", full)
  other.save_last(1, _state(1), LOOP)
  other.close()


def test_checkpoints_never_hold_the_base(finished, tiny_model):
  for item in ("state", "evaluated"):
    found = checkpoint(finished, item)
    shapes = {x.shape for x in found.values()}
    # Of the head, (16, 2) and (2,); of the factors, one side is a rank, 4 or
    # 8. The base has (16,), (32,), and (m, n) of both greater.
    factors = {(m, r) for m in (16, 32) for r in (4, 8)}
    factors |= {(r, m) for m, r in factors}
    assert shapes <= {(), (2,), (16, 2), *factors}
  assert not any("auxiliary" in name for name in found)
  size = sum(x.nbytes for x in found.values())
  assert size < (tiny_model / "model.safetensors").stat().st_size / 4


@pytest.mark.parametrize(
  ("why", "heard"),
  [("/run/10.orbax-checkpoint-tmp: File too large", False), ("else", True)],
)
def test_of_several_arrays_that_fail_the_others_are_not_logged(
  tmp_path, caplog, why, heard
):
  """Orbax awaits the first; asyncio tells the others' failures, if at all."""

  async def fail():
    raise ValueError(why)

  async def never_awaited():
    task = asyncio.get_running_loop().create_task(fail())
    await asyncio.sleep(0)
    del task

  checkpoints_lib.Checkpoints(tmp_path).close()
  asyncio.run(never_awaited())
  gc.collect(1)  # what is new: to look through all of the rest takes seconds
  assert bool(caplog.records) == heard


def test_why_a_write_failed_is_said_wherever_the_message_has_it():
  spec = "[tensorstore_spec='" + "x" * 400 + "']"
  for message in (
    f"Error writing a [os_error='File too large'] {spec}",
    f"Error writing a {spec} [os_error='File too large']",
  ):
    said = checkpoints_lib._first_line(ValueError(message))
    assert said.startswith("Error writing a")
    assert said.count("File too large") == 1
    assert len(said) < 330
