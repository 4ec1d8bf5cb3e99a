"""Checkpoints of a run with Orbax: the last, to resume; the best, to keep."""

from collections.abc import Mapping
import contextlib
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from train.errors import RunError, UsageError
from train.step import TrainState


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
    self._folder = folder.absolute()
    self._last = _manager(self._folder / "last", keep=2)
    self._best = _manager(self._folder / "best", keep=1)

  def save_last(
    self, step: int, state: TrainState, loop: Mapping[str, Any]
  ) -> None:
    """Starts to save what resuming needs.

    Raises:
      RunError: if this save, or the one before, cannot be written.
    """
    with self._writing():
      self._last.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(_copy(state)),
          loop=ocp.args.JsonSave(dict(loop)),
        ),
      )

  def save_best(self, step: int, evaluated: Any) -> None:
    """Starts to save what is evaluated, after it was the best so far.

    Raises:
      RunError: as `save_last`.
    """
    # After a kill the same best may come again.
    if step in self._best.all_steps():
      return
    with self._writing():
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
    found = self._restore(
      self._last,
      step,
      state=ocp.args.StandardRestore(_abstract(like)),
      loop=ocp.args.JsonRestore(),
    )
    return Resumed(found["state"], found["loop"])

  def best(self, like: Any) -> Any:
    """What was evaluated best.

    Raises:
      UsageError: as `resume`.
    """
    step = self._best.latest_step()
    if step is None:
      raise UsageError(f"{self._folder} holds no best checkpoint.")
    return self._restore(
      self._best, step, evaluated=ocp.args.StandardRestore(_abstract(like))
    )["evaluated"]

  def close(self) -> None:
    """Ends the background threads."""
    self._last.close()
    self._best.close()

  def _restore(self, manager, step, **args):
    where = pathlib.Path(manager.directory) / str(step)
    try:
      return manager.restore(step, args=ocp.args.Composite(**args))
    except (ValueError, TypeError, KeyError, OSError) as error:
      raise UsageError(
        f"the checkpoint {where} does not fit this run, or is damaged; it is "
        f"left as it is. Orbax says: {_first_line(error)}"
      ) from error

  @contextlib.contextmanager
  def _writing(self):
    try:
      yield
    except (OSError, ValueError, RuntimeError) as error:
      raise RunError(
        f"a checkpoint could not be written to {self._folder}; earlier ones "
        f"are whole, and the same command resumes. {_first_line(error)}"
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


def _first_line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
