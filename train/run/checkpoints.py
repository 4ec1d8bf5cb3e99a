"""Checkpoints of a run with Orbax: the last, to resume; the best, to keep."""

from collections.abc import Callable, Mapping
import contextlib
import functools
import logging
import pathlib
import shutil
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from .. import command
from ..errors import RunError, UsageError
from .step import TrainState

# Orbax writes arrays twice, first by process, then merged; and JSON about each.
_SPACE_FACTOR = 2
_SPACE_BESIDE = 2**20


class Resumed(NamedTuple):
  """What the last checkpoint holds.

  Attributes:
    state: the training state.
    loop: the loop's own, JSON: the data iterator's state, the best so far.
  """

  state: TrainState
  loop: dict[str, Any]


class Checkpoints:
  """Two folders of checkpoints; neither ever holds the frozen base.

  Saving runs in the background. Orbax writes beside and renames, so that a
  kill at any moment leaves the checkpoint before it whole.
  """

  def __init__(self, folder: pathlib.Path):
    _quiet_orbax()
    self._folder = folder.absolute()
    self._last = _manager(self._folder / "last", keep=2)
    # Two, since a kill may come after a new best and before the checkpoint that
    # names it.
    self._best = _manager(self._folder / "best", keep=2)

  def save_last(
    self, step: int, state: TrainState, loop: Mapping[str, Any]
  ) -> None:
    """Starts to save what resuming needs.

    Raises:
      RunError: if this save, or the one before, cannot be written.
    """
    with self._writing():
      # It names the best, which must not be lost to a kill in between.
      self._best.wait_until_finished()
      self._require_space(state)
      self._last.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(_copy(state)),
          loop=ocp.args.JsonSave(
            {"loop": dict(loop), "shapes": _shapes(state)}
          ),
        ),
      )

  def save_best(self, step: int, evaluated: Any) -> None:
    """Starts to save what is evaluated, after it was the best so far.

    Raises:
      RunError: as `save_last`.
    """
    with self._writing():
      self._best.wait_until_finished()
      # From a run that was killed after them, and went on from before them.
      for stale in [s for s in self._best.all_steps() if s >= step]:
        self._best.delete(stale)
      self._require_space(evaluated)
      self._best.save(
        step,
        args=ocp.args.Composite(
          evaluated=ocp.args.StandardSave(_copy(evaluated))
        ),
      )

  def wait(self) -> None:
    """Waits until all that was started is on disk.

    Raises:
      RunError: if it could not be written.
    """
    with self._writing():
      self._last.wait_until_finished()
      self._best.wait_until_finished()

  def resume(self, like: TrainState) -> Resumed | None:
    """The last checkpoint, or None if there is none.

    Args:
      like: a state of the same method, model and spec.

    Raises:
      UsageError: if the checkpoint is of another method, model or spec, or
        cannot be read.
    """
    step = self._last.latest_step()
    if step is None:
      return None
    found = self._restore(self._last, step, loop=ocp.args.JsonRestore())["loop"]
    # Orbax would say so too, of one array and in four kinds of exceptions.
    there, here = found["shapes"], _shapes(like)
    for name in {**there, **here}:
      if there.get(name) != here.get(name):
        raise UsageError(
          f"the checkpoint {self._folder / 'last' / str(step)} does not fit "
          f"this run: {name} has the shape {there.get(name)} there and "
          f"{here.get(name)} here. It is left as it is."
        )
    state = ocp.args.StandardRestore(_abstract(like))
    found |= self._restore(self._last, step, state=state)
    return Resumed(found["state"], found["loop"])

  def best(self, step: int, like: Any) -> Any:
    """What was evaluated best, at that step.

    Raises:
      UsageError: as `resume`.
    """
    if step not in self._best.all_steps():
      raise UsageError(f"{self._folder / 'best'} lacks the one of step {step}.")
    return self._restore(
      self._best, step, evaluated=ocp.args.StandardRestore(_abstract(like))
    )["evaluated"]

  def close(self) -> None:
    """Ends the background threads; `wait` says whether they succeeded."""
    for manager in (self._last, self._best):
      # It raises what its thread did, once, and only then can be closed.
      with contextlib.suppress(Exception):
        manager.wait_until_finished()
      manager.close()

  def _restore(self, manager, step, **args):
    where = pathlib.Path(manager.directory) / str(step)
    try:
      return manager.restore(step, args=ocp.args.Composite(**args))
    except (ValueError, TypeError, KeyError, OSError) as error:
      raise UsageError(
        f"the checkpoint {where} is damaged; it is left as it is. Orbax says: "
        f"{_first_line(error)}"
      ) from error

  def _require_space(self, tree):
    # Orbax too finds a disk full, but late, and its threads are loud about it.
    needed = _SPACE_FACTOR * sum(x.nbytes for x in jax.tree.leaves(tree))
    needed += _SPACE_BESIDE
    free = shutil.disk_usage(self._folder).free
    if free < needed:
      raise OSError(
        f"Free on the disk are {free / 2**20:.1f} MiB, and {needed / 2**20:.1f}"
        " are needed."
      )

  @contextlib.contextmanager
  def _writing(self):
    try:
      yield
    except Exception as error:  # Orbax raises many kinds
      raise RunError(
        f"a checkpoint could not be written to {self._folder}; earlier ones "
        f"are whole: {command.RESUMES} {_first_line(error)}"
      ) from error


def _manager(folder: pathlib.Path, keep: int) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    folder,
    options=ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      create=True,
      cleanup_tmp_directories=True,
      enable_async_checkpointing=True,
    ),
  )


def _copy(tree: Any) -> Any:
  # The step donates its buffers, and a save in the background may still read
  # them; on the CPU it would read them in place.
  return jax.tree.map(jnp.copy, tree)


def _abstract(tree: Any) -> Any:
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def _shapes(tree: Any) -> dict[str, list[int]]:
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path): list(x.shape) for path, x in paths}


def _quiet_orbax() -> None:
  """Has a failure told once, by what is raised.

  Orbax logs its traceback in each thread on the way, and closes an event loop
  that TensorStore's threads still report to. Of several arrays that fail, it
  awaits the first, and asyncio logs the others when they are collected.
  """
  logging.getLogger("absl").addFilter(_is_not_of_orbax)
  logging.getLogger("asyncio").addFilter(_is_not_of_a_checkpoint)
  if getattr(sys.unraisablehook, "func", None) is not _unraisable:
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  return "orbax" not in record.pathname


def _is_not_of_a_checkpoint(record: logging.LogRecord) -> bool:
  raised = record.exc_info[1] if record.exc_info else None
  return "orbax" not in f"{record.getMessage()} {raised}"


def _unraisable(otherwise: Callable[[Any], None], unraisable: Any) -> None:
  if str(unraisable.exc_value) != "Event loop is closed":
    otherwise(unraisable)


def _first_line(error: BaseException) -> str:
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  # TensorStore says where at the start and why at the end.
  return line if len(line) <= 300 else f"{line[:100]} ... {line[-195:]}"
