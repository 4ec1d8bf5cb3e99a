"""Runs on meshes end where the run on one device ends."""

import json
import os
import signal
import socket

import jax
import lives
import numpy as np
from outcomes import adapters, assert_no_step_twice, checkpoint, rows
import pytest

from train import locks
from train.data.objectives import CLASSIFICATION
from train.devices import launch, processes
from train.devices import mesh as mesh_lib
from train.errors import UsageError
from train.run import loop, step

# Each mesh adds up in another order, to rounding in float32; the largest
# difference seen was 5e-6, of 24 steps with data=8.
TOLERANCE = 1e-5
CUBE = "data=2,fsdp=2,tensor=2"
_TIMEOUT_SECONDS = 200
# Evaluated at the end only: an evaluation is a program to compile on each mesh,
# and no save is under way when a process is killed.
AT_THE_END = ["--eval-every", "24", "--checkpoint-every", "6", "--no-baseline"]
# Where all kernels are adapted elsewhere, two that are split otherwise: a
# program for a mesh is compiled in a time that grows with what it has to split.
TWO_KERNELS = [*AT_THE_END, "--targets", ".*/(query|output)(/kernel)?"]


@pytest.fixture(scope="module")
def on_one_device(run, tmp_path_factory):
  folder = tmp_path_factory.mktemp("device") / "run"
  assert run(folder, *TWO_KERNELS) == 0
  return folder


def assert_near(left, right):
  """Asserts that two runs had the same losses, and ended in one state."""
  _near(adapters(left), adapters(right))
  for ours, theirs in zip(rows(left), rows(right), strict=True):
    assert ours["step"] == theirs["step"]
    for name in ("loss", "validation_loss"):
      assert ours.get(name) == pytest.approx(theirs.get(name), abs=TOLERANCE)


def _near(left, right):
  assert left.keys() == right.keys()
  for name in left:
    np.testing.assert_allclose(
      left[name], right[name], rtol=0, atol=TOLERANCE, err_msg=name
    )


def test_a_run_on_a_mesh_ends_where_that_on_one_device_does(
  run, finished, tmp_path
):
  assert run(tmp_path / "run", "--mesh", CUBE) == 0
  assert_near(tmp_path / "run", finished)
  _near(checkpoint(tmp_path / "run"), checkpoint(finished))
  ours, theirs = (
    json.loads((folder / "results.json").read_text())
    for folder in (tmp_path / "run", finished)
  )
  for name in ("test", "baseline"):
    assert ours[name]["accuracy"] == theirs[name]["accuracy"]
    assert ours[name]["loss"] == pytest.approx(
      theirs[name]["loss"], abs=TOLERANCE
    )


@pytest.mark.parametrize(
  ("method", "mesh"),
  [("lora", "data=8"), ("full", CUBE), ("nystroem_sam", CUBE)],
)
def test_other_methods_end_on_a_mesh_where_one_device_does(
  run, tmp_path, method, mesh
):
  left, right = (tmp_path / name for name in ("mesh", "device"))
  kernels = AT_THE_END if method == "full" else TWO_KERNELS
  options = ("--method", method, "--learning-rate", "1e-3", *kernels)
  assert run(left, *options, "--mesh", mesh) == 0
  assert run(right, *options) == 0
  ours, theirs = (
    {
      name: x
      for name, x in checkpoint(folder).items()
      # The softmax does not change with it: its gradient is rounding, which
      # Adam makes as large as any other's.
      if "['key']['bias']" not in name
    }
    for folder in (left, right)
  )
  _near(ours, theirs)


def test_a_run_resumes_on_other_meshes(
  run, on_one_device, tmp_path, capsys, monkeypatch, signal_at
):
  for mesh, last in (("", 7), ("fsdp=8", 15), ("data=2,tensor=4", None)):
    if last is not None:
      signal_at(signal.SIGTERM, last)
    assert run(tmp_path / "run", "--mesh", mesh, *TWO_KERNELS) == 0
    monkeypatch.undo()
  out = capsys.readouterr().out
  assert "resumed after step 7" in out and "resumed after step 15" in out
  _near(adapters(tmp_path / "run"), adapters(on_one_device))
  _near(checkpoint(tmp_path / "run"), checkpoint(on_one_device))


