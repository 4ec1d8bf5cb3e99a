"""Tasks by name: what is read, which texts, which labels, which metrics."""

from train.tasks.registry import get, names
from train.tasks.task import Split, Task

__all__ = ["Split", "Task", "get", "names"]
