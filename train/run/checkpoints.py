"""Checkpoints of a run with Orbax: the last to resume, the best to keep."""

import collections
from collections.abc import Callable, Iterator, Mapping
import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import orbax.checkpoint as ocp

from .. import command, files
from ..devices import processes
from ..errors import RunError, UsageError
from .step import TrainState

# Orbax writes arrays twice, for each process and then merged, and also JSON.
_SPACE_FACTOR = 2
_SPACE_BESIDE = 2**20
# If the last checkpoint is damaged, the one before it is used.
_LASTS = 2
FOLDER = "checkpoints"
"""The name of the subfolder in a run's folder."""
_NEWER = "radius"
"""A field of the state of balls that older versions did not save."""


class DamagedError(UsageError):
  """A checkpoint cannot be read, or differs from what was saved."""


class Resumed(NamedTuple):
  """The content of the last undamaged checkpoint.

  Attributes:
    state: the training state.
    loop: the state of the loop, as JSON: that of the data iterator, and the
      best step so far.
    damaged: for each later checkpoint, a sentence on its damage.
  """

  state: TrainState
  loop: dict[str, Any]
  damaged: tuple[str, ...] = ()


class Checkpoints:
  """Two folders of checkpoints, without the frozen base.

  Saves run in the background. Orbax writes to a temporary folder and renames
  it, so a kill at any time does not damage the previous checkpoint. A
  checkpoint that is read is compared with the checksums of the save.
  """

  def __init__(
    self, folder: pathlib.Path, begun: Mapping[str, Any] | None = None
  ):
    """Opens the folders, or makes them.

    Args:
      folder: the folder of both.
      begun: the fingerprint of the run, as JSON, which each checkpoint keeps
        (see `stored`).
    """
    _quiet_orbax()
    self._folder = folder.absolute()
    self._begun = dict(begun or {})
    # From each last checkpoint to the best one that it names. The best one must
    # be kept as long as the last one.
    self._named: dict[int, int] = {}
    self._digests: dict[int, str | None] = {}
    for step, found in stored(self._folder):
      self._name(step, found)
    self._last = _manager(self._folder / "last", keep=_LASTS)
    self._best = _manager(self._folder / "best", keep=None)
    self._damaged: list[int] = []

  def save_last(
    self, step: int, state: TrainState, loop: Mapping[str, Any]
  ) -> None:
    """Starts to save the state that a resumed run needs.

    Raises:
      RunError: if this save, or the one before, cannot be written.
    """
    with self._writing():
      # This checkpoint names the best one, which must therefore be whole.
      self._best.wait_until_finished()
      self._require_space(state)
      while self._damaged:
        self._last.delete(self._damaged.pop())
      best = loop.get("best", {}).get("step")
      found = _sealed(
        {
          "loop": dict(loop),
          "shapes": _shapes(state),
          "begun": self._begun,
          "state": _digest(state),
          "best": self._digests.get(best),
        }
      )
      self._last.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(_copy(state)),
          loop=ocp.args.JsonSave(found),
        ),
      )
      self._name(step, found)

  def save_best(self, step: int, evaluated: Any) -> None:
    """Starts to save the evaluated weights, which are the best so far.

    Raises:
      RunError: as `save_last`.
    """
    with self._writing():
      self._last.wait_until_finished()
      self._best.wait_until_finished()
      self._require_space(evaluated)
      lasts = sorted(self._named)[-_LASTS:]
      kept = {self._named[last] for last in lasts}
      # Later best checkpoints are from a run that was killed after them, and
      # then resumed at an earlier step.
      for old in self._best.all_steps():
        if old >= step or old not in kept:
          self._best.delete(old)
      self._digests[step] = _digest(evaluated)
      self._best.save(
        step,
        args=ocp.args.Composite(
          evaluated=ocp.args.StandardSave(_copy(evaluated))
        ),
      )

  def wait(self) -> None:
    """Waits until all saves are on disk.

    Raises:
      RunError: if a save could not be written.
    """
    with self._writing():
      self._last.wait_until_finished()
      self._best.wait_until_finished()

  def resume(
    self, like: TrainState, evaluated: Callable[[Any], Any] | None = None
  ) -> Resumed | None:
    """Returns the last undamaged checkpoint, or None if there are none.

    A checkpoint is skipped if it is damaged, or if its best checkpoint is. The
    next save removes it.

    Args:
      like: a state of the same method, model and spec.
      evaluated: from the trained arrays to the argument of `save_best`; None:
        best checkpoints are not checked.

    Raises:
      UsageError: if a checkpoint has another method, model or spec, or if all
        are damaged. They are not changed.
    """
    damaged: dict[int, str] = {}
    for step in sorted(self._last.all_steps(), reverse=True):
      try:
        found, state = self._whole(step, like)
        if evaluated is not None:
          self._require_best(step, found["loop"], evaluated(state.trained))
      except DamagedError as error:
        damaged[step] = str(error)
        continue
      self._damaged = list(damaged)
      for later in damaged:
        self._named.pop(later, None)
      return Resumed(state, found["loop"], tuple(damaged.values()))
    if damaged:
      first, *others = damaged.values()
      left = "It is left as it is."
      if others:
        left = "So is the one before it. Both are left as they are."
      raise UsageError(f"{first} {left}")
    return None

  def best(self, step: int, like: Any) -> Any:
    """Returns the best weights, which were saved at that step.

    Raises:
      UsageError: if the checkpoint is missing or damaged.
    """
    where = self._folder / "best" / str(step)
    if step not in self._best.all_steps():
      raise DamagedError(f"{where.parent} has no checkpoint of step {step}.")
    args = ocp.args.StandardRestore(_abstract(like))
    found = _restore(self._best, step, evaluated=args)["evaluated"]
    _require_digest(where, found, self._digests.get(step))
    return found

  def close(self) -> None:
    """Ends the background threads; `wait` says whether they succeeded."""
    for manager in (self._last, self._best):
      # The manager raises its thread's error once, and can be closed only
      # after that.
      with contextlib.suppress(Exception):
        manager.wait_until_finished()
      manager.close()

  def _name(self, step: int, found: Mapping[str, Any]) -> None:
    best = found["loop"].get("best", {}).get("step")
    if best:
      self._named[step] = best
      self._digests.setdefault(best, found.get("best"))

  def _whole(
    self, step: int, like: TrainState
  ) -> tuple[dict[str, Any], TrainState]:
    """Returns the JSON and the state of a checkpoint."""
    where = self._folder / "last" / str(step)
    found = _read(where)
    # Orbax would also refuse other shapes, with four kinds of exceptions that
    # name only one array.
    there, here = found["shapes"], _shapes(like)
    newer = {x for x in here if x.endswith(f".{_NEWER}") and x not in there}
    for name in {**there, **here}:
      if there.get(name) != here.get(name) and name not in newer:
        raise UsageError(
          f"the checkpoint {where} does not fit this run: {name} has the shape "
          f"{there.get(name)} there and {here.get(name)} here. It is left as "
          "it is."
        )
    known = _older(like) if newer else like
    args = ocp.args.StandardRestore(_abstract(known))
    state = _restore(self._last, step, state=args)["state"]
    _require_digest(where, state, found.get("state"))
    if newer:
      # The new field has its first value, until the next update sets it.
      leaves = {
        jax.tree_util.keystr(path): x
        for path, x in jax.tree_util.tree_leaves_with_path(state)
      }
      state = jax.tree_util.tree_map_with_path(
        lambda path, x: leaves.get(jax.tree_util.keystr(path), x), like
      )
    return found, state

  def _require_best(
    self, step: int, loop: Mapping[str, Any], evaluated: Any
  ) -> None:
    """Refuses a checkpoint if its best one is damaged and cannot be remade."""
    best = loop.get("best", {}).get("step")
    if not best:
      return
    try:
      self.best(best, evaluated)
    except DamagedError:
      if best != step:
        raise
      # The best step is the last one, so the state has its weights.
      self.save_best(step, evaluated)

  def _require_space(self, tree):
    # Orbax also reports a full disk, but late and with many messages.
    needed = _SPACE_FACTOR * sum(x.nbytes for x in jax.tree.leaves(tree))
    needed += _SPACE_BESIDE
    free = shutil.disk_usage(self._folder).free
    if free < needed:
      raise OSError(
        f"The disk has {free / 2**20:.1f} MiB free, and {needed / 2**20:.1f} "
        "MiB are needed."
      )

  @contextlib.contextmanager
  def _writing(self):
    try:
      yield
    except Exception as error:  # Orbax raises many types
      raise RunError(
        f"a checkpoint could not be written to {self._folder}; earlier ones "
        f"are whole: {command.RESUMES} {_first_line(error)}"
      ) from error


