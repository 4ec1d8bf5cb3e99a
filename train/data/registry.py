"""The registered tasks: those of `builtin`, and those of other packages."""

from .task import Task

_BY_NAME: dict[str, Task] = {}


def register(task: Task) -> Task:
  """Registers a task for `--task`, and returns it.

  Raises:
    ValueError: if another task has its name.
  """
  if _BY_NAME.setdefault(task.name, task) != task:
    raise ValueError(f"There is a task {task.name!r} already.")
  return task


def names() -> tuple[str, ...]:
  """Returns the names of all tasks, the default one first."""
  from . import builtin  # noqa: F401 (registers its own)

  return tuple(_BY_NAME)


def get(name: str = "snippets") -> Task:
  """Returns the task of that name.

  Raises:
    ValueError: if no task has it.
  """
  if name not in names():
    allowed = ", ".join(_BY_NAME)
    raise ValueError(f"There is no task {name!r}; the tasks are {allowed}.")
  return _BY_NAME[name]