def _axes(tree):
  return {
    jax.tree_util.keystr(path): x.sharding.spec
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_adapters_follow_kernels_and_the_optimizer_adapters(prepared, batch):
  ready = prepared(mesh=CUBE)
  spec = jax.sharding.PartitionSpec
  layer = ready.variables["params"]["encoder"]["layer_0"]
  rows = ("fsdp", "context")
  assert layer["query"]["kernel"].sharding.spec == spec(rows, "tensor")
  assert layer["query"]["bias"].sharding.spec == spec("tensor")
  assert layer["output"]["kernel"].sharding.spec == spec("tensor", rows)
  state, shardings = loop.initial(ready, jax.random.key(0))
  before = _axes(state)
  pair = state.trained["primary"]["encoder"]["layer_0"]["intermediate"][
    "kernel"
  ]
  # Each of a factor's sides is split over the mesh axes of both.
  assert pair.a.sharding.spec == spec((*rows, "tensor"), None)
  assert pair.b.sharding.spec == spec(None, ("tensor", *rows))
  assert pair.a.addressable_shards[0].data.shape == (4, 4)
  moments = [name for name in before if ".mu" in name]
  assert moments
  for name in moments:
    part = name[name.index(".mu") + len(".mu") :]
    assert before[name] == before[f".trained{part}"]
  train_step = ready.layout.within(
    step.make_train_step(
      ready.method,
      CLASSIFICATION,
      (shardings, ready.layout.replicated),
    )
  )
  placed = ready.layout.rows(batch)
  assert placed["tokens"].sharding.spec == spec(("data", "fsdp"))
  state, _ = train_step(ready.variables, state, placed)
  assert _axes(state) == before


def test_what_a_mesh_axis_does_not_divide_is_left_whole():
  layout = mesh_lib.make("data=2,tensor=4", 8)
  spec = jax.sharding.PartitionSpec
  assert layout.sharding(spec("embed", "mlp"), (3, 8)).spec == spec(
    ("fsdp", "context"), "tensor"
  )
  assert layout.sharding(spec("embed", "mlp"), (3, 6)).spec == spec(
    ("fsdp", "context"), None
  )


def test_the_rows_of_a_batch_come_in_their_order(batch):
  layout = mesh_lib.make(CUBE, 8)
  assert layout.part() == (0, 1)
  for place in (layout.rows, layout.all_rows):
    placed = place(batch)
    assert placed.keys() == batch.keys()
    for name in batch:
      np.testing.assert_array_equal(placed[name], batch[name])


@pytest.mark.parametrize(
  ("mesh", "part"),
  [
    ("dta=8", "there is no axis 'dta'"),
    ("data=4,data=2", "data comes twice"),
    ("data=0,fsdp=8", "positive number, not '0'"),
    ("data=-8", "positive number, not '-8'"),
    ("data", "positive number, not ''"),
    ("data=8,", "there is no axis ''"),
    ("data=2,fsdp=2", "asks for 4 devices; there are 8, of the kind cpu"),
    ("data=16", "asks for 16 devices; there are 8"),
  ],
)
def test_a_mesh_that_cannot_be_is_refused_and_leaves_nothing(
  run, tmp_path, capsys, mesh, part
):
  assert run(tmp_path / "run", f"--mesh={mesh}") == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1
  assert part in lines[0]
  assert mesh in lines[0]
  assert not list(tmp_path.iterdir())


def test_a_batch_that_the_mesh_cannot_share_is_refused():
  with pytest.raises(UsageError, match=r"multiple of .* 4 in .* got 6\.$"):
    mesh_lib.make(CUBE, 6)


@pytest.mark.parametrize(
  ("arguments", "part"),
  [
    (["--coordinator", "here:1"], "must be given together"),
    (["--process-id", "0", "--num-processes", "2"], "must be given together"),
    (
      ["--coordinator", "here", "--process-id", "0", "--num-processes", "2"],
      "HOST:PORT, the address of process 0, or auto; got 'here'",
    ),
    (
      ["--coordinator", "here:1", "--process-id", "2", "--num-processes", "2"],
      "from 0 to --num-processes - 1, and --num-processes at most",
    ),
  ],
)
def test_processes_that_cannot_be_are_refused(
  run, tmp_path, capsys, arguments, part
):
  assert run(tmp_path / "run", *arguments) == 2
  assert part in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_where_jax_finds_no_cluster_auto_is_refused(
  run, tmp_path, capsys, monkeypatch
):
  def initialize():
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  assert run(tmp_path / "run", "--coordinator", "auto") == 2
  assert "JAX knows, and JAX finds none" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("name", "value", "found"),
  [
    ("SLURM_STEP_NUM_TASKS", "4", True),
    ("SLURM_STEP_NUM_TASKS", "1", False),
    ("OMPI_COMM_WORLD_SIZE", "2", True),
    ("TPU_WORKER_HOSTNAMES", "a,b", True),
    ("TPU_WORKER_HOSTNAMES", "a", False),
  ],
)
def test_one_of_several_processes_joins_the_others_by_itself(
  monkeypatch, name, value, found
):
  for other in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
    monkeypatch.delenv(other, raising=False)
  monkeypatch.setenv(name, value)
  joined = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda: joined.append(1))
  processes.join(None, None, None)
  assert bool(joined) is found is launch.in_cluster()