def stored(folder: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields the step and the JSON of each checkpoint, the last one first.

  Checkpoints with damaged JSON are left out. Nothing is written.

  Args:
    folder: the folder of `Checkpoints`.
  """
  steps = [
    int(path.name)
    for path in (folder / "last").glob("*")
    if path.name.isdecimal()
  ]
  for step in sorted(steps, reverse=True):
    with contextlib.suppress(DamagedError):
      yield step, _read(folder / "last" / str(step))


def _read(where: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON of a checkpoint."""
  try:
    found = json.loads((where / "loop" / "metadata").read_bytes())
    # Checkpoints of older versions have no seal.
    if set(found) == {"loop", "shapes"}:
      best = found["loop"].get("best", {})
      if isinstance(best, dict) and isinstance(found["shapes"], dict):
        return found
    if found != _sealed({k: x for k, x in found.items() if k != "seal"}):
      raise ValueError("its JSON is not what was saved.")
  except (
    *(OSError, ValueError, RecursionError),
    *(AttributeError, TypeError),  # JSON, but with wrong types
  ) as error:
    raise _damage(where, error) from error
  return found


def _sealed(value: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the value after a round trip through JSON, with its digest."""
  found = json.loads(json.dumps(files.finite(dict(value))))
  text = json.dumps(found, sort_keys=True)
  return {**found, "seal": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _digest(tree: Any) -> str:
  """Returns a digest of the bits of all arrays, on any devices."""
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  # Shard by shard, because many programs at once with communication between
  # devices can hang on a CPU.
  parts = [_checksums(jnp.asarray(x)) for _, x in paths]
  sums = [
    sum(int(x.sum()) for x in part) % 2**32 for part in jax.device_get(parts)
  ]
  totals = processes.summed(np.array(sums, np.int64)) % 2**32
  names = [jax.tree_util.keystr(path) for path, _ in paths]
  text = json.dumps(sorted(zip(names, totals.tolist())))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checksums(x: jax.Array) -> list[jax.Array]:
  """Returns checksums of an array's parts; their sum modulo 2^32 counts.

  Each word is multiplied by an odd number, which depends on its place in the
  whole array. So a flipped bit always changes the sum. The sharding never
  changes it, so a run may resume on another mesh.
  """
  strides = np.cumprod([1, *x.shape[:0:-1]])[: x.ndim][::-1] % 2**32
  strides = strides.astype(np.uint32)
  sharding = x.sharding
  if isinstance(sharding, NamedSharding) and not x.is_fully_replicated:
    # One program for all devices, instead of a compilation for each device.
    sums = _checksum_of_shards(sharding.mesh, sharding.spec)(x, strides)
    return [y.data for y in sums.addressable_shards if y.replica_id == 0]
  return [
    _checksum(
      shard.data,
      np.array([part.start or 0 for part in shard.index], np.uint32),
      strides,
    )
    for shard in x.addressable_shards
    if shard.replica_id == 0
  ]


@functools.cache
def _checksum_of_shards(
  mesh: jax.sharding.Mesh, spec: PartitionSpec
) -> Callable[[jax.Array, np.ndarray], jax.Array]:
  """Returns a function for the checksums of all shards, (shards,).

  Each device holds the checksum of its own shard.
  """
  axes = [
    () if x is None else x if isinstance(x, tuple) else (x,) for x in spec
  ]
  split = tuple(name for names in axes for name in names)

  def checksum(x, strides):
    start = [jnp.uint32(0)] * x.ndim
    for i, names in enumerate(axes):
      if names:
        place = jax.lax.axis_index(names).astype(jnp.uint32)
        start[i] = place * np.uint32(x.shape[i])
    return _checksum(x, start, strides)[None]

  return jax.jit(
    jax.shard_map(
      checksum,
      mesh=mesh,
      in_specs=(spec, PartitionSpec()),
      out_specs=PartitionSpec(split),
    )
  )


@jax.jit
def _checksum(x: jax.Array, start: Any, strides: Any) -> jax.Array:
  """Returns the checksum of a shard.

  Args:
    x: the shard.
    start: the place of the shard's first word in the whole array.
    strides: the strides of the whole array, in words.
  """
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  if words.ndim > x.ndim:
    words = jnp.sum(words, axis=-1, dtype=jnp.uint32)
  place = jnp.uint32(0)
  for axis in range(x.ndim):
    along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place += (along + start[axis]) * strides[axis]
  return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


def _require_digest(where: pathlib.Path, tree: Any, digest: str | None) -> None:
  # Checkpoints of older versions have no digest.
  if digest is not None and _digest(tree) != digest:
    raise _damage(where, ValueError("its arrays are not what was saved."))


def _restore(manager: ocp.CheckpointManager, step: int, **args: Any) -> Any:
  found = why = None
  try:
    found = manager.restore(step, args=ocp.args.Composite(**args))
  except MemoryError:
    raise
  except Exception as error:  # Orbax raises many types
    why = error
  # A process reads only its own shards, but all must resume at the same step.
  if processes.any_of(why is not None):
    why = why or ValueError("another process cannot read it.")
    raise _damage(pathlib.Path(manager.directory) / str(step), why) from why
  return found


def _damage(where: pathlib.Path, error: BaseException) -> DamagedError:
  # TensorStore adds all its options to its messages.
  why = _first_line(error, " [tensorstore_spec")
  return DamagedError(f"the checkpoint {where} is damaged: {why.rstrip('.')}.")


def _manager(folder: pathlib.Path, keep: int | None) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    folder,
    options=ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=True,
      cleanup_tmp_directories=True,
      enable_async_checkpointing=True,
    ),
  )


@jax.jit
def _copy(tree: Any) -> Any:
  # The step donates its buffers, but a save in the background may still read
  # them. On the CPU, a save reads them in place.
  return jax.tree.map(jnp.copy, tree)


def _older(tree: Any) -> Any:
  """Returns the state as in older versions: balls have no radius."""

  def is_ball(x):
    return isinstance(x, tuple) and _NEWER in getattr(x, "_fields", ())

  def older(x):
    if not is_ball(x):
      return x
    values = {name: y for name, y in x._asdict().items() if name != _NEWER}
    return collections.namedtuple(type(x).__name__, values)(**values)

  return jax.tree.map(older, tree, is_leaf=is_ball)


def _abstract(tree: Any) -> Any:
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def _shapes(tree: Any) -> dict[str, list[int]]:
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path): list(x.shape) for path, x in paths}


def _quiet_orbax() -> None:
  """Makes sure that a failure is reported only once, by its exception.

  Orbax logs the traceback in each of its threads. It also closes an event loop
  to which TensorStore's threads still report. If several arrays fail, Orbax
  awaits only the first, and asyncio logs the others when they are collected.
  """
  logging.getLogger("absl").addFilter(_is_not_of_orbax)
  logging.getLogger("asyncio").addFilter(_is_not_of_a_checkpoint)
  if getattr(sys.unraisablehook, "func", None) is not _unraisable:
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  return "orbax" not in record.pathname


def _is_not_of_a_checkpoint(record: logging.LogRecord) -> bool:
  raised = record.exc_info[1] if record.exc_info else None
  told = f"{record.getMessage()} {raised}"
  return "orbax" not in told and "tensorstore" not in told


def _unraisable(otherwise: Callable[[Any], None], unraisable: Any) -> None:
  # If several arrays cannot be read, Orbax awaits only the first coroutine.
  code = getattr(unraisable.object, "cr_code", None)
  if code is not None and "orbax" in code.co_filename:
    return
  if str(unraisable.exc_value) != "Event loop is closed":
    otherwise(unraisable)


# The system's errors for a disk that cannot be written.
_REASONS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO)


def _first_line(error: BaseException, end: str = "\n") -> str:
  text = str(error).strip() or type(error).__name__
  line = text.splitlines()[0].partition(end)[0]
  if len(line) <= 300:
    return line
  # In TensorStore's messages, the place is at the start. The reason is at the
  # end, or before a long specification of an array.
  short = f"{line[:100]} ... {line[-195:]}"
  reasons = [os.strerror(number) for number in _REASONS]
  missing = [x for x in reasons if x in text and x not in short]
  return f"{short} ({missing[0]})" if missing else short