# JAX's own patience with a process that is gone is 100 seconds.
FOUR_DEVICES = f"""
import functools, os, signal
import jax
signal.alarm({_TIMEOUT_SECONDS})
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize = functools.partial(
  jax.distributed.initialize, heartbeat_timeout_seconds=10
)
"""

# After a checkpoint, that is whole, and before the next.
KILLED_AT_9 = """
import os, signal
from train.run import checkpoints, journal
save_last = checkpoints.Checkpoints.save_last
def save_and_wait(self, *arguments):
  save_last(self, *arguments)
  self.wait()
checkpoints.Checkpoints.save_last = save_and_wait
def advance(self, step):
  if step == 9:
    os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.advance = advance
"""


@pytest.fixture(scope="module")
def two(options, tmp_path_factory):
  """Two processes of one run; the driver is that of one of them."""
  with lives.Lives(os.environ) as started:

    def ended(folder, *more, driver="", driven=1):
      with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
      both = [
        started.start(
          folder,
          *(*options, "--run-dir", str(folder), "--mesh", CUBE),
          *("--coordinator", where, "--num-processes", "2"),
          *("--process-id", str(i), *more),
          driver=FOUR_DEVICES + (driver if i == driven else ""),
        )
        for i in range(2)
      ]
      return [started.end(process) for process in both]

    yield ended


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_process_is_killed_the_other_ends_and_one_can_resume(
  two, run, on_one_device, tmp_path, capsys, killed
):
  folder = tmp_path / "run"
  ends = two(folder, *TWO_KERNELS, driver=KILLED_AT_9, driven=killed)
  gone, left = ends[killed], ends[1 - killed]
  assert gone.code == 128 + signal.SIGKILL
  told = gone.err.splitlines()[-1]
  assert "error: this process was ended by SIGKILL" in told
  assert left.code == 1
  # The collective fails in Python, or the heartbeat does, and JAX aborts.
  last = left.err.splitlines()[-1]
  assert "another process is gone" in last or "JAX aborted this process" in last
  # What two processes saved, one device goes on with.
  assert run(folder, *TWO_KERNELS) == 0
  assert "resumed after step 6" in capsys.readouterr().out
  assert_near(folder, on_one_device)


# The second is asked to stop; the first hears of it at the next line.
INTERRUPTED_AT_7 = """
import os, signal
from train.run import journal
def advance(self, step):
  if step == 7:
    os.kill(os.getpid(), signal.SIGTERM)
journal.Journal.advance = advance
"""


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_all_resume_where_one_device_does(
  two, on_one_device, tmp_path
):
  folder = tmp_path / "run"
  first, second = two(folder, *TWO_KERNELS, driver=INTERRUPTED_AT_7)
  assert first.code == 0, first.err
  assert second.code == 0, second.err
  assert "interrupted after step 9" in first.out
  first, second = two(folder, *TWO_KERNELS)
  assert first.code == 0, first.err
  assert second.code == 0, second.err
  assert "resumed after step 9" in first.out
  assert "test accuracy" in first.out
  assert "step" not in second.out
  assert_near(folder, on_one_device)
  assert_no_step_twice(folder)


@pytest.mark.slow
def test_all_processes_are_refused_a_folder_that_another_command_is_in(
  two, tmp_path
):
  folder = tmp_path / "run"
  with locks.held(folder / locks.FILE, "it"):
    first, second = two(folder)
    assert not [x for x in folder.iterdir() if x.name != locks.FILE]
  assert (first.code, second.code) == (2, 2)
  assert f"{folder} is in use by process" in first.err.splitlines()[-1]
  told = second.err.splitlines()[-1]
  assert "another process of this job was refused" in told
